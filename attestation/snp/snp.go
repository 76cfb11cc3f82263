// Package snp attests a machine with AMD SEV-SNP: what was launched, under which
// policy, on which firmware, and that the processor is one of AMD's.
//
// # What the evidence is
//
// One report whose data is the connection's binder, all 64 bytes of it, the
// certificate of the key that signed it (VCEK, of one chip and one TCB, or VLEK,
// of one cloud provider), and AMD's revocation list. Certificate and list come
// from the machine's host or from AMD; no matter who brings them, they are verified.
//
// # What the verifier never does
//
// It never takes a root or an intermediate certificate from the evidence, never
// accepts a report without a revocation list that is fresh, and never believes a
// field of a report before its signature. It decides nothing that the policy
// decides: debug, VMPL, the least TCB and the like are facts here.
//
// The wire format and the order of the checks are specified in
// docs/spec/snp-evidence.md. Structures are those of AMD's SEV Secure Nested
// Paging Firmware ABI (publication 56860), certificates those of its VCEK
// Certificate and KDS Interface Specification (57230).
package snp

import (
	"errors"
	"fmt"

	"github.com/keyagent/keyagent/attestation"
)

// The bounds of what a peer may send, in bytes.
const (
	maxCertificate = 8 << 10
	maxCRL         = 64 << 10
)

// Each refusal has its own error; all wrap [attestation.ErrRefused].
var (
	ErrMalformed          = refusal("malformed SEV-SNP evidence")
	ErrProduct            = refusal("processor is of no known product line")
	ErrUntrusted          = refusal("certificate does not chain to a configured root of its product line")
	ErrCertificate        = refusal("certificate is not one of a report's key")
	ErrExpired            = refusal("certificate is outside its validity")
	ErrRevoked            = refusal("certificate is revoked")
	ErrCRL                = refusal("revocation list is refused")
	ErrChip               = refusal("certificate is of another chip")
	ErrTCB                = refusal("certificate is of another TCB")
	ErrSignature          = refusal("report signature does not verify")
	ErrReportData         = refusal("report does not cover this connection")
	ErrEndorsementMissing = fmt.Errorf("%w: endorsement is neither carried nor to be had", attestation.ErrUnendorsed)
)

// ErrConfiguration means that a verifier was asked to work without trust roots:
// unset means refused.
var ErrConfiguration = errors.New("snp verifier is not configured")

func refusal(text string) error { return fmt.Errorf("%w: %s", attestation.ErrRefused, text) }
