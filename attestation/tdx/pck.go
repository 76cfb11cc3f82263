package tdx

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"encoding/asn1"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"time"

	"github.com/google/go-tdx-guest/pcs"

	"github.com/keyagent/keyagent/attestation/facts"
)

// Names that Intel's certificates have (Intel SGX PCK Certificate and CRL Profile
// Specification).
const (
	pckName       = "Intel SGX PCK Certificate"
	platformName  = "Intel SGX PCK Platform CA"
	processorName = "Intel SGX PCK Processor CA"
	signingName   = "Intel SGX TCB Signing"
)

// Extensions below pcs.OidSgxExtension that package pcs leaves out.
var (
	oidPIID          = asn1.ObjectIdentifier{1, 2, 840, 113741, 1, 13, 1, 6}
	oidConfiguration = asn1.ObjectIdentifier{1, 2, 840, 113741, 1, 13, 1, 7}
	oidDynamic       = asn1.ObjectIdentifier{1, 2, 840, 113741, 1, 13, 1, 7, 1}
	oidCachedKeys    = asn1.ObjectIdentifier{1, 2, 840, 113741, 1, 13, 1, 7, 2}
	oidSMT           = asn1.ObjectIdentifier{1, 2, 840, 113741, 1, 13, 1, 7, 3}
)

// pck is a PCK certificate with its chain, parsed.
type pck struct {
	leaf, issuer *x509.Certificate
	key          *ecdsa.PublicKey
	ca           string // "platform" or "processor"
	pcs.PckExtensions
	piid string
	// configuration has what the certificate says: "dynamic_platform",
	// "cached_keys", "smt_enabled".
	configuration map[facts.Fact[bool]]bool
}

// parsePCK reads the chain of a quote: leaf, CA, root. The root is not used: it
// came from the peer.
func parsePCK(chain []byte) (*pck, error) {
	certs, err := parsePEM("PCK chain", chain)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	if len(certs) != 3 {
		return nil, fmt.Errorf("%w: PCK chain of %d certificates, not 3", ErrMalformed, len(certs))
	}
	p := &pck{leaf: certs[0], issuer: certs[1]}
	switch p.issuer.Subject.CommonName {
	case platformName:
		p.ca = "platform"
	case processorName:
		p.ca = "processor"
	default:
		return nil, fmt.Errorf("%w: it is issued by %q", ErrUntrusted, p.issuer.Subject.CommonName)
	}
	if p.leaf.Subject.CommonName != pckName || p.leaf.IsCA {
		return nil, fmt.Errorf("%w: %q is not a PCK certificate", ErrUntrusted, p.leaf.Subject.CommonName)
	}
	if _, err := p256Key(p.issuer); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	if p.key, err = p256Key(p.leaf); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	return p, p.parseExtensions()
}

func (p *pck) parseExtensions() error {
	ext, err := pcs.PckCertificateExtensions(p.leaf)
	if err != nil {
		return fmt.Errorf("%w: PCK certificate: %w", ErrMalformed, err)
	}
	p.PckExtensions = *ext
	// What package pcs does not find it leaves empty.
	if ext.FMSPC == "" || ext.PCEID == "" || ext.PPID == "" || len(ext.TCB.CPUSvn) == 0 || len(ext.TCB.CPUSvnComponents) != 16 {
		return fmt.Errorf("%w: PCK certificate lacks an SGX extension", ErrMalformed)
	}
	return p.parseOptional()
}

// sgxExtension is one entry of the sequence in the SGX extension.
type sgxExtension struct {
	ID    asn1.ObjectIdentifier
	Value asn1.RawValue
}

// parseOptional reads what certificates of the platform CA have besides.
func (p *pck) parseOptional() error {
	for _, ext := range p.leaf.Extensions {
		if !ext.Id.Equal(pcs.OidSgxExtension) {
			continue
		}
		var entries []sgxExtension
		if rest, err := asn1.Unmarshal(ext.Value, &entries); err != nil || len(rest) > 0 {
			return fmt.Errorf("%w: PCK certificate: SGX extension", ErrMalformed)
		}
		for _, e := range entries {
			switch {
			case e.ID.Equal(oidPIID):
				if len(e.Value.Bytes) != 16 {
					return fmt.Errorf("%w: PCK certificate: platform instance ID of %d bytes", ErrMalformed, len(e.Value.Bytes))
				}
				p.piid = hex.EncodeToString(e.Value.Bytes)
			case e.ID.Equal(oidConfiguration):
				if err := p.parseConfiguration(e.Value.FullBytes); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

func (p *pck) parseConfiguration(der []byte) error {
	var flags []struct {
		ID  asn1.ObjectIdentifier
		Set bool
	}
	if rest, err := asn1.Unmarshal(der, &flags); err != nil || len(rest) > 0 {
		return fmt.Errorf("%w: PCK certificate: configuration", ErrMalformed)
	}
	p.configuration = map[facts.Fact[bool]]bool{}
	for _, f := range flags {
		switch {
		case f.ID.Equal(oidDynamic):
			p.configuration[facts.TDXDynamicPlatform] = f.Set
		case f.ID.Equal(oidCachedKeys):
			p.configuration[facts.TDXCachedKeys] = f.Set
		case f.ID.Equal(oidSMT):
			p.configuration[facts.TDXSMTEnabled] = f.Set
		}
	}
	return nil
}

// identity is stable for one machine. Sockets of one platform share the instance
// ID; certificates of the processor CA have none.
func (p *pck) identity() string {
	if p.piid != "" {
		return p.piid
	}
	return p.PPID
}

// verify demands leaf, CA, root and nothing else, all of them P-256 with SHA-256
// and valid at now.
func (p *pck) verify(root *x509.Certificate, now time.Time) error {
	for _, c := range []*x509.Certificate{p.leaf, p.issuer} {
		if c.SignatureAlgorithm != x509.ECDSAWithSHA256 {
			return fmt.Errorf("%w: %q is signed with %s", ErrUntrusted, c.Subject.CommonName, c.SignatureAlgorithm)
		}
	}
	intermediates, roots := x509.NewCertPool(), x509.NewCertPool()
	intermediates.AddCert(p.issuer)
	roots.AddCert(root)
	chains, err := p.leaf.Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: intermediates, CurrentTime: now,
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	})
	var invalid x509.CertificateInvalidError
	if errors.As(err, &invalid) && invalid.Reason == x509.Expired {
		return expired(invalid.Cert, now)
	}
	if err != nil || len(chains) != 1 || len(chains[0]) != 3 {
		return fmt.Errorf("%w: it is issued by %q", ErrUntrusted, p.leaf.Issuer)
	}
	return nil
}

func expired(c *x509.Certificate, now time.Time) error {
	return fmt.Errorf("%w: %q is valid from %s to %s, this machine's clock says %s", ErrExpired, c.Subject.CommonName,
		c.NotBefore.Format(time.RFC3339), c.NotAfter.Format(time.RFC3339), now.Format(time.RFC3339))
}

// parsePEM reads certificates with nothing between them; newlines and NULs may
// follow, as Intel's own tools leave them.
func parsePEM(what string, data []byte) ([]*x509.Certificate, error) {
	if len(data) > maxChain {
		return nil, fmt.Errorf("%s of %d bytes", what, len(data))
	}
	var certs []*x509.Certificate
	for rest := bytes.TrimRight(data, "\x00\r\n"); len(rest) > 0; {
		if !bytes.HasPrefix(rest, []byte("-----BEGIN CERTIFICATE-----")) {
			return nil, fmt.Errorf("%s: something that is no certificate", what)
		}
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil || block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("%s: something that is no certificate", what)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", what, err)
		}
		certs = append(certs, c)
		rest = bytes.TrimLeft(rest, "\r\n")
	}
	return certs, nil
}

func p256Key(c *x509.Certificate) (*ecdsa.PublicKey, error) {
	key, ok := c.PublicKey.(*ecdsa.PublicKey)
	if !ok || key.Curve != elliptic.P256() {
		return nil, fmt.Errorf("%q has no key on P-256", c.Subject.CommonName)
	}
	return key, nil
}
