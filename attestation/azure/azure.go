// Package azure attests a confidential VM of Azure, whose vTPM runs in Microsoft's
// host compatibility layer (HCL) below the guest.
//
// # What the evidence is
//
// The HCL's report, which it leaves in the vTPM's NV memory: an SNP or TD report,
// and the runtime data that this report covers, in which stand the public key of
// the vTPM's attestation key and the VM's configuration; what a verifier needs for
// the hardware's report; and a quote by that very key over the binder. A token of
// Microsoft Attestation over the same binder may come along. The format and the
// order of the checks are specified in docs/spec/azure-evidence.md.
//
// # What it proves
//
// The hardware's report is as old as the boot and covers no binder. It proves that
// the attestation key is in a vTPM that this HCL keeps; the quote proves the rest.
// Which HCL it is, the measurement of the report says: a policy that leaves it out of the
// policy trusts any machine that makes such a report, Azure's or not. Claims are
// therefore of three kinds, and those of hardware and vTPM say Via.
//
// # What the verifier never does
//
// It never takes the attestation key from anywhere but the covered runtime data,
// never accepts an SNP report of the guest's own privilege level, and never
// believes a token whose issuer, nonce or attestation key are others.
//
// Structures are those of Microsoft's "Confidential VM guest attestation design
// detail".
package azure

import (
	"errors"
	"fmt"
	"time"

	"github.com/keyagent/keyagent/attestation"
)

// DefaultIMDS is the instance metadata service.
const DefaultIMDS = "http://169.254.169.254"

// What Azure's vTPM has.
const (
	NVReport = 0x01400001 // the index with the HCL's report
	AKHandle = 0x81000003 // the persistent attestation key
)

// maxToken bounds a token of Microsoft Attestation, and maxReport the HCL's report,
// in bytes.
const (
	maxToken  = 32 << 10
	maxReport = 8 << 10
	// requestTimeout bounds one request to the metadata service.
	requestTimeout = 10 * time.Second
)

// Each refusal has its own error; all wrap [attestation.ErrRefused]. What the
// hardware's report and the quote are refused for, packages snp, tdx and tpm name.
var (
	ErrMalformed = refusal("malformed Azure evidence")
	ErrHardware  = refusal("hardware of this kind is not accepted")
	ErrVMPL      = refusal("report is not the host compatibility layer's own")
	ErrKey       = refusal("attestation key is not the one that the hardware vouches for")
	ErrToken     = refusal("token of Microsoft Attestation is refused")
)

// ErrConfiguration means that an issuer or verifier lacks a part: unset means
// refused.
var ErrConfiguration = errors.New("azure attestation is not configured")

func refusal(text string) error { return fmt.Errorf("%w: %s", attestation.ErrRefused, text) }
