package tpm

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"maps"
	"time"

	"github.com/google/go-tpm/tpm2"
	"google.golang.org/protobuf/proto"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/internal/wire"
)

// Trust is what a verifier believes in, and what it asks for. The zero value
// believes in nothing, and a verifier refuses to start an exchange with it.
type Trust struct {
	// Roots sign EK certificates. At least one root of any kind or one enrolled
	// key is needed.
	Roots []Root
	// AKRoots sign certificates of attestation keys, as clouds have them.
	AKRoots []Root
	// Enrolled are endorsement keys that the operator vouches for.
	Enrolled []Enrolled
	// PCRs to ask for, ascending. At least one.
	PCRs []uint32
}

// Root is a named certificate authority of a TPM maker or a cloud.
type Root struct {
	Name        string
	Certificate *x509.Certificate
	// Intermediates are known beforehand; those that come along are tried too.
	Intermediates []*x509.Certificate
	// CRLs say which certificates below the root were taken back.
	CRLs []*x509.RevocationList
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

// Begin implements attestation.Verifier. It decides who vouches for the TPM:
// somebody for its EK, to which it then encrypts a fresh secret that only a TPM
// with the AK recovers, or somebody for the AK itself.
func (v *Verifier) Begin(_ context.Context, offer []byte) (attestation.Question, error) {
	trust := v.trust()
	if len(trust.Roots)+len(trust.Enrolled)+len(trust.AKRoots) == 0 {
		return nil, fmt.Errorf("%w: no root and no enrolled endorsement key", ErrConfiguration)
	}
	o, err := parseOffer(offer)
	if err != nil {
		return nil, err
	}
	if o.ek == nil {
		return v.beginCertified(trust, o)
	}
	q, err := newQuestion(o, trust.PCRs)
	if err != nil {
		return nil, err
	}
	q.hw, err = v.vouch(trust, o)
	return q, err
}

// newQuestion asks a TPM that has an EK, no matter who vouches for that.
func newQuestion(o offer, pcrs []uint32) (*question, error) {
	q := &question{ak: o.ak, pcrs: pcrs, credential: make([]byte, credentialSize)}
	rand.Read(q.credential)
	var err error
	q.ask, err = o.ask(pcrs, q.credential)
	return q, err
}

// beginCertified asks a TPM whose AK has a certificate of its own.
func (v *Verifier) beginCertified(trust Trust, o offer) (attestation.Question, error) {
	hw, err := v.vouchAK(trust, o)
	if err != nil {
		return nil, err
	}
	q := &question{ak: o.ak, pcrs: trust.PCRs, hw: hw}
	q.ask, err = askPCRs(trust.PCRs)
	return q, err
}

// Unvouched is an exchange with a TPM for whose endorsement key something else
// vouches later on, such as the manifest of an SVSM.
type Unvouched struct {
	// EKPublic is what has to be vouched for, a TPMT_PUBLIC.
	EKPublic []byte
	q        *question
}

// BeginUnvouched parses an offer with an EK and asks, and believes nothing yet.
func BeginUnvouched(offer []byte, pcrs []uint32) (*Unvouched, error) {
	o, err := parseOffer(offer)
	if err != nil {
		return nil, err
	}
	if o.ek == nil {
		return nil, fmt.Errorf("%w: no endorsement key", ErrMalformed)
	}
	u := &Unvouched{EKPublic: tpm2.Marshal(*o.ek)}
	if u.q, err = newQuestion(o, pcrs); err != nil {
		return nil, err
	}
	u.q.hw, err = nameEK(o)
	return u, err
}

// RestoreUnvouched is BeginUnvouched for an exchange that was saved in a file
// with its secret. It proves no freshness.
func RestoreUnvouched(offer []byte, pcrs []uint32, secret []byte) (*Unvouched, error) {
	if len(secret) != credentialSize {
		return nil, fmt.Errorf("%w: credential of %d bytes", ErrMalformed, len(secret))
	}
	u, err := BeginUnvouched(offer, pcrs)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	u.q.credential = secret
	return u, nil
}

// Ask returns what the TPM must answer.
func (u *Unvouched) Ask() []byte { return u.q.ask }

// Verify checks the answer. The claims' Trust is empty: the caller sets it once
// somebody has vouched for EKPublic, and uses the claims only then.
func (u *Unvouched) Verify(ctx context.Context, evidence []byte, binder attestation.Binder) (attestation.Claims, error) {
	claims, err := u.q.Verify(ctx, evidence, binder)
	if err != nil {
		return attestation.Claims{}, err
	}
	return claims[0], nil
}

// Restore answers for an exchange that was saved in a file: the question that
// it holds is asked again, with the secret that the file tells. It proves no
// freshness.
func (v *Verifier) Restore(ctx context.Context, offer, ask, secret []byte) (attestation.Question, error) {
	var asked attestv1.TPMAsk
	if err := wire.Unmarshal(ask, &asked); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	if err := checkPCRs(asked.GetPcrs()); err != nil {
		return nil, fmt.Errorf("%w: PCRs %v", ErrMalformed, asked.GetPcrs())
	}
	begun, err := v.Begin(ctx, offer)
	if err != nil {
		return nil, err
	}
	q := begun.(*question)
	if len(secret) != len(q.credential) {
		return nil, fmt.Errorf("%w: credential of %d bytes", ErrMalformed, len(secret))
	}
	q.pcrs, q.credential = asked.GetPcrs(), secret
	return q, nil
}

// credentialSize of the secret that the EK recovers, in bytes.
const credentialSize = 32

// offer is a parsed TPMOffer: with an EK, or with a certificate of the AK.
type offer struct {
	ak              AK
	ek              *tpm2.TPMTPublic
	certificate     []byte
	intermediates   [][]byte
	akCertificate   []byte
	akIntermediates [][]byte
}

func parseOffer(data []byte) (offer, error) {
	var m attestv1.TPMOffer
	if err := wire.Unmarshal(data, &m); err != nil {
		return offer{}, fmt.Errorf("%w: offer: %w", ErrMalformed, err)
	}
	o := offer{
		certificate: m.GetEkCertificate(), intermediates: m.GetEkIntermediates(),
		akCertificate: m.GetAkCertificate(), akIntermediates: m.GetAkIntermediates(),
	}
	var err error
	if o.ak, err = ParseAK(m.GetAkPublic()); err != nil {
		return offer{}, err
	}
	if len(o.akCertificate) == 0 {
		o.ek, err = parse[tpm2.TPMTPublic]("endorsement key", m.GetEkPublic(), maxPublic)
		return o, err
	}
	if len(m.GetEkPublic())+len(o.certificate)+len(o.intermediates) > 0 {
		return offer{}, fmt.Errorf("%w: both an endorsement key and a certificate of the attestation key", ErrMalformed)
	}
	return o, nil
}

// ask encrypts credential so that only the TPM with this EK can recover it, and
// only if it also holds this AK.
func (o offer) ask(pcrs []uint32, credential []byte) ([]byte, error) {
	if err := checkPCRs(pcrs); err != nil {
		return nil, err
	}
	encap, err := tpm2.ImportEncapsulationKey(o.ek)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrEKCertificate, err)
	}
	blob, enc, err := tpm2.CreateCredential(rand.Reader, encap, o.ak.Name, credential)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrEKCertificate, err)
	}
	return marshalAsk(&attestv1.TPMAsk{CredentialBlob: blob, EncryptedSecret: enc}, pcrs)
}

func askPCRs(pcrs []uint32) ([]byte, error) {
	if err := checkPCRs(pcrs); err != nil {
		return nil, err
	}
	return marshalAsk(&attestv1.TPMAsk{}, pcrs)
}

func marshalAsk(a *attestv1.TPMAsk, pcrs []uint32) ([]byte, error) {
	a.Bank, a.Pcrs, a.WantEventLog = uint32(tpm2.TPMAlgSHA256), pcrs, true
	return proto.Marshal(a)
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
	ak         AK
	credential []byte // none: the AK itself is certified
	pcrs       []uint32
	ask        []byte
}

// Ask implements attestation.Question.
func (q *question) Ask() []byte { return q.ask }

// Verify implements attestation.Question.
func (q *question) Verify(_ context.Context, evidence []byte, binder attestation.Binder) ([]attestation.Claims, error) {
	var e attestv1.TPMEvidence
	if err := wire.Unmarshal(evidence, &e); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	// The quote first: of evidence that was relayed or replayed neither half
	// fits, and the quote's refusal says so.
	quoted, err := VerifyQuote(&e, q.ak.Key, binder, q.pcrs)
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(quoted.Signer, qualifiedName(q.ak.Name)) {
		return nil, fmt.Errorf("%w: the signer is not a primary key of the endorsement hierarchy", ErrAKUnfit)
	}
	if len(q.credential) == 0 {
		if len(e.GetCredentialProof()) > 0 {
			return nil, fmt.Errorf("%w: proof of a credential that was not given", ErrMalformed)
		}
	} else if !hmac.Equal(e.GetCredentialProof(), credentialProof(q.credential, binder)) {
		return nil, ErrCredential
	}
	maps.Copy(quoted.Facts, q.hw.facts)
	return []attestation.Claims{{
		Kind:           attestation.TPM,
		Identity:       q.hw.identity,
		Trust:          q.hw.trust,
		Until:          q.hw.until,
		Measurements:   quoted.Measurements,
		Epoch:          quoted.Epoch,
		Facts:          quoted.Facts,
		EvidenceDigest: sha256.Sum256(evidence),
	}}, nil
}

// register names a PCR in claims and policies.
func register(pcr uint32) string { return fmt.Sprintf("pcr%d", pcr) }

// hexOf shortens a digest for a person.
func hexOf(b []byte) string { return hex.EncodeToString(b) }
