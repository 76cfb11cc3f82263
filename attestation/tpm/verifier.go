package tpm

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"time"

	"github.com/google/go-tpm/tpm2"
	"google.golang.org/protobuf/proto"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
)

// Trust is what a verifier believes in, and what it asks for. The zero value
// believes in nothing, and a verifier refuses to start an exchange with it.
type Trust struct {
	// Roots sign EK certificates. At least one root or enrolled key is needed.
	Roots []Root
	// Enrolled are endorsement keys that the operator vouches for.
	Enrolled []Enrolled
	// PCRs to ask for, ascending. At least one.
	PCRs []uint32
}

// Root is a named certificate authority of a TPM maker.
type Root struct {
	Name        string
	Certificate *x509.Certificate
}

// Enrolled is a named endorsement key, as [EKDigest] gives it.
type Enrolled struct {
	Name     string
	EKDigest string
}

// VerifierOptions configure [NewVerifier].
type VerifierOptions struct {
	// Trust is asked for at the start of each exchange, so that a reloaded
	// policy takes effect. Required.
	Trust func() Trust
	// Now is the clock for certificates. Default time.Now.
	Now func() time.Time
}

// Verifier checks TPM evidence.
type Verifier struct {
	trust  func() Trust
	now    func() time.Time
	chains chainCache
}

var _ attestation.Verifier = (*Verifier)(nil)

// NewVerifier returns a verifier. Options without Trust are refused.
func NewVerifier(opts VerifierOptions) (*Verifier, error) {
	if opts.Trust == nil {
		return nil, fmt.Errorf("%w: no trust", ErrConfiguration)
	}
	if opts.Now == nil {
		opts.Now = time.Now
	}
	return &Verifier{trust: opts.Trust, now: opts.Now}, nil
}

// Kind implements attestation.Verifier.
func (*Verifier) Kind() attestation.Kind { return attestation.TPM }

// Begin implements attestation.Verifier. It decides whether the EK is vouched
// for and whether the AK has the right attributes, and encrypts a fresh secret
// to the pair of them.
func (v *Verifier) Begin(_ context.Context, offer []byte) (attestation.Question, error) {
	trust := v.trust()
	if len(trust.Roots)+len(trust.Enrolled) == 0 {
		return nil, fmt.Errorf("%w: no root and no enrolled endorsement key", ErrConfiguration)
	}
	if err := checkPCRs(trust.PCRs); err != nil {
		return nil, err
	}
	o, err := parseOffer(offer)
	if err != nil {
		return nil, err
	}
	q := &question{pcrs: trust.PCRs, signer: qualifiedName(o.akName)}
	if q.hw, err = v.vouch(trust, o); err != nil {
		return nil, err
	}
	if q.ak, err = checkAK(o.ak); err != nil {
		return nil, err
	}
	rand.Read(q.credential[:])
	q.ask, err = o.ask(trust.PCRs, q.credential[:])
	return q, err
}

// offer is a parsed TPMOffer.
type offer struct {
	ek, ak        *tpm2.TPMTPublic
	akName        []byte
	certificate   []byte
	intermediates [][]byte
}

func parseOffer(data []byte) (offer, error) {
	var m attestv1.TPMOffer
	if err := proto.Unmarshal(data, &m); err != nil {
		return offer{}, fmt.Errorf("%w: offer: %w", ErrMalformed, err)
	}
	o := offer{certificate: m.GetEkCertificate(), intermediates: m.GetEkIntermediates()}
	var err error
	if o.ek, err = parse[tpm2.TPMTPublic]("endorsement key", m.GetEkPublic(), maxPublic); err != nil {
		return offer{}, err
	}
	if o.ak, err = parse[tpm2.TPMTPublic]("attestation key", m.GetAkPublic(), maxPublic); err != nil {
		return offer{}, err
	}
	if o.ak.NameAlg != tpm2.TPMAlgSHA256 {
		return offer{}, fmt.Errorf("%w: only keys with SHA-256 names are accepted", ErrAKUnfit)
	}
	// The name of an object is the digest of its public area, which is canonical
	// here: TPM 2.0 Library part 1, section 16.
	sum := sha256.Sum256(m.GetAkPublic())
	o.akName = append([]byte{0x00, 0x0B}, sum[:]...)
	return o, nil
}

// ask encrypts credential so that only the TPM with this EK can recover it, and
// only if it also holds this AK.
func (o offer) ask(pcrs []uint32, credential []byte) ([]byte, error) {
	encap, err := tpm2.ImportEncapsulationKey(o.ek)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrEKCertificate, err)
	}
	blob, enc, err := tpm2.CreateCredential(rand.Reader, encap, o.akName, credential)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrEKCertificate, err)
	}
	return proto.Marshal(&attestv1.TPMAsk{
		CredentialBlob:  blob,
		EncryptedSecret: enc,
		Bank:            uint32(tpm2.TPMAlgSHA256),
		Pcrs:            pcrs,
		WantEventLog:    true,
	})
}

func checkPCRs(pcrs []uint32) error {
	if len(pcrs) == 0 {
		return fmt.Errorf("%w: no PCRs to ask for", ErrConfiguration)
	}
	for i, p := range pcrs {
		if p > 23 || (i > 0 && p <= pcrs[i-1]) {
			return fmt.Errorf("%w: PCRs %v are not ascending and below 24", ErrConfiguration, pcrs)
		}
	}
	return nil
}

// checkAK demands a key that only a TPM can hold and that signs only what the
// TPM itself made.
func checkAK(pub *tpm2.TPMTPublic) (*ecdsa.PublicKey, error) {
	a := pub.ObjectAttributes
	for _, attr := range []struct {
		name string
		ok   bool
	}{
		{"fixedTPM is not set", a.FixedTPM},
		{"fixedParent is not set", a.FixedParent},
		{"sensitiveDataOrigin is not set", a.SensitiveDataOrigin},
		{"restricted is not set", a.Restricted},
		{"sign is not set", a.SignEncrypt},
		{"decrypt is set", !a.Decrypt},
		// A key from outside has no secret in the TPM, but may have a policy
		// that authorises the activation of credentials.
		{"it has a policy", len(pub.AuthPolicy.Buffer) == 0},
	} {
		if !attr.ok {
			return nil, fmt.Errorf("%w: %s", ErrAKUnfit, attr.name)
		}
	}
	if pub.NameAlg != tpm2.TPMAlgSHA256 || pub.Type != tpm2.TPMAlgECC {
		return nil, fmt.Errorf("%w: only ECC keys with SHA-256 names are accepted", ErrAKUnfit)
	}
	parms, err := pub.Parameters.ECCDetail()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrAKUnfit, err)
	}
	scheme, err := parms.Scheme.Details.ECDSA()
	if err != nil || parms.Scheme.Scheme != tpm2.TPMAlgECDSA || scheme.HashAlg != tpm2.TPMAlgSHA256 || parms.CurveID != tpm2.TPMECCNistP256 {
		return nil, fmt.Errorf("%w: only ECDSA over P-256 with SHA-256 is accepted", ErrAKUnfit)
	}
	point, err := pub.Unique.ECC()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrAKUnfit, err)
	}
	key, err := tpm2.ECDSAPub(parms, point)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrAKUnfit, err)
	}
	if _, err := key.ECDH(); err != nil { // refuses a point off the curve
		return nil, fmt.Errorf("%w: %w", ErrAKUnfit, err)
	}
	return key, nil
}

// qualifiedName of a primary key of the endorsement hierarchy. A quote by any
// other hierarchy has its clock and reset count obfuscated.
func qualifiedName(name []byte) []byte {
	h := sha256.New()
	h.Write(tpm2.HandleName(tpm2.TPMRHEndorsement).Buffer)
	h.Write(name)
	return append([]byte{0x00, 0x0B}, h.Sum(nil)...)
}

// question is one exchange.
type question struct {
	hw         hardware
	ak         *ecdsa.PublicKey
	signer     []byte
	credential [32]byte
	pcrs       []uint32
	ask        []byte
}

// Ask implements attestation.Question.
func (q *question) Ask() []byte { return q.ask }

// Verify implements attestation.Question.
func (q *question) Verify(_ context.Context, evidence []byte, binder attestation.Binder) ([]attestation.Claims, error) {
	var e attestv1.TPMEvidence
	if err := proto.Unmarshal(evidence, &e); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	if len(e.GetEventLog()) > MaxEventLog {
		return nil, fmt.Errorf("%w: %d bytes, at most %d", ErrEventLogTooLarge, len(e.GetEventLog()), MaxEventLog)
	}
	// The quote first: of evidence that was relayed or replayed neither half
	// fits, and the quote's refusal says so.
	quote, err := q.verifyQuote(&e, binder)
	if err != nil {
		return nil, err
	}
	if !hmac.Equal(e.GetCredentialProof(), credentialProof(q.credential[:], binder)) {
		return nil, ErrCredential
	}
	values, err := coveredPCRs(quote.info, q.pcrs, e.GetPcrValues())
	if err != nil {
		return nil, err
	}
	measurements, err := explain(values, e.GetEventLog())
	if err != nil {
		return nil, err
	}
	return []attestation.Claims{{
		Kind:         attestation.TPM,
		Identity:     q.hw.ekDigest,
		Trust:        q.hw.trust,
		Measurements: measurements,
		Epoch:        fmt.Sprintf("reset %d restart %d", quote.clock.ResetCount, quote.clock.RestartCount),
		Facts: map[string]any{
			"ek":            q.hw.ekDigest,
			"ek_issuer":     q.hw.issuer,
			"firmware":      fmt.Sprintf("%#x", quote.firmware),
			"reset_count":   uint64(quote.clock.ResetCount),
			"restart_count": uint64(quote.clock.RestartCount),
			"event_log":     len(e.GetEventLog()) > 0,
		},
		EvidenceDigest: sha256.Sum256(evidence),
	}}, nil
}

// verifiedQuote is what the AK's signature covers.
type verifiedQuote struct {
	info     *tpm2.TPMSQuoteInfo
	clock    tpm2.TPMSClockInfo
	firmware uint64
}

func (q *question) verifyQuote(e *attestv1.TPMEvidence, binder attestation.Binder) (verifiedQuote, error) {
	var none verifiedQuote
	sig, err := parse[tpm2.TPMTSignature]("signature", e.GetSignature(), maxSignature)
	if err != nil {
		return none, err
	}
	ec, err := sig.Signature.ECDSA()
	if err != nil || sig.SigAlg != tpm2.TPMAlgECDSA || ec.Hash != tpm2.TPMAlgSHA256 {
		return none, fmt.Errorf("%w: not ECDSA with SHA-256", ErrSignature)
	}
	if len(e.GetAttest()) > maxAttest {
		return none, fmt.Errorf("%w: attest of %d bytes", ErrMalformed, len(e.GetAttest()))
	}
	digest := sha256.Sum256(e.GetAttest())
	if !verifyECDSA(q.ak, digest[:], ec.SignatureR.Buffer, ec.SignatureS.Buffer) {
		return none, ErrSignature
	}
	attest, err := parse[tpm2.TPMSAttest]("attest", e.GetAttest(), maxAttest)
	if err != nil {
		return none, fmt.Errorf("%w: %w", ErrNotAQuote, err)
	}
	if attest.Magic != tpm2.TPMGeneratedValue || attest.Type != tpm2.TPMSTAttestQuote {
		return none, fmt.Errorf("%w: type %#x", ErrNotAQuote, attest.Type)
	}
	qualifying := sha256.Sum256(binder[:])
	if !bytes.Equal(attest.ExtraData.Buffer, qualifying[:]) {
		return none, ErrBinder
	}
	if !bytes.Equal(attest.QualifiedSigner.Buffer, q.signer) {
		return none, fmt.Errorf("%w: the signer is not a primary key of the endorsement hierarchy", ErrAKUnfit)
	}
	info, err := attest.Attested.Quote()
	if err != nil {
		return none, fmt.Errorf("%w: %w", ErrNotAQuote, err)
	}
	return verifiedQuote{info, attest.ClockInfo, attest.FirmwareVersion}, nil
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

// explain attaches to each covered value the events that replay to it.
func explain(values map[uint32][]byte, log []byte) (map[string]attestation.Measurement, error) {
	out := make(map[string]attestation.Measurement, len(values))
	for pcr, v := range values {
		out[Register(pcr)] = attestation.Measurement{Value: v}
	}
	if len(log) == 0 {
		return out, nil
	}
	parsed, err := ParseEventLog(log)
	if err != nil {
		return nil, err
	}
	for pcr, v := range values {
		events, err := parsed.Explain(pcr, v)
		if err != nil {
			return nil, err
		}
		// Into these the firmware measures, and the firmware writes the log. The
		// others belong to later software, which may keep no log.
		if pcr <= lastFirmwarePCR && len(events) == 0 && !unextended(v) {
			return nil, fmt.Errorf("%w: pcr %d: the quote says %x, the log has no event of it", ErrEventLog, pcr, v)
		}
		out[Register(pcr)] = attestation.Measurement{Value: v, Events: events}
	}
	return out, nil
}

const lastFirmwarePCR = 7

func unextended(value []byte) bool { return len(bytes.Trim(value, "\x00")) == 0 }

// Register names a PCR in claims and policies.
func Register(pcr uint32) string { return fmt.Sprintf("pcr%d", pcr) }

// hexOf shortens a digest for a person.
func hexOf(b []byte) string { return hex.EncodeToString(b) }
