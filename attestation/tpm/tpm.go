// Package tpm attests a machine with a TPM 2.0 alone: what booted on it, and
// that the TPM is one that the verifier's roots vouch for.
//
// # What the evidence is
//
// One quote over one SHA-256 bank by a restricted attestation key (AK), whose
// qualifying data is the SHA-256 of the connection's binder. The AK is tied to
// the TPM by credential activation with the endorsement key (EK), and the EK to
// its maker by a certificate chain, or to the operator by enrolment. Where a
// cloud certifies the AK itself, as Google does, that certificate takes the
// place of both. The UEFI
// event log comes along; it explains the values and decides nothing that the
// quote does not cover.
//
// # What the verifier never does
//
// It never looks at a PCR that the verified quote's digest does not cover, never
// accepts a second bank, and never uses an event that does not replay to a
// quoted value. The wire format is specified in docs/spec/tpm-evidence.md.
//
// Constants and templates are those of the TCG's TPM 2.0 Library, the PC Client
// Platform Firmware Profile and the EK Credential Profile (version 2.5).
package tpm

import (
	"bytes"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"

	"github.com/keyagent/keyagent/attestation"
)

// The bounds of what a peer may send, in bytes. A Frame of attestation/atls is
// bounded as well; these are per part.
const (
	MaxEventLog    = 512 << 10
	maxCertificate = 8 << 10
	maxPublic      = 1 << 10
	maxAttest      = 1 << 10
	maxSignature   = 1 << 10
)

// Each refusal has its own error; all wrap [attestation.ErrRefused].
var (
	ErrMalformed        = refusal("malformed TPM evidence")
	ErrEKUntrusted      = refusal("endorsement key is not vouched for")
	ErrEKCertificate    = refusal("endorsement key certificate does not fit")
	ErrEKExpired        = refusal("endorsement key certificate is outside its validity")
	ErrEKRevoked        = refusal("endorsement key certificate is revoked")
	ErrAKRevoked        = refusal("attestation key certificate is revoked")
	ErrAKUntrusted      = refusal("attestation key is not vouched for")
	ErrAKCertificate    = refusal("attestation key certificate does not fit")
	ErrAKExpired        = refusal("attestation key certificate is outside its validity")
	ErrAKUnfit          = refusal("attestation key is not a restricted signing key of this TPM")
	ErrCredential       = refusal("attestation key is not in the TPM that the endorsement key belongs to")
	ErrSignature        = refusal("quote signature does not verify")
	ErrNotAQuote        = refusal("signed structure is not a TPM quote")
	ErrBinder           = refusal("quote does not cover this connection")
	ErrSelection        = refusal("quote covers other PCRs than were asked for")
	ErrPCRDigest        = refusal("PCR values do not match the quoted digest")
	ErrEventLog         = refusal("event log is refused")
	ErrEventLogTooLarge = refusal("event log is too large")
)

// ErrReset means that the TPM was reset while the issuer used it.
var ErrReset = errors.New("tpm was reset between two commands (hint: something else drives the TPM's bus; see docs/THREAT_MODEL.md)")

// ErrConfiguration means that a verifier was asked to work without trust roots or
// without PCRs: unset means refused.
var ErrConfiguration = errors.New("tpm verifier is not configured")

func refusal(text string) error { return fmt.Errorf("%w: %s", attestation.ErrRefused, text) }

// parse decodes one TPM structure and demands that it is canonical: nothing is
// left over and encoding it again gives the same bytes.
func parse[T tpm2.Marshallable, P interface {
	*T
	tpm2.Unmarshallable
}](what string, data []byte, limit int) (*T, error) {
	if len(data) == 0 || len(data) > limit {
		return nil, fmt.Errorf("%w: %s of %d bytes", ErrMalformed, what, len(data))
	}
	v, err := tpm2.Unmarshal[T, P](data)
	if err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrMalformed, what, err)
	}
	if !bytes.Equal(tpm2.Marshal(*v), data) {
		return nil, fmt.Errorf("%w: %s is not canonical", ErrMalformed, what)
	}
	return v, nil
}

// selection is the one PCR selection of the one bank that is ever used.
func selection(pcrs []uint32) tpm2.TPMLPCRSelection {
	idx := make([]uint, len(pcrs))
	for i, p := range pcrs {
		idx[i] = uint(p)
	}
	return tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{
		Hash:      tpm2.TPMAlgSHA256,
		PCRSelect: tpm2.PCClientCompatible.PCRs(idx...),
	}}}
}
