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

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/certificate"
)

// Trusts are who vouches for what, one part for each kind of a policy's trust section.
type Trusts []vouching

type vouching struct {
	kind attestation.Kind
	by   Trust
}

// Of returns the part of one kind, nil if there is none.
func (t Trusts) Of(k attestation.Kind) Trust {
	for _, v := range t {
		if v.kind == k {
			return v.by
		}
	}
	return nil
}

// TPM returns the part of that kind, an empty one if there is none. So do the others.
func (t Trusts) TPM() *TPMTrust { return trustOf(t, attestation.TPM, &TPMTrust{}) }

// SNP returns the authorities of SEV-SNP.
func (t Trusts) SNP() *SNPTrust { return trustOf(t, attestation.SNP, &SNPTrust{}) }

// TDX returns the authorities of TDX.
func (t Trusts) TDX() *TDXTrust { return trustOf(t, attestation.TDX, &TDXTrust{}) }

// Nitro returns the authorities of NitroTPM.
func (t Trusts) Nitro() *NitroTrust { return trustOf(t, attestation.Nitro, &NitroTrust{}) }

// Azure returns whose tokens are believed.
func (t Trusts) Azure() *AzureTrust { return trustOf(t, attestation.Azure, &AzureTrust{}) }

func trustOf[T Trust](t Trusts, k attestation.Kind, empty T) T {
	if found, ok := t.Of(k).(T); ok {
		return found
	}
	return empty
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

// Vouchers implements Trust.
func (r *RootsTrust) Vouchers() int { return len(r.Roots) }

// Raw implements Trust.
func (r *RootsTrust) Raw() [][]byte { return rawRoots(r.Roots) }

func (r *RootsTrust) check(c *Checker, builtin string, most int, at Path) {
	c.Roots(r.Roots, builtin, most, at.To("roots"))
	for i, root := range r.Roots {
		c.Demand(len(root.CRLs) == 0, "is for TPMs: other kinds bring their lists", at.To("roots", i, "crls")...)
	}
}

// SNPTrust names AMD's authorities, or others of SEV-SNP.
type SNPTrust struct {
	RootsTrust `yaml:",inline"`
}

// TDXTrust names Intel's authority, or others of TDX.
type TDXTrust struct {
	RootsTrust `yaml:",inline"`
}

// NitroTrust names AWS's authority, or others of NitroTPM.
type NitroTrust struct {
	RootsTrust `yaml:",inline"`
}

// Check implements Trust.
func (t *TDXTrust) Check(c *Checker, at Path) { t.check(c, "intel", 1, at) }

// Check implements Trust.
func (t *NitroTrust) Check(c *Checker, at Path) { t.check(c, "aws", 1, at) }

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
func (t Trusts) raw() (out [][]byte) {
	for _, v := range t {
		out = append(out, v.by.Raw()...)
	}
	return out
}

func rawRoots(lists ...[]Root) (out [][]byte) {
	for _, roots := range lists {
		for _, r := range roots {
			for _, c := range r.certificates {
				out = append(out, c.Raw)
			}
			for _, l := range r.crls {
				out = append(out, l.Raw)
			}
		}
	}
	return out
}

// products of AMD that have SNP and a public authority.
var products = []string{"Milan", "Genoa", "Turin"}

// Products returns the product lines of AMD that a policy can name.
func Products() []string { return slices.Clone(products) }

// Check implements Trust.
func (t *SNPTrust) Check(c *Checker, at Path) {
	t.check(c, "amd", 3, at)
	for i, r := range t.Roots {
		at := at.To("roots", i)
		c.Demand(r.Builtin != "" || slices.Contains(products, r.Product), "needs product: Milan, Genoa or Turin", at...)
		c.Demand(r.Builtin != "" || len(r.certificates) >= 2, "needs an ARK and the ASK or ASVK below it in PEM", at...)
		if r.Builtin == "" && c.err == nil {
			c.amdAuthority(r.certificates, at)
		}
	}
}

// Check implements Trust.
func (t *TPMTrust) Check(c *Checker, at Path) {
	c.Roots(t.Roots, "", maxTPMCertificates, at.To("roots"))
	c.Roots(t.AKRoots, "google", maxTPMCertificates, at.To("ak_roots"))
	for i := range t.AKRoots {
		c.tpmAuthority(&t.AKRoots[i], at.To("ak_roots", i))
		alone := t.AKRoots[i].certificates
		c.Demand(len(alone) != 1 || selfSigned(alone[0]), "needs one self-signed root in PEM; others beside it are intermediates", at.To("ak_roots", i)...)
	}
	for i := range t.Roots {
		c.tpmAuthority(&t.Roots[i], at.To("roots", i))
	}
	seen := map[string]bool{}
	for i, e := range t.Enrolled {
		c.name(e.Name, seen, at.To("enrolled", i, "name")...)
		c.Demand(isHex(e.EK, 32), "must be 64 lower-case hex digits (hint: keyagent evidence prints it)", at.To("enrolled", i, "ek")...)
	}
}

// Vouchers implements Trust.
func (t *TPMTrust) Vouchers() int { return len(t.Roots) + len(t.AKRoots) + len(t.Enrolled) }

// Raw implements Trust.
func (t *TPMTrust) Raw() [][]byte { return rawRoots(t.Roots, t.AKRoots) }

// maxTPMCertificates of one authority: a maker of TPMs has had some eighty issuing ones
// below one root.
const maxTPMCertificates = 256

// tpmAuthority demands one root among several certificates, and reads the revocation
// lists.
func (c *Checker) tpmAuthority(r *Root, at Path) {
	if len(r.certificates) > 1 {
		roots := 0
		for _, cert := range r.certificates {
			if selfSigned(cert) {
				roots++
			}
		}
		c.Demand(roots == 1, fmt.Sprintf("has %d self-signed certificates: it needs one root, and others beside it are intermediates", roots), at...)
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
			c.Fail("%w", []any{err}, at.To("crls", i)...)
		}
	}
}

// amdAuthority demands one root, and of each kind at most one certificate, which
// that root signed.
func (c *Checker) amdAuthority(certs []*x509.Certificate, at Path) {
	var root *x509.Certificate
	below := map[bool]*x509.Certificate{} // by whether it is for keys of clouds
	for _, cert := range certs {
		if bytes.Equal(cert.RawIssuer, cert.RawSubject) {
			c.Demand(root == nil, "needs one ARK, which signs itself, not two", at...)
			root = cert
			continue
		}
		vlek := strings.HasPrefix(cert.Subject.CommonName, "SEV-VLEK-")
		c.Demand(below[vlek] == nil, fmt.Sprintf("has %q twice", cert.Subject.CommonName), at...)
		below[vlek] = cert
	}
	c.Demand(root != nil, "needs one ARK, which signs itself", at...)
	for _, cert := range below {
		c.Demand(c.err != nil || cert.CheckSignatureFrom(root) == nil, fmt.Sprintf("%q is not signed by the ARK beside it", cert.Subject.CommonName), at...)
	}
}

// Roots checks and reads authorities of at most most certificates each. known is the one
// that may be built in.
func (c *Checker) Roots(roots []Root, known string, most int, path Path) {
	seen := map[string]bool{}
	sources := "file or pem"
	if known != "" {
		sources = "builtin, file or pem"
	}
	for i := range roots {
		r := &roots[i]
		at := path.To(i)
		c.name(r.Name, seen, append(at, "name")...)
		given := 0
		for _, s := range []string{r.Builtin, r.File, r.PEM} {
			if s != "" {
				given++
			}
		}
		c.Demand(given == 1, "needs either "+sources, at...)
		c.Demand(r.Builtin == "" || r.Builtin == known, fmt.Sprintf("%q is not built in (%s)", r.Builtin, hintOf([]string{known})), append(at, "builtin")...)
		if r.Builtin != "" || c.err != nil {
			continue
		}
		text := []byte(r.PEM)
		var err error
		if r.File != "" {
			if text, err = c.read(r.File); err != nil {
				c.Fail("%w", []any{err}, append(at, "file")...)
			}
		}
		if r.certificates, err = certificates(text, most); err != nil {
			c.Fail("%w", []any{err}, at...)
		}
	}
}

// Check implements Trust.
func (a *AzureTrust) Check(c *Checker, at Path) {
	if a.Issuer == "" && a.JWKS == "" {
		return
	}
	u, err := url.Parse(a.Issuer)
	c.Demand(err == nil && u.Scheme == "https" && u.Host != "", "must be the https URL of an attestation service", at.To("issuer")...)
	c.Demand(a.JWKS != "", "needs a file with the service's signing keys", at.To("jwks")...)
	if c.err != nil {
		return
	}
	if a.jwks, err = c.read(a.JWKS); err != nil {
		c.Fail("%w", []any{err}, at.To("jwks")...)
	}
	c.Demand(json.Valid(a.jwks), "is not JSON", at.To("jwks")...)
}

// Vouchers implements Trust: a token vouches for nothing by itself.
func (*AzureTrust) Vouchers() int { return 0 }

// Raw implements Trust.
func (a *AzureTrust) Raw() [][]byte {
	if a.jwks == nil {
		return nil
	}
	return [][]byte{a.jwks}
}

// read reads a file that the policy names, relative to its folder.
func (c *Checker) read(path string) ([]byte, error) {
	if !filepath.IsAbs(path) {
		path = filepath.Join(c.dir, path)
	}
	c.files = append(c.files, path)
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

// Vouchers demands that each name stands in the trust section.
func (c *Checker) Vouchers(names, known []string, at []any) {
	c.Demand(len(names) > 0, "empty: nobody vouches for the hardware", at...)
	for n, name := range names {
		c.Demand(slices.Contains(known, name), fmt.Sprintf("%q is not in the trust section (hint: %s)", name, hintOf(known)), append(slices.Clone(at), n)...)
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
