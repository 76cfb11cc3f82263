package tdx

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/endorsement"
	"github.com/keyagent/keyagent/attestation/facts"
	"github.com/keyagent/keyagent/internal/wire"
)

// VerifierOptions configure [NewVerifier].
type VerifierOptions struct {
	// Trust is asked for at the start of each exchange, so that a reloaded
	// policy takes effect. Required.
	Trust func() Trust
	// Endorsements is asked for collateral that the evidence does not carry, or
	// carries past its time. Nil: only what is carried counts.
	Endorsements endorsement.Source
	// Memory has what other evidence and the source said before. Default: one of its own.
	Memory *endorsement.Memory
	// Now is the clock for certificates and collateral. Default time.Now.
	Now func() time.Time
}

// Verifier checks TDX evidence.
type Verifier struct {
	trust  func() Trust
	source endorsement.Source
	memory *endorsement.Memory
	now    func() time.Time

	chains     cache[*pck]
	collateral cache[*endorsed]
	enclaves   cache[*ecdsa.PublicKey] // attestation keys that a quoting enclave vouches for
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
	if opts.Memory == nil {
		opts.Memory = &endorsement.Memory{}
	}
	v := &Verifier{trust: opts.Trust, source: opts.Endorsements, memory: opts.Memory, now: opts.Now}
	// Thousands of machines share little collateral.
	v.chains.limit, v.collateral.limit, v.enclaves.limit = 4096, 128, 4096
	return v, nil
}

// Kind implements attestation.Verifier.
func (*Verifier) Kind() attestation.Kind { return attestation.TDX }

// Begin implements attestation.Verifier. There is nothing to offer or to ask.
func (v *Verifier) Begin(_ context.Context, offer []byte) (attestation.Question, error) {
	if _, err := v.roots(); err != nil {
		return nil, err
	}
	if len(offer) > 0 {
		return nil, fmt.Errorf("%w: offer of %d bytes", ErrMalformed, len(offer))
	}
	return question{v}, nil
}

type question struct{ v *Verifier }

// Ask implements attestation.Question.
func (question) Ask() []byte { return nil }

// Verify implements attestation.Question.
func (q question) Verify(ctx context.Context, evidence []byte, binder attestation.Binder) ([]attestation.Claims, error) {
	var ev attestv1.TDXEvidence
	if err := wire.Unmarshal(evidence, &ev); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	c, err := q.v.VerifyQuote(ctx, &ev, binder)
	if err != nil {
		return nil, err
	}
	c.EvidenceDigest = sha256.Sum256(evidence)
	return []attestation.Claims{c}, nil
}

func (v *Verifier) roots() ([]Root, error) {
	roots := v.trust().Roots
	if len(roots) == 0 {
		return nil, fmt.Errorf("%w: no root", ErrConfiguration)
	}
	for _, r := range roots {
		if r.Name == "" || r.Certificate == nil {
			return nil, fmt.Errorf("%w: a root without name or certificate", ErrConfiguration)
		}
	}
	return roots, nil
}

// VerifyQuote verifies evidence whose quote must cover reportData, for evidence
// in which a quote is one part: there the report data is not a binder. The
// claims have no EvidenceDigest.
func (v *Verifier) VerifyQuote(ctx context.Context, ev *attestv1.TDXEvidence, reportData [64]byte) (attestation.Claims, error) {
	var none attestation.Claims
	roots, err := v.roots()
	if err != nil {
		return none, err
	}
	if len(ev.GetEventLog()) > maxEventLog {
		return none, fmt.Errorf("%w: %d bytes, at most %d", ErrEventLog, len(ev.GetEventLog()), maxEventLog)
	}
	q, err := Parse(ev.GetQuote())
	if err != nil {
		return none, err
	}
	now := v.now()
	root, p, err := v.vouch(roots, q, now)
	if err != nil {
		return none, err
	}
	e, err := v.endorse(ctx, root.Certificate, p, documents(ev.GetCollateral()), now)
	if err != nil {
		return none, err
	}
	if err := e.checkRevoked(v.memory, root.Certificate, p); err != nil {
		return none, err
	}
	s, err := v.verifySignatures(e, p, q)
	if err != nil {
		return none, err
	}
	if q.ReportData != reportData {
		return none, ErrReportData
	}
	measurements, err := explain(q, ev.GetEventLog())
	if err != nil {
		return none, err
	}
	c := q.Claims()
	c.Measurements = measurements
	c.Identity, c.Trust, c.Until = p.identity(), "root:"+root.Name, e.valid.to
	if c.Until.After(p.leaf.NotAfter) {
		c.Until = p.leaf.NotAfter
	}
	p.addFacts(c.Facts)
	s.addFacts(c.Facts)
	facts.TDXQESVN.Put(c.Facts, uint64(q.qe.svn))
	facts.EventLog.Put(c.Facts, len(ev.GetEventLog()) > 0)
	return c, nil
}

// verifySignatures goes from the platform's certificate to the TD: the quoting
// enclave, its attestation key, the quote; and then to what Intel says of them.
func (v *Verifier) verifySignatures(e *endorsed, p *pck, q *Quote) (*standing, error) {
	key, err := v.attestationKey(p, q)
	if err != nil {
		return nil, err
	}
	qe, err := qeLevel(&e.qe, q.qe)
	if err != nil {
		return nil, err
	}
	if !verifyRaw(key, q.signed, q.signature) {
		return nil, ErrSignature
	}
	return assess(e, p, q, qe)
}

// vouch verifies the PCK chain against each root by itself, so that the result
// names the root that vouched.
func (v *Verifier) vouch(roots []Root, q *Quote, now time.Time) (Root, *pck, error) {
	for _, r := range roots {
		if p, ok := v.chains.get(keyOf(r.Certificate.Raw, q.chain), now); ok {
			return r, p, nil
		}
	}
	p, err := parsePCK(q.chain)
	if err != nil {
		return Root{}, nil, err
	}
	var refused error
	for _, r := range roots {
		err := p.verify(r.Certificate, now)
		if err == nil {
			valid := forever()
			for _, c := range []*x509.Certificate{p.leaf, p.issuer, r.Certificate} {
				valid.narrow(c.NotBefore, c.NotAfter)
			}
			v.chains.add(keyOf(r.Certificate.Raw, q.chain), p, valid)
			return r, p, nil
		}
		// A chain that is right but for the date says more than a wrong one.
		if refused == nil || errors.Is(err, ErrExpired) {
			refused = err
		}
	}
	return Root{}, nil, refused
}

// endorse finds collateral, carried or else from the source, and verifies it.
func (v *Verifier) endorse(ctx context.Context, root *x509.Certificate, p *pck, docs []endorsement.Document, now time.Time) (*endorsed, error) {
	var refused error
	for i, d := range docs {
		if len(d.Body) == 0 {
			refused = fmt.Errorf("%w: the evidence carries no %s", ErrEndorsementMissing, docNames[i])
			break
		}
	}
	if refused == nil {
		e, err := v.verifyDocuments(root, p, docs, now)
		if err == nil {
			return v.newest(root, p, docs, e, now)
		}
		if !errors.Is(err, ErrCollateralExpired) {
			return nil, err
		}
		refused = err
	}
	if v.source == nil {
		return nil, refused
	}
	docs, err := complete(ctx, v.source, root, p, docs, now)
	if err != nil {
		return nil, fmt.Errorf("%w, and Intel's service was asked in vain: %w", refused, err)
	}
	e, err := v.verifyDocuments(root, p, docs, now)
	if err != nil {
		return nil, err
	}
	return v.newest(root, p, docs, e, now)
}

func (v *Verifier) verifyDocuments(root *x509.Certificate, p *pck, docs []endorsement.Document, now time.Time) (*endorsed, error) {
	parts := [][]byte{root.Raw, p.issuer.Raw}
	for _, d := range docs {
		parts = append(parts, d.Body, d.Chain)
	}
	key := keyOf(parts...)
	if e, ok := v.collateral.get(key, now); ok {
		return e, nil
	}
	e, err := verifyCollateral(v.memory, root, p, docs, now)
	if err == nil {
		v.collateral.add(key, e, e.valid)
	}
	return e, err
}

// newest takes the TCB levels with the highest evaluation number that were seen for this
// platform in place of older ones that came along, as long as those it takes are valid.
// Intel publishes two numbers beside each other for months: what is valid longer than
// the higher one was issued after it, and takes nothing back.
func (v *Verifier) newest(root *x509.Certificate, p *pck, docs []endorsement.Document, e *endorsed, now time.Time) (*endorsed, error) {
	better, all := slices.Clone(docs), true
	for doc, number := range map[int]int{docTCBInfo: e.tcb.TcbEvaluationDataNumber, docQEIdentity: e.qe.TcbEvaluationDataNumber} {
		name := fmt.Sprintf("%s-%x", p.requests(nil)[doc].Name, sha256.Sum256(root.RawSubjectPublicKeyInfo))
		d, same := v.memory.Newest(name[:min(len(name), 60)], uint64(number), docs[doc])
		better[doc], all = d, all && same
	}
	if all {
		return e, nil
	}
	newer, err := v.verifyDocuments(root, p, better, now)
	if errors.Is(err, ErrCollateralExpired) {
		return e, nil
	}
	return newer, err
}

// attestationKey returns the key that signs quotes, which a report of the quoting
// enclave covers, which the PCK signs.
func (v *Verifier) attestationKey(p *pck, q *Quote) (*ecdsa.PublicKey, error) {
	id := keyOf(p.leaf.RawSubjectPublicKeyInfo, q.qe.raw, q.qeSignature, q.qeAuthData, q.attestationKey)
	if key, ok := v.enclaves.get(id, time.Time{}); ok {
		return key, nil
	}
	if !verifyRaw(p.key, q.qe.raw, q.qeSignature) {
		return nil, fmt.Errorf("%w: its report is not signed by the PCK", ErrQE)
	}
	h := sha256.New()
	h.Write(q.attestationKey)
	h.Write(q.qeAuthData)
	if want := h.Sum(nil); !bytes.Equal(q.qe.reportData[:32], want) || !zero(q.qe.reportData[32:]) {
		return nil, fmt.Errorf("%w: its report does not cover the attestation key", ErrQE)
	}
	key, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), append([]byte{4}, q.attestationKey...))
	if err != nil {
		return nil, fmt.Errorf("%w: attestation key: %w", ErrMalformed, err)
	}
	v.enclaves.add(id, key, forever())
	return key, nil
}
