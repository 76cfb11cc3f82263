package tpm

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha256"
	"fmt"
	"math/big"

	"github.com/google/go-tpm/tpm2"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/facts"
)

// Quoted is what a verified quote covers.
type Quoted struct {
	// Signer is the qualified name of the key that signed.
	Signer       []byte
	Measurements map[string]attestation.Measurement
	// Epoch is the TPM's reset and restart count.
	Epoch string
	Facts map[string]any
}

// VerifyQuote checks a quote by a key that the caller has a reason to believe
// in: signature, type, that it covers binder, exactly one bank and exactly these
// PCRs, their values, and the event log. The key is as [ParseAK] returns it.
func VerifyQuote(e *attestv1.TPMEvidence, key crypto.PublicKey, binder attestation.Binder, pcrs []uint32) (Quoted, error) {
	qualifying := sha256.Sum256(binder[:])
	return verifyQuote(e, key, qualifying[:], pcrs)
}

func verifyQuote(e *attestv1.TPMEvidence, key crypto.PublicKey, qualifying []byte, pcrs []uint32) (Quoted, error) {
	if len(e.GetEventLog()) > MaxEventLog {
		return Quoted{}, fmt.Errorf("%w: %d bytes, at most %d", ErrEventLogTooLarge, len(e.GetEventLog()), MaxEventLog)
	}
	attest, err := verifySigned(e, key)
	if err != nil {
		return Quoted{}, err
	}
	if !bytes.Equal(attest.ExtraData.Buffer, qualifying) {
		return Quoted{}, ErrBinder
	}
	info, err := attest.Attested.Quote()
	if err != nil {
		return Quoted{}, fmt.Errorf("%w: %w", ErrNotAQuote, err)
	}
	values, err := coveredPCRs(info, pcrs, e.GetPcrValues())
	if err != nil {
		return Quoted{}, err
	}
	measurements, err := explain(values, e.GetEventLog(), e.GetUserspaceLog())
	if err != nil {
		return Quoted{}, err
	}
	clock := attest.ClockInfo
	set := map[string]any{}
	facts.TPMFirmware.Put(set, fmt.Sprintf("%#x", attest.FirmwareVersion))
	facts.TPMResetCount.Put(set, uint64(clock.ResetCount))
	facts.TPMRestartCount.Put(set, uint64(clock.RestartCount))
	logFacts(e.GetEventLog(), set)
	return Quoted{
		Signer:       attest.QualifiedSigner.Buffer,
		Measurements: measurements,
		Epoch:        fmt.Sprintf("reset %d restart %d", clock.ResetCount, clock.RestartCount),
		Facts:        set,
	}, nil
}

// verifySigned returns the structure that the key's signature covers.
func verifySigned(e *attestv1.TPMEvidence, key crypto.PublicKey) (*tpm2.TPMSAttest, error) {
	sig, err := parse[tpm2.TPMTSignature]("signature", e.GetSignature(), maxSignature)
	if err != nil {
		return nil, err
	}
	if len(e.GetAttest()) > maxAttest {
		return nil, fmt.Errorf("%w: attest of %d bytes", ErrMalformed, len(e.GetAttest()))
	}
	if err := verifySignature(key, sig, sha256.Sum256(e.GetAttest())); err != nil {
		return nil, err
	}
	attest, err := parse[tpm2.TPMSAttest]("attest", e.GetAttest(), maxAttest)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNotAQuote, err)
	}
	if attest.Magic != tpm2.TPMGeneratedValue || attest.Type != tpm2.TPMSTAttestQuote {
		return nil, fmt.Errorf("%w: type %#x", ErrNotAQuote, attest.Type)
	}
	return attest, nil
}

func verifySignature(key crypto.PublicKey, sig *tpm2.TPMTSignature, digest [sha256.Size]byte) error {
	switch key := key.(type) {
	case *ecdsa.PublicKey:
		ec, err := sig.Signature.ECDSA()
		if err != nil || sig.SigAlg != tpm2.TPMAlgECDSA || ec.Hash != tpm2.TPMAlgSHA256 {
			return fmt.Errorf("%w: not ECDSA with SHA-256", ErrSignature)
		}
		if !verifyECDSA(key, digest[:], ec.SignatureR.Buffer, ec.SignatureS.Buffer) {
			return ErrSignature
		}
	case *rsa.PublicKey:
		r, err := sig.Signature.RSASSA()
		if err != nil || sig.SigAlg != tpm2.TPMAlgRSASSA || r.Hash != tpm2.TPMAlgSHA256 {
			return fmt.Errorf("%w: not RSASSA with SHA-256", ErrSignature)
		}
		if rsa.VerifyPKCS1v15(key, crypto.SHA256, digest[:], r.Sig.Buffer) != nil {
			return ErrSignature
		}
	default:
		return fmt.Errorf("%w: key of type %T", ErrSignature, key)
	}
	return nil
}

func verifyECDSA(key *ecdsa.PublicKey, digest, r, s []byte) bool {
	return len(r) <= 66 && len(s) <= 66 &&
		ecdsa.Verify(key, digest, new(big.Int).SetBytes(r), new(big.Int).SetBytes(s))
}

// coveredPCRs demands exactly one bank and exactly the PCRs that were asked
// for, and returns their values only after the quoted digest covers them.
func coveredPCRs(info *tpm2.TPMSQuoteInfo, pcrs []uint32, values [][]byte) (map[uint32][]byte, error) {
	got := info.PCRSelect.PCRSelections
	if len(got) != 1 {
		return nil, fmt.Errorf("%w: %d banks", ErrSelection, len(got))
	}
	want := selection(pcrs).PCRSelections[0]
	if got[0].Hash != want.Hash {
		return nil, fmt.Errorf("%w: bank %#x", ErrSelection, got[0].Hash)
	}
	if !bytes.Equal(got[0].PCRSelect, want.PCRSelect) {
		return nil, fmt.Errorf("%w: bitmap %x, asked for %x", ErrSelection, got[0].PCRSelect, want.PCRSelect)
	}
	if len(values) != len(pcrs) {
		return nil, fmt.Errorf("%w: %d values for %d PCRs", ErrPCRDigest, len(values), len(pcrs))
	}
	h := sha256.New()
	covered := make(map[uint32][]byte, len(pcrs))
	for i, v := range values {
		if len(v) != sha256.Size {
			return nil, fmt.Errorf("%w: PCR %d has %d bytes", ErrPCRDigest, pcrs[i], len(v))
		}
		h.Write(v)
		covered[pcrs[i]] = v
	}
	if !bytes.Equal(h.Sum(nil), info.PCRDigest.Buffer) {
		return nil, ErrPCRDigest
	}
	return covered, nil
}
