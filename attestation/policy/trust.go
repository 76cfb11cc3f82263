package policy

import (
	"bytes"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/keyagent/keyagent/attestation/certificate"
)

// TrustFile names who vouches for hardware.
type TrustFile struct {
	TPM   TPMTrust   `yaml:"tpm,omitempty"`
	SNP   RootsTrust `yaml:"snp,omitempty"`
	TDX   RootsTrust `yaml:"tdx,omitempty"`
	Nitro RootsTrust `yaml:"nitro,omitempty"`
	Azure AzureTrust `yaml:"azure,omitempty"`
}

// TPMTrust names who vouches for TPMs.
type TPMTrust struct {
	Roots    []Root     `yaml:"roots,omitempty"`
	Enrolled []Enrolled `yaml:"enrolled,omitempty"`
	AKRoots  []Root     `yaml:"ak_roots,omitempty"` // of attestation keys that a cloud certified
}

// RootsTrust names the authorities of one kind of hardware.
type RootsTrust struct {
	Roots []Root `yaml:"roots,omitempty"`
}

// AzureTrust names a Microsoft Attestation service. Only profiles with
// "token: required" look at its tokens.
type AzureTrust struct {
	Issuer string `yaml:"issuer,omitempty"` // https URL of the service
	JWKS   string `yaml:"jwks,omitempty"`   // file with its signing keys

	jwks []byte
}

// KeySet returns the signing keys of a loaded policy, as JSON.
func (a AzureTrust) KeySet() []byte { return a.jwks }

// Root is a certificate authority: one that this program knows by its name, or
// one in PEM.
type Root struct {
	Name    string `yaml:"name"`
	Builtin string `yaml:"builtin,omitempty"`
	File    string `yaml:"file,omitempty"` // PEM, relative to the policy's folder
	PEM     string `yaml:"pem,omitempty"`
	// Product of an SNP authority: Milan, Genoa or Turin.
	Product string `yaml:"product,omitempty"`
	// CRLs are files with revocation lists of a TPM's authorities, in PEM or DER.
	CRLs []string `yaml:"crls,omitempty"`

	certificates []*x509.Certificate
	crls         []*x509.RevocationList
}

// Certificate returns the root of a loaded policy: the one certificate that it
// names, or the self-signed one of several. It is nil for a built-in root.
func (r Root) Certificate() *x509.Certificate {
	for _, c := range r.certificates {
		if len(r.certificates) == 1 || selfSigned(c) {
			return c
		}
	}
	return nil
}

func selfSigned(c *x509.Certificate) bool { return bytes.Equal(c.RawIssuer, c.RawSubject) }

// Certificates returns all of them: an SNP authority has up to three, and that of a TPM
// may have its intermediates beside it.
func (r Root) Certificates() []*x509.Certificate { return r.certificates }

// RevocationLists returns those of a loaded policy.
func (r Root) RevocationLists() []*x509.RevocationList { return r.crls }

// Enrolled is a TPM that the operator vouches for.
type Enrolled struct {
	Name string `yaml:"name"`
	EK   string `yaml:"ek"` // hex SHA-256 of the key's PKIX DER
}

// raw returns what files and PEM in the section say, in a fixed order.
func (t *TrustFile) raw() [][]byte {
	var out [][]byte
	for _, roots := range [][]Root{t.TPM.Roots, t.TPM.AKRoots, t.SNP.Roots, t.TDX.Roots, t.Nitro.Roots} {
		for _, r := range roots {
			for _, c := range r.certificates {
				out = append(out, c.Raw)
			}
			for _, l := range r.crls {
				out = append(out, l.Raw)
			}
		}
	}
	return append(out, t.Azure.jwks)
}

// products of AMD that have SNP and a public authority.
var products = []string{"Milan", "Genoa", "Turin"}

// Products returns the product lines of AMD that a policy can name.
func Products() []string { return slices.Clone(products) }

func (c *checker) trust() {
	t := &c.file.Trust
	vouchers := len(t.TPM.Roots) + len(t.TPM.Enrolled) + len(t.TPM.AKRoots) + len(t.SNP.Roots) + len(t.TDX.Roots) + len(t.Nitro.Roots)
	c.demand(vouchers > 0, "no root and no enrolled TPM: nobody vouches for any hardware", "trust")
	c.roots(t.TPM.Roots, "", maxTPMCertificates, "trust", "tpm", "roots")
	c.roots(t.TPM.AKRoots, "google", maxTPMCertificates, "trust", "tpm", "ak_roots")
	c.roots(t.SNP.Roots, "amd", 3, "trust", "snp", "roots")
	c.roots(t.TDX.Roots, "intel", 1, "trust", "tdx", "roots")
	c.roots(t.Nitro.Roots, "aws", 1, "trust", "nitro", "roots")
	for i, r := range t.SNP.Roots {
		at := []any{"trust", "snp", "roots", i}
		c.demand(r.Builtin != "" || slices.Contains(products, r.Product), "needs product: Milan, Genoa or Turin", at...)
		c.demand(r.Builtin != "" || len(r.certificates) >= 2, "needs an ARK and the ASK or ASVK below it in PEM", at...)
		if r.Builtin == "" && c.err == nil {
			c.amdAuthority(r.certificates, at)
		}
	}
	for i := range t.TPM.AKRoots {
		c.tpmAuthority(&t.TPM.AKRoots[i], path{"trust", "tpm", "ak_roots", i})
		alone := t.TPM.AKRoots[i].certificates
		c.demand(len(alone) != 1 || selfSigned(alone[0]), "needs one self-signed root in PEM; others beside it are intermediates", "trust", "tpm", "ak_roots", i)
	}
	for i := range t.TPM.Roots {
		c.tpmAuthority(&t.TPM.Roots[i], path{"trust", "tpm", "roots", i})
	}
	for kind, roots := range map[string][]Root{"snp": t.SNP.Roots, "tdx": t.TDX.Roots, "nitro": t.Nitro.Roots} {
		for i, r := range roots {
			c.demand(len(r.CRLs) == 0, "is for TPMs: other kinds bring their lists", "trust", kind, "roots", i, "crls")
		}
	}
	seen := map[string]bool{}
	for i, e := range t.TPM.Enrolled {
		at := []any{"trust", "tpm", "enrolled", i}
		c.name(e.Name, seen, append(at, "name")...)
		c.demand(isHex(e.EK, 32), "must be 64 lower-case hex digits (hint: keyagent evidence prints it)", append(at, "ek")...)
	}
	c.azureTrust(&t.Azure)
}

// maxTPMCertificates of one authority: a maker of TPMs has had some eighty issuing ones
// below one root.
const maxTPMCertificates = 256

// tpmAuthority demands one root among several certificates, and reads the revocation
// lists.
func (c *checker) tpmAuthority(r *Root, at path) {
	if len(r.certificates) > 1 {
		roots := 0
		for _, cert := range r.certificates {
			if selfSigned(cert) {
				roots++
			}
		}
		c.demand(roots == 1, fmt.Sprintf("has %d self-signed certificates: it needs one root, and others beside it are intermediates", roots), at...)
	}
	for i, file := range r.CRLs {
		data, err := c.read(file)
		if err == nil {
			if block, _ := pem.Decode(data); block != nil && block.Type == "X509 CRL" {
				data = block.Bytes
			}
			var list *x509.RevocationList
			if list, err = x509.ParseRevocationList(data); err == nil {
				r.crls = append(r.crls, list)
			}
		}
		if err != nil {
			c.fail("%w", []any{err}, at.to("crls", i)...)
		}
	}
}

// amdAuthority demands one root, and of each kind at most one certificate, which
// that root signed.
func (c *checker) amdAuthority(certs []*x509.Certificate, at path) {
	var root *x509.Certificate
	below := map[bool]*x509.Certificate{} // by whether it is for keys of clouds
	for _, cert := range certs {
		if bytes.Equal(cert.RawIssuer, cert.RawSubject) {
			c.demand(root == nil, "needs one ARK, which signs itself, not two", at...)
			root = cert
			continue
		}
		vlek := strings.HasPrefix(cert.Subject.CommonName, "SEV-VLEK-")
		c.demand(below[vlek] == nil, fmt.Sprintf("has %q twice", cert.Subject.CommonName), at...)
		below[vlek] = cert
	}
	c.demand(root != nil, "needs one ARK, which signs itself", at...)
	for _, cert := range below {
		c.demand(c.err != nil || cert.CheckSignatureFrom(root) == nil, fmt.Sprintf("%q is not signed by the ARK beside it", cert.Subject.CommonName), at...)
	}
}

// roots checks and reads authorities. known is the one that may be built in.
func (c *checker) roots(roots []Root, known string, most int, path ...any) {
	seen := map[string]bool{}
	sources := "file or pem"
	if known != "" {
		sources = "builtin, file or pem"
	}
	for i := range roots {
		r := &roots[i]
		at := append(slices.Clone(path), i)
		c.name(r.Name, seen, append(at, "name")...)
		given := 0
		for _, s := range []string{r.Builtin, r.File, r.PEM} {
			if s != "" {
				given++
			}
		}
		c.demand(given == 1, "needs either "+sources, at...)
		c.demand(r.Builtin == "" || r.Builtin == known, fmt.Sprintf("%q is not built in (%s)", r.Builtin, hintOf([]string{known})), append(at, "builtin")...)
		if r.Builtin != "" || c.err != nil {
			continue
		}
		text := []byte(r.PEM)
		var err error
		if r.File != "" {
			if text, err = c.read(r.File); err != nil {
				c.fail("%w", []any{err}, append(at, "file")...)
			}
		}
		if r.certificates, err = certificates(text, most); err != nil {
			c.fail("%w", []any{err}, at...)
		}
	}
}

func (c *checker) azureTrust(a *AzureTrust) {
	if a.Issuer == "" && a.JWKS == "" {
		return
	}
	u, err := url.Parse(a.Issuer)
	c.demand(err == nil && u.Scheme == "https" && u.Host != "", "must be the https URL of an attestation service", "trust", "azure", "issuer")
	c.demand(a.JWKS != "", "needs a file with the service's signing keys", "trust", "azure", "jwks")
	if c.err != nil {
		return
	}
	if a.jwks, err = c.read(a.JWKS); err != nil {
		c.fail("%w", []any{err}, "trust", "azure", "jwks")
	}
	c.demand(json.Valid(a.jwks), "is not JSON", "trust", "azure", "jwks")
}

// read reads a file that the policy names, relative to its folder.
func (c *checker) read(path string) ([]byte, error) {
	if !filepath.IsAbs(path) {
		path = filepath.Join(c.dir, path)
	}
	return os.ReadFile(path)
}

// certificates parses up to most certificates in PEM, and nothing else.
func certificates(text []byte, most int) ([]*x509.Certificate, error) {
	var all []*x509.Certificate
	for {
		var block *pem.Block
		block, text = pem.Decode(text)
		switch {
		case block == nil && len(all) == 0:
			return nil, fmt.Errorf("holds no certificate in PEM form")
		case block == nil:
			return all, nil
		case block.Type != "CERTIFICATE" && len(all) == 0:
			return nil, fmt.Errorf("holds no certificate in PEM form")
		case len(all) == most && most == 1:
			return nil, fmt.Errorf("holds more than one certificate: name each root by itself")
		case len(all) == most:
			return nil, fmt.Errorf("holds more than %d certificates", most)
		}
		cert, err := certificate.Parse(block.Bytes)
		if err != nil {
			return nil, err
		}
		all = append(all, cert)
	}
}

// vouchers demands that each name stands in the trust section.
func (c *checker) vouchers(names, known []string, at []any) {
	c.demand(len(names) > 0, "empty: nobody vouches for the hardware", at...)
	for n, name := range names {
		c.demand(slices.Contains(known, name), fmt.Sprintf("%q is not in the trust section (hint: %s)", name, hintOf(known)), append(slices.Clone(at), n)...)
	}
}

func hintOf(known []string) string {
	if len(known) == 0 || known[0] == "" {
		return "it names nobody for this kind"
	}
	return "one of " + strings.Join(known, ", ")
}

func namesOf(prefix string, roots []Root) []string {
	var names []string
	for _, r := range roots {
		names = append(names, prefix+r.Name)
	}
	return names
}
