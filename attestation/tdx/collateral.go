package tdx

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math/big"
	"time"

	"github.com/google/go-tdx-guest/pcs"

	"github.com/keyagent/keyagent/attestation/endorsement"
)

const (
	tcbInfoPart    = "tcbInfo"
	qeIdentityPart = "enclaveIdentity"
)

// endorsed is collateral whose signatures, dates and form were verified, for one
// root and one PCK CA.
type endorsed struct {
	tcb     pcs.TcbInfo
	qe      pcs.EnclaveIdentity
	signers []*x509.Certificate // of TCB info and QE identity
	valid   validity
}

// verifyCollateral checks everything that does not depend on the quote.
func verifyCollateral(memory *endorsement.Memory, root *x509.Certificate, p *pck, docs []endorsement.Document, now time.Time) (*endorsed, error) {
	e := &endorsed{valid: forever()}
	for i, part := range []string{docTCBInfo: tcbInfoPart, docQEIdentity: qeIdentityPart} {
		signed, err := e.verifyJSON(root, docNames[i], part, docs[i], now)
		if err != nil {
			return nil, err
		}
		into := any(&e.tcb)
		if i == docQEIdentity {
			into = &e.qe
		}
		if err := json.Unmarshal(signed, into); err != nil {
			return nil, fmt.Errorf("%w: %s: %w", ErrCollateral, docNames[i], err)
		}
	}
	if err := e.checkForm(); err != nil {
		return nil, err
	}
	for _, d := range []struct {
		name     string
		from, to time.Time
	}{{"TCB info", e.tcb.IssueDate, e.tcb.NextUpdate}, {"QE identity", e.qe.IssueDate, e.qe.NextUpdate}} {
		if err := e.during(d.name, d.from, d.to, now); err != nil {
			return nil, err
		}
	}
	if err := e.verifyCRL(memory, docNames[docRootCRL], docs[docRootCRL].Body, root, now); err != nil {
		return nil, err
	}
	return e, e.verifyCRL(memory, docNames[docPCKCRL], docs[docPCKCRL].Body, p.issuer, now)
}

// checkRevoked looks up every certificate that was used, in all lists that were seen.
func (e *endorsed) checkRevoked(memory *endorsement.Memory, root *x509.Certificate, p *pck) error {
	check := func(by, c *x509.Certificate) error {
		if since, ok := memory.Revoked(by, c.SerialNumber); ok {
			return fmt.Errorf("%w: certificate %q with serial number %x, on %s", ErrRevoked, c.Subject.CommonName, c.SerialNumber, since.Format(time.DateOnly))
		}
		return nil
	}
	for _, c := range append([]*x509.Certificate{p.issuer}, e.signers...) {
		if err := check(root, c); err != nil {
			return err
		}
	}
	return check(p.issuer, p.leaf)
}

// verifyJSON returns the part of the document that its signature covers, as it
// was sent: Intel signs the bytes between the braces, whatever their order.
func (e *endorsed) verifyJSON(root *x509.Certificate, name, part string, d endorsement.Document, now time.Time) ([]byte, error) {
	if len(d.Body) > maxJSON {
		return nil, fmt.Errorf("%w: %s of %d bytes", ErrCollateral, name, len(d.Body))
	}
	signer, err := e.signer(root, name, d.Chain, now)
	if err != nil {
		return nil, err
	}
	var body map[string]json.RawMessage
	var signature string
	if err := json.Unmarshal(d.Body, &body); err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrCollateral, name, err)
	}
	if err := json.Unmarshal(body["signature"], &signature); err != nil {
		return nil, fmt.Errorf("%w: %s: signature: %w", ErrCollateral, name, err)
	}
	raw, err := hex.DecodeString(signature)
	if err != nil || !verifyRaw(signer, body[part], raw) {
		return nil, fmt.Errorf("%w: %s: its signature does not verify", ErrCollateral, name)
	}
	return body[part], nil
}

// signer returns the key of the TCB signing certificate, which the root signs
// itself. The root in the chain is not used.
func (e *endorsed) signer(root *x509.Certificate, name string, chain []byte, now time.Time) (*ecdsa.PublicKey, error) {
	certs, err := parsePEM(name+"'s issuer chain", chain)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrCollateral, err)
	}
	if len(certs) != 2 {
		return nil, fmt.Errorf("%w: %s's issuer chain has %d certificates, not 2", ErrCollateral, name, len(certs))
	}
	c := certs[0]
	if c.Subject.CommonName != signingName || c.IsCA || c.SignatureAlgorithm != x509.ECDSAWithSHA256 {
		return nil, fmt.Errorf("%w: %s is signed by %q", ErrCollateral, name, c.Subject.CommonName)
	}
	if !bytes.Equal(c.RawIssuer, root.RawSubject) || len(c.UnhandledCriticalExtensions) > 0 || c.CheckSignatureFrom(root) != nil {
		return nil, fmt.Errorf("%w: %s's signer was not issued by the root of the PCK certificate", ErrCollateral, name)
	}
	for _, c := range []*x509.Certificate{c, root} {
		if now.Before(c.NotBefore) || now.After(c.NotAfter) {
			return nil, expired(c, now)
		}
		e.valid.narrow(c.NotBefore, c.NotAfter)
	}
	e.signers = append(e.signers, c)
	key, err := p256Key(c)
	if err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrCollateral, name, err)
	}
	return key, nil
}

// checkForm demands what the rest relies on.
func (e *endorsed) checkForm() error {
	t, q := &e.tcb, &e.qe
	for _, c := range []struct {
		ok   bool
		what string
	}{
		{t.ID == "TDX" && t.Version == 3 && t.TcbType == 0, fmt.Sprintf("TCB info is %q version %d, type %d", t.ID, t.Version, t.TcbType)},
		{q.ID == "TD_QE" && q.Version == 2, fmt.Sprintf("QE identity is %q version %d", q.ID, q.Version)},
		{t.TcbEvaluationDataNumber >= 0 && q.TcbEvaluationDataNumber >= 0, "negative evaluation number"},
		{len(t.TcbLevels) > 0, "TCB info without levels"},
		{len(q.TcbLevels) > 0, "QE identity without levels"},
		{len(q.Miscselect.Bytes) == 4 && len(q.MiscselectMask.Bytes) == 4, "QE identity: miscselect"},
		{len(q.Attributes.Bytes) == 16 && len(q.AttributesMask.Bytes) == 16, "QE identity: attributes"},
		{len(q.Mrsigner.Bytes) == 32, "QE identity: mrsigner"},
	} {
		if !c.ok {
			return fmt.Errorf("%w: %s", ErrCollateral, c.what)
		}
	}
	for i, l := range t.TcbLevels {
		if len(l.Tcb.SgxTcbcomponents) != 16 || len(l.Tcb.TdxTcbcomponents) != 16 || l.TcbStatus == "" {
			return fmt.Errorf("%w: TCB info: level %d is incomplete", ErrCollateral, i)
		}
	}
	others := q.TcbLevels
	for _, m := range t.TdxModuleIdentities {
		others = append(others[:len(others):len(others)], m.TcbLevels...)
	}
	for _, l := range others {
		if l.TcbStatus == "" {
			return fmt.Errorf("%w: a level of the TDX module or of the quoting enclave has no status", ErrCollateral)
		}
	}
	return nil
}

// during demands that now lies between two dates.
func (e *endorsed) during(name string, from, to, now time.Time) error {
	if from.IsZero() || to.IsZero() || now.Before(from) || now.After(to) {
		return fmt.Errorf("%w: %s is valid from %s until %s, this machine's clock says %s", ErrCollateralExpired, name,
			from.Format(time.RFC3339), to.Format(time.RFC3339), now.Format(time.RFC3339))
	}
	e.valid.narrow(from, to)
	return nil
}

// verifyCRL verifies a list and remembers what is on it.
func (e *endorsed) verifyCRL(memory *endorsement.Memory, name string, der []byte, issuer *x509.Certificate, now time.Time) error {
	if len(der) > maxCRL {
		return fmt.Errorf("%w: %s of %d bytes", ErrCRL, name, len(der))
	}
	crl, err := x509.ParseRevocationList(der)
	if err != nil {
		return fmt.Errorf("%w: %s: %w", ErrCRL, name, err)
	}
	if !bytes.Equal(crl.RawIssuer, issuer.RawSubject) || crl.CheckSignatureFrom(issuer) != nil {
		return fmt.Errorf("%w: %s is not signed by %q", ErrCRL, name, issuer.Subject.CommonName)
	}
	for _, ext := range crl.Extensions {
		// Such a list would be a part of another, or be about something else.
		if ext.Critical {
			return fmt.Errorf("%w: %s: unknown critical extension %v", ErrCRL, name, ext.Id)
		}
	}
	memory.Remember(issuer, crl)
	return e.during(name, crl.ThisUpdate, crl.NextUpdate, now)
}

// verifyRaw checks a signature of two 32-byte numbers over SHA-256.
func verifyRaw(key *ecdsa.PublicKey, message, signature []byte) bool {
	if len(signature) != signatureSize || len(message) == 0 {
		return false
	}
	digest := sha256.Sum256(message)
	return ecdsa.Verify(key, digest[:], new(big.Int).SetBytes(signature[:32]), new(big.Int).SetBytes(signature[32:]))
}
