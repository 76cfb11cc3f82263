package tpm

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/keyagent/keyagent/attestation/certificate"
	"github.com/keyagent/keyagent/attestation/facts"
)

// hardware is a TPM that somebody vouches for.
type hardware struct {
	identity string    // digest of its EK, or of its AK if that is what is certified
	trust    string    // "root:NAME", "enrolled:NAME" or "ak-root:NAME"
	until    time.Time // of the chain; zero if an operator vouches
	facts    map[string]any
}

// tcg-kp-EKCertificate, EK Credential Profile section 3.2.16.
var oidEKCertificate = asn1.ObjectIdentifier{2, 23, 133, 8, 1}

var oidSubjectAltName = asn1.ObjectIdentifier{2, 5, 29, 17}

// vouch decides who stands behind the endorsement key: the operator, or a chain
// to a configured root.
func (v *Verifier) vouch(trust Trust, o offer) (hardware, error) {
	hw, err := nameEK(o)
	if err != nil {
		return hardware{}, err
	}
	for _, e := range trust.Enrolled {
		if e.EKDigest == hw.identity {
			hw.trust = "enrolled:" + e.Name
			return hw, nil
		}
	}
	if len(o.certificate) == 0 {
		return hardware{}, fmt.Errorf("%w: it has no certificate and %s is not enrolled", ErrEKUntrusted, hw.identity)
	}
	leaf, err := parseEKCertificate(o.certificate)
	if err != nil {
		return hardware{}, err
	}
	if !samePublicKey(*o.ek, leaf) {
		return hardware{}, fmt.Errorf("%w: its certificate is another key's", ErrEKCertificate)
	}
	root, until, err := v.chain(trust.Roots, leaf, o.intermediates, ekChainErrors)
	if err != nil {
		return hardware{}, err
	}
	hw.trust, hw.until = "root:"+root, until
	facts.TPMEKIssuer.Put(hw.facts, leaf.Issuer.String())
	return hw, nil
}

// nameEK checks what an EK must be, no matter who vouches for it.
func nameEK(o offer) (hardware, error) {
	a := o.ek.ObjectAttributes
	if !a.FixedTPM || !a.FixedParent || !a.Restricted || !a.Decrypt || a.SignEncrypt {
		return hardware{}, fmt.Errorf("%w: it is not a restricted decryption key fixed to its TPM", ErrEKCertificate)
	}
	key, err := tpm2.Pub(*o.ek)
	if err != nil {
		return hardware{}, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	digest, err := EKDigest(key)
	if err != nil {
		return hardware{}, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	hw := hardware{identity: digest, facts: map[string]any{}}
	facts.TPMEK.Put(hw.facts, digest)
	facts.TPMEKIssuer.Put(hw.facts, "")
	return hw, nil
}

// parseEKCertificate parses a leaf and handles what crypto/x509 leaves to its
// caller: EK certificates have an empty subject and therefore a critical
// subject alternative name with a directory name (maker, model, version).
func parseEKCertificate(der []byte) (*x509.Certificate, error) {
	if len(der) > maxCertificate {
		return nil, fmt.Errorf("%w: certificate of %d bytes", ErrMalformed, len(der))
	}
	leaf, err := certificate.Parse(der)
	if err != nil {
		return nil, fmt.Errorf("%w: certificate: %w", ErrMalformed, err)
	}
	leaf.UnhandledCriticalExtensions = slices.DeleteFunc(leaf.UnhandledCriticalExtensions,
		func(oid asn1.ObjectIdentifier) bool {
			return oid.Equal(oidSubjectAltName) && hasDirectoryName(leaf)
		})
	if len(leaf.UnhandledCriticalExtensions) > 0 {
		return nil, fmt.Errorf("%w: unknown critical extension %v", ErrEKCertificate, leaf.UnhandledCriticalExtensions[0])
	}
	if leaf.IsCA {
		return nil, fmt.Errorf("%w: it is a certificate authority's", ErrEKCertificate)
	}
	if len(leaf.UnknownExtKeyUsage)+len(leaf.ExtKeyUsage) > 0 &&
		!slices.ContainsFunc(leaf.UnknownExtKeyUsage, oidEKCertificate.Equal) {
		return nil, fmt.Errorf("%w: its extended key usage is not tcg-kp-EKCertificate", ErrEKCertificate)
	}
	return leaf, nil
}

// hasDirectoryName reports whether the subject alternative name consists of
// directory names, which is all that an EK certificate may hold there besides
// other names. Its content identifies the model and is not decided upon.
func hasDirectoryName(c *x509.Certificate) bool {
	for _, ext := range c.Extensions {
		if !ext.Id.Equal(oidSubjectAltName) {
			continue
		}
		var names []asn1.RawValue
		rest, err := asn1.Unmarshal(ext.Value, &names)
		if err != nil || len(rest) > 0 {
			return false
		}
		return slices.ContainsFunc(names, func(n asn1.RawValue) bool {
			return n.Class == asn1.ClassContextSpecific && n.Tag == 4
		})
	}
	return false
}

// chain verifies leaf against each root by itself, so that the result names the
// root that vouched, and until when the whole chain is valid.
func (v *Verifier) chain(roots []Root, leaf *x509.Certificate, intermediates [][]byte, errs chainErrors) (name string, until time.Time, err error) {
	carried := x509.NewCertPool()
	var known []*x509.Certificate
	if len(intermediates) > maxIntermediates {
		return "", until, fmt.Errorf("%w: %d intermediate certificates", ErrMalformed, len(intermediates))
	}
	for _, der := range intermediates {
		if len(der) > maxCertificate {
			return "", until, fmt.Errorf("%w: intermediate certificate of %d bytes", ErrMalformed, len(der))
		}
		c, err := certificate.Parse(der)
		if err != nil {
			return "", until, fmt.Errorf("%w: intermediate certificate: %w", ErrMalformed, err)
		}
		if err := checkCarried(c); err != nil {
			return "", until, err
		}
		carried.AddCert(c)
		known = append(known, c)
	}
	now := v.now()
	var reason error
	for _, root := range roots {
		key := chainKey(root, leaf, intermediates)
		if until, ok := v.chains.holds(key, now); ok {
			return root.Name, until, nil
		}
		one, pool := x509.NewCertPool(), carried.Clone()
		one.AddCert(root.Certificate)
		known = append(known, root.Intermediates...)
		for _, c := range root.Intermediates {
			pool.AddCert(c)
		}
		chains, err := leaf.Verify(x509.VerifyOptions{
			Roots: one, Intermediates: pool, CurrentTime: now,
			KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
		})
		if err == nil {
			if err := root.revokes(chains[0], errs.revoked); err != nil {
				reason = err
				continue
			}
			return root.Name, v.chains.add(key, chains[0]), nil
		}
		var invalid x509.CertificateInvalidError
		if errors.As(err, &invalid) && invalid.Reason == x509.Expired {
			reason = fmt.Errorf("%w: valid from %s to %s, this machine's clock says %s", errs.expired,
				invalid.Cert.NotBefore.Format(time.RFC3339), invalid.Cert.NotAfter.Format(time.RFC3339), now.Format(time.RFC3339))
		}
	}
	if reason != nil {
		return "", until, reason
	}
	return "", until, fmt.Errorf("%w: its certificate does not chain to a configured root: %s", errs.untrusted, missing(leaf, known))
}

// chainErrors are what is said of a certificate that no root vouches for: an EK's and
// an AK's have errors of their own.
type chainErrors struct{ untrusted, expired, revoked error }

var (
	ekChainErrors = chainErrors{ErrEKUntrusted, ErrEKExpired, ErrEKRevoked}
	akChainErrors = chainErrors{ErrAKUntrusted, ErrAKExpired, ErrAKRevoked}
)

// missing names the certificate that would lead on towards a root, and where its issuer
// says that it is to be had. Nothing is ever fetched from there.
func missing(leaf *x509.Certificate, known []*x509.Certificate) string {
	last := leaf
	if chain := chainFrom(leaf, known); len(chain) > 0 {
		if c, err := certificate.Parse(chain[len(chain)-1]); err == nil {
			last = c
		}
	}
	text := fmt.Sprintf("the issuer %q", shown(last.Issuer))
	if len(last.AuthorityKeyId) > 0 {
		text += fmt.Sprintf(" with the key ID %s", cut(hex.EncodeToString(last.AuthorityKeyId)))
	}
	text += " is neither a root nor an intermediate that is known"
	if len(last.IssuingCertificateURL) > 0 {
		text += fmt.Sprintf("; the certificate says that it is at %q", cut(last.IssuingCertificateURL[0]))
	}
	return text + " (hint: put it into the policy beside its root, or into the node's tpm.ek_intermediates or tpm.ak_intermediates)"
}

// cut bounds what a stranger writes into messages.
func cut(text string) string { return text[:min(len(text), 200)] }

// revokes says which certificate of a chain a list of the root's has. A list counts for
// what its issuer's key signed, however old it is: what was taken back stays so.
func (r Root) revokes(chain []*x509.Certificate, refusal error) error {
	for _, list := range r.CRLs {
		for i, c := range chain[:len(chain)-1] {
			if !bytes.Equal(list.RawIssuer, c.RawIssuer) || list.CheckSignatureFrom(chain[i+1]) != nil {
				continue
			}
			for _, entry := range list.RevokedCertificateEntries {
				if entry.SerialNumber.Cmp(c.SerialNumber) == 0 {
					return fmt.Errorf("%w: %q, serial number %s, since %s", refusal, shown(c.Subject), c.SerialNumber, entry.RevocationTime.Format(time.RFC3339))
				}
			}
		}
	}
	return nil
}

// chainCache remembers chains that verified, since a machine comes back with
// the same one for years. What it remembers holds for exactly these bytes, and
// only while every certificate in the chain is valid.
type chainCache struct {
	mu    sync.Mutex
	known map[[sha256.Size]byte]validity
}

type validity struct{ from, to time.Time }

// maxChains bounds the cache; a full one is emptied.
const maxChains = 4096

func chainKey(root Root, leaf *x509.Certificate, intermediates [][]byte) (key [sha256.Size]byte) {
	h := sha256.New()
	parts := [][]byte{root.Certificate.Raw, leaf.Raw, {byte(len(root.CRLs))}}
	for _, list := range root.CRLs {
		parts = append(parts, list.Raw)
	}
	for _, der := range append(parts, intermediates...) {
		h.Write(binary.BigEndian.AppendUint32(nil, uint32(len(der))))
		h.Write(der)
	}
	h.Sum(key[:0])
	return key
}

func (c *chainCache) holds(key [sha256.Size]byte, now time.Time) (until time.Time, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	v, ok := c.known[key]
	return v.to, ok && !now.Before(v.from) && !now.After(v.to)
}

func (c *chainCache) add(key [sha256.Size]byte, chain []*x509.Certificate) (until time.Time) {
	v := validity{chain[0].NotBefore, chain[0].NotAfter}
	for _, cert := range chain[1:] {
		if cert.NotBefore.After(v.from) {
			v.from = cert.NotBefore
		}
		if cert.NotAfter.Before(v.to) {
			v.to = cert.NotAfter
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.known == nil || len(c.known) >= maxChains {
		c.known = map[[sha256.Size]byte]validity{}
	}
	c.known[key] = v
	return v.to
}
