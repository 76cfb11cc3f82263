// Package policy decides what verified evidence is worth.
//
// A policy is one YAML file. It holds trust roots, named profiles of reference
// values, and grants: this profile may do these operations on these volumes.
// Nothing is allowed that it does not name: an empty list, an unset value or an
// unknown name is an error when the file is read, never a check that is left
// out.
//
// [Policy.Appraise] compares claims with reference values and gives an
// [Appraisal]; [Policy.Authorize] compares an appraisal with grants. Both can
// explain themselves: a mismatch names each register, what was expected and
// found, and the events of the boot log that differ. The file format is
// documented in docs/configuration.md.
package policy

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/google/cel-go/cel"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/internal/config"
)

// Operation is what a grant allows on a volume.
type Operation string

// The operations of a grant.
const (
	Open   Operation = "open"   // receive the key of an active volume
	Format Operation = "format" // create the volume, once
)

var operations = []Operation{Open, Format}

// File is the policy file.
type File struct {
	Version  int       `yaml:"version"`
	Lifetime string    `yaml:"lifetime"`
	Trust    TrustFile `yaml:"trust"`
	Profiles []Profile `yaml:"profiles"`
	Grants   []Grant   `yaml:"grants"`
}

// TrustFile names who vouches for hardware.
type TrustFile struct {
	TPM TPMTrust `yaml:"tpm"`
}

// TPMTrust names who vouches for TPMs.
type TPMTrust struct {
	Roots    []Root     `yaml:"roots,omitempty"`
	Enrolled []Enrolled `yaml:"enrolled,omitempty"`
}

// Root is a certificate authority of a TPM maker.
type Root struct {
	Name string `yaml:"name"`
	File string `yaml:"file,omitempty"` // PEM, relative to the policy's folder
	PEM  string `yaml:"pem,omitempty"`

	certificate *x509.Certificate
}

// Certificate returns the parsed certificate of a loaded policy.
func (r Root) Certificate() *x509.Certificate { return r.certificate }

// Enrolled is a TPM that the operator vouches for.
type Enrolled struct {
	Name string `yaml:"name"`
	EK   string `yaml:"ek"` // hex SHA-256 of the key's PKIX DER
}

// Profile is a set of reference values for one kind of machine.
type Profile struct {
	Name         string      `yaml:"name"`
	ShowMismatch bool        `yaml:"show_mismatch,omitempty"` // the refused machine may see the difference
	TPM          *TPMProfile `yaml:"tpm"`
}

// TPMProfile holds reference values of a TPM.
type TPMProfile struct {
	Trust    []string `yaml:"trust"`     // "root:NAME" or "enrolled:NAME"
	Bank     string   `yaml:"bank"`      // sha256
	EventLog string   `yaml:"event_log"` // required or optional
	PCRs     []PCR    `yaml:"pcrs"`
}

// PCR holds the reference values of one register.
type PCR struct {
	PCR             *uint32             `yaml:"pcr"`
	Accept          []string            `yaml:"accept"` // hex
	WarnOnly        bool                `yaml:"warn_only,omitempty"`
	AllowUnextended bool                `yaml:"allow_unextended,omitempty"`
	Source          string              `yaml:"source,omitempty"` // for people
	Events          []attestation.Event `yaml:"events,omitempty"` // explain a mismatch, decide nothing
}

// Grant allows operations.
type Grant struct {
	Name       string      `yaml:"name"`
	Adopts     []string    `yaml:"adopts,omitempty"` // earlier grants whose volumes this one may open
	Profiles   []string    `yaml:"profiles"`
	Volumes    []string    `yaml:"volumes"`
	Operations []Operation `yaml:"operations"`
	When       string      `yaml:"when,omitempty"` // CEL

	when cel.Program
}

// Policy is a file that was checked as a whole. It is immutable.
type Policy struct {
	file     File
	hash     string
	lifetime time.Duration
	pcrs     []uint32
}

// Load reads and checks the policy file at path.
func Load(path string) (*Policy, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	const limit = 4 << 20
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	return Parse(path, data)
}

// Parse checks a policy. Files that it names are read relative to the folder of
// name.
func Parse(name string, data []byte) (*Policy, error) {
	p := &Policy{}
	doc, err := config.Decode(name, data, &p.file)
	if err != nil {
		return nil, err
	}
	c := checker{doc: doc, file: &p.file, dir: filepath.Dir(name)}
	c.check(p)
	if c.err != nil {
		return nil, c.err
	}
	// Files that the policy names are part of what it says.
	h := sha256.New()
	h.Write(data)
	for _, r := range p.file.Trust.TPM.Roots {
		h.Write(r.certificate.Raw)
	}
	p.hash = hex.EncodeToString(h.Sum(nil))
	return p, nil
}

// Hash identifies the policy in the audit log: SHA-256 of the file, followed by
// the certificates in it.
func (p *Policy) Hash() string { return p.hash }

// Lifetime of a verdict under this policy.
func (p *Policy) Lifetime() time.Duration { return p.lifetime }

// TPM returns who vouches for TPMs.
func (p *Policy) TPM() TPMTrust { return p.file.Trust.TPM }

// PCRs returns every register that some profile compares, ascending.
func (p *Policy) PCRs() []uint32 { return p.pcrs }

// Profiles returns the profiles, for people.
func (p *Policy) Profiles() []Profile { return p.file.Profiles }

// Grants returns the grants, for people.
func (p *Policy) Grants() []Grant { return p.file.Grants }

// checker collects the first error, so that the checks read as a list.
type checker struct {
	doc  *config.Document
	file *File
	dir  string
	err  error
}

func (c *checker) fail(format string, args []any, path ...any) {
	if c.err == nil {
		c.err = c.doc.Errorf(path, format, args...)
	}
}

func (c *checker) demand(ok bool, message string, path ...any) {
	if !ok {
		c.fail("%s", []any{message}, path...)
	}
}

var namePattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)

func (c *checker) check(p *Policy) {
	f := c.file
	c.demand(f.Version == 1, "must be 1", "version")
	var err error
	if p.lifetime, err = time.ParseDuration(f.Lifetime); err != nil || p.lifetime < time.Second || p.lifetime > 24*time.Hour {
		c.fail("must be a duration from 1s to 24h, such as 15m", nil, "lifetime")
	}
	c.trust()
	c.demand(len(f.Profiles) > 0, "no profile: nothing could ever be accepted", "profiles")
	c.demand(len(f.Grants) > 0, "no grant: nothing could ever be allowed", "grants")
	seen := map[string]bool{}
	for i := range f.Profiles {
		c.name(f.Profiles[i].Name, seen, "profiles", i, "name")
		c.profile(&f.Profiles[i], i)
	}
	for _, pr := range f.Profiles {
		if pr.TPM == nil {
			continue
		}
		for _, r := range pr.TPM.PCRs {
			if r.PCR != nil && !slices.Contains(p.pcrs, *r.PCR) {
				p.pcrs = append(p.pcrs, *r.PCR)
			}
		}
	}
	slices.Sort(p.pcrs)
	seen = map[string]bool{}
	for i := range f.Grants {
		c.name(f.Grants[i].Name, seen, "grants", i, "name")
		c.grant(&f.Grants[i], i)
	}
}

func (c *checker) name(name string, seen map[string]bool, path ...any) {
	c.demand(namePattern.MatchString(name), "must be 1 to 64 letters, digits, dots, dashes or underscores", path...)
	c.demand(!seen[name], "is used twice", path...)
	seen[name] = true
}

func (c *checker) trust() {
	t := &c.file.Trust.TPM
	c.demand(len(t.Roots)+len(t.Enrolled) > 0, "no root and no enrolled TPM: nobody vouches for any hardware", "trust", "tpm")
	seen := map[string]bool{}
	for i := range t.Roots {
		r := &t.Roots[i]
		at := []any{"trust", "tpm", "roots", i}
		c.name(r.Name, seen, append(at, "name")...)
		c.demand((r.File == "") != (r.PEM == ""), "needs either file or pem", at...)
		text := []byte(r.PEM)
		if r.File != "" {
			path := r.File
			if !filepath.IsAbs(path) {
				path = filepath.Join(c.dir, path)
			}
			var err error
			if text, err = os.ReadFile(path); err != nil {
				c.fail("%w", []any{err}, append(at, "file")...)
			}
		}
		var err error
		if r.certificate, err = oneCertificate(text); err != nil {
			c.fail("%w", []any{err}, at...)
		}
	}
	seen = map[string]bool{}
	for i, e := range t.Enrolled {
		at := []any{"trust", "tpm", "enrolled", i}
		c.name(e.Name, seen, append(at, "name")...)
		c.demand(isDigest(e.EK), "must be 64 lower-case hex digits (hint: keyagent evidence prints it)", append(at, "ek")...)
	}
}

func oneCertificate(text []byte) (*x509.Certificate, error) {
	block, rest := pem.Decode(text)
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, fmt.Errorf("holds no certificate in PEM form")
	}
	if more, _ := pem.Decode(rest); more != nil {
		return nil, fmt.Errorf("holds more than one certificate: name each root by itself")
	}
	return x509.ParseCertificate(block.Bytes)
}

func isDigest(s string) bool {
	b, err := hex.DecodeString(s)
	return err == nil && len(b) == sha256.Size && strings.ToLower(s) == s
}

func (c *checker) profile(pr *Profile, i int) {
	at := func(more ...any) []any { return append([]any{"profiles", i, "tpm"}, more...) }
	t := pr.TPM
	if t == nil {
		c.fail("no evidence is demanded: a profile needs a tpm section", nil, "profiles", i)
		return
	}
	c.demand(t.Bank == "sha256", "must be sha256", at("bank")...)
	c.demand(t.EventLog == "required" || t.EventLog == "optional", "must be required or optional", at("event_log")...)
	c.demand(len(t.Trust) > 0, "empty: nobody vouches for the hardware", at("trust")...)
	for n, name := range t.Trust {
		c.demand(c.vouches(name), fmt.Sprintf("%q is not in the trust section (hint: root:NAME or enrolled:NAME)", name), at("trust", n)...)
	}
	c.demand(len(t.PCRs) > 0, "empty: no register would be compared", at("pcrs")...)
	seen := map[uint32]bool{}
	enforced := false
	for n, r := range t.PCRs {
		if r.PCR == nil || *r.PCR > 23 {
			c.fail("must be a number from 0 to 23", nil, at("pcrs", n, "pcr")...)
			return
		}
		c.demand(!seen[*r.PCR], "is named twice", at("pcrs", n, "pcr")...)
		seen[*r.PCR] = true
		enforced = enforced || !r.WarnOnly
		c.demand(len(r.Accept) > 0, "empty: no value would be accepted", at("pcrs", n, "accept")...)
		for m, v := range r.Accept {
			c.demand(isDigest(v), "must be 64 lower-case hex digits", at("pcrs", n, "accept", m)...)
			c.demand(r.AllowUnextended || !unextended(v),
				"is the value of a register that nothing was measured into; if that is meant, say allow_unextended: true", at("pcrs", n, "accept", m)...)
		}
	}
	c.demand(enforced, "every register is warn_only: nothing would be enforced", at("pcrs")...)
}

func unextended(hexValue string) bool {
	return strings.Trim(hexValue, "0") == "" || strings.Trim(hexValue, "f") == ""
}

func (c *checker) vouches(name string) bool {
	for _, r := range c.file.Trust.TPM.Roots {
		if name == "root:"+r.Name {
			return true
		}
	}
	for _, e := range c.file.Trust.TPM.Enrolled {
		if name == "enrolled:"+e.Name {
			return true
		}
	}
	return false
}

func (c *checker) grant(g *Grant, i int) {
	c.demand(len(g.Profiles) > 0, "empty: the grant is for nobody", "grants", i, "profiles")
	for n, name := range g.Profiles {
		known := slices.ContainsFunc(c.file.Profiles, func(p Profile) bool { return p.Name == name })
		c.demand(known, fmt.Sprintf("%q is not a profile", name), "grants", i, "profiles", n)
	}
	c.demand(len(g.Volumes) > 0, "empty: the grant is for no volume", "grants", i, "volumes")
	for n, v := range g.Volumes {
		c.demand(validPattern(v), "must be a volume name, in which * stands for any run of characters", "grants", i, "volumes", n)
	}
	c.demand(len(g.Operations) > 0, "empty: the grant allows nothing", "grants", i, "operations")
	for n, op := range g.Operations {
		c.demand(slices.Contains(operations, op), fmt.Sprintf("%q is not an operation (hint: open, format)", op), "grants", i, "operations", n)
	}
	for n, name := range g.Adopts {
		c.demand(namePattern.MatchString(name), "must be the name of a grant", "grants", i, "adopts", n)
	}
	if g.When != "" {
		var err error
		if g.when, err = compile(g.When); err != nil {
			c.fail("%w", []any{err}, "grants", i, "when")
		}
	}
}
