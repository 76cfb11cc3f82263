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
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/internal/config"
	"github.com/keyagent/keyagent/internal/pattern"
)

// Operation is what a grant allows on a volume.
type Operation string

// The operations of a grant.
const (
	Open   Operation = "open"   // receive the key of an active volume
	Format Operation = "format" // create the volume, once
	Clone  Operation = "clone"  // receive the key of an active volume to make another one of a copy of its disk
	Rotate Operation = "rotate" // have the key of a volume changed without an operator's word
	Retire Operation = "retire" // end the life of a volume that nobody else holds
)

var operations = []Operation{Open, Format, Clone, Rotate, Retire}

// Writers is who may write a volume at the same time.
type Writers string

// The writers of a grant.
const (
	WritersOne     Writers = "one"     // the holder of the lease
	WritersMany    Writers = "many"    // any number of nodes, for file systems that are made for it
	WritersReaders Writers = "readers" // nobody: the volume is opened read-only
)

// The bounds of a grant's lease, and what it is without a word.
const (
	minLease     = 30 * time.Second
	maxLease     = 24 * time.Hour
	defaultLease = 2 * time.Minute
)

const takeoverExpiry = "expiry"

// file is the policy file. What kinds of evidence say is decoded by them.
type file struct {
	Version  int               `yaml:"version"`
	Lifetime string            `yaml:"lifetime"`
	Trust    map[string]*later `yaml:"trust"`
	Profiles []struct {
		Name         string            `yaml:"name"`
		ShowMismatch bool              `yaml:"show_mismatch,omitempty"`
		Sections     map[string]*later `yaml:",inline"`
	} `yaml:"profiles"`
	Grants   []Grant   `yaml:"grants"`
	Replicas *replicas `yaml:"replicas,omitempty"`
}

// replicas are machines that are key services over the same storage. They give each other the
// master secret.
type replicas struct {
	Profiles []string `yaml:"profiles"`
}

// Profile is a set of reference values for one kind of machine. It demands each
// kind of evidence that it has a section for.
type Profile struct {
	Name         string
	ShowMismatch bool // the refused machine may see the difference
	parts        []part
}

// Grant allows operations.
type Grant struct {
	Name       string      `yaml:"name"`
	Adopts     []string    `yaml:"adopts,omitempty"` // earlier grants whose volumes this one may open
	Profiles   []string    `yaml:"profiles"`
	Volumes    []string    `yaml:"volumes"`
	Operations []Operation `yaml:"operations"`
	When       string      `yaml:"when,omitempty"` // CEL
	// Writers says who may write a volume at the same time. Default one.
	Writers Writers `yaml:"writers,omitempty"`
	// Takeover is "expiry" where another node may write once the lease of one has
	// ended. Default: an operator's word only.
	Takeover string `yaml:"takeover,omitempty"`
	// Lease is how long a writer's lease lasts without renewal. Default 2m.
	Lease string `yaml:"lease,omitempty"`
	// Offline bounds how a machine may open its volume while no key service answers.
	// Nil: it may not.
	Offline *Offline `yaml:"offline,omitempty"`

	when    condition
	lease   time.Duration
	offline OfflineLimits
}

// condition is a compiled expression.
type condition interface {
	holds(a *Appraisal, r Request) (bool, error)
}

// Policy is a file that was checked as a whole. It is immutable.
type Policy struct {
	version  int
	kinds    []Kind
	trust    Trusts
	profiles []Profile
	grants   []Grant
	replicas []string // names of profiles
	hash     string
	lifetime time.Duration
	pcrs     []uint32
	files    []string
}

// Load reads and checks the policy file at path, which may speak of these kinds.
func Load(kinds []Kind, path string) (*Policy, error) {
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
	return Parse(kinds, path, data)
}

// Parse checks a policy, which may speak of these kinds. Files that it names are read
// relative to the folder of name.
func Parse(kinds []Kind, name string, data []byte) (*Policy, error) {
	var f file
	doc, err := config.Decode(name, data, &f)
	if err != nil {
		return nil, err
	}
	p := &Policy{version: f.Version, kinds: kinds, grants: f.Grants}
	if f.Replicas != nil {
		p.replicas = f.Replicas.Profiles
	}
	if err := p.decode(&f, doc); err != nil {
		return nil, err
	}
	c := Checker{doc: doc, trust: p.trust, dir: filepath.Dir(name)}
	c.Demand(f.Version != withEnd || hasEnd(data), fmt.Sprintf("the file was cut off: the last line of one of this version is %q", end), "version")
	c.check(p, &f)
	if c.err != nil {
		return nil, c.err
	}
	p.files = c.files
	// Files that the policy names are part of what it says.
	h := sha256.New()
	h.Write(data)
	for _, part := range p.trust.raw() {
		h.Write(part)
	}
	for _, pr := range p.profiles {
		for _, s := range pr.parts {
			if files, ok := s.section.(interface{ Raw() [][]byte }); ok {
				for _, part := range files.Raw() {
					h.Write(part)
				}
			}
		}
	}
	p.hash = hex.EncodeToString(h.Sum(nil))
	return p, nil
}

// Files are the paths of the files that the policy names and rests on.
func (p *Policy) Files() []string { return p.files }

// decode hands each part of the file to its kind.
func (p *Policy) decode(f *file, doc *config.Document) error {
	for name, l := range f.Trust {
		k := kindOf(p.kinds, attestation.Kind(name))
		if k == nil || k.Trust == nil {
			return doc.Errorf([]any{"trust", name}, "%q is not a kind of evidence that somebody vouches for", name)
		}
		t := k.Trust()
		if err := l.into(t, doc, "trust", name); err != nil {
			return err
		}
		p.trust = append(p.trust, vouching{k.Name, t})
	}
	slices.SortFunc(p.trust, func(a, b vouching) int { return strings.Compare(string(a.kind), string(b.kind)) })
	for i, raw := range f.Profiles {
		pr := Profile{Name: raw.Name, ShowMismatch: raw.ShowMismatch}
		for name := range raw.Sections {
			if kindOf(p.kinds, attestation.Kind(name)) == nil {
				return doc.Errorf([]any{"profiles", i, name}, "unknown field %q", name)
			}
		}
		for j := range p.kinds {
			k := &p.kinds[j]
			l, ok := raw.Sections[string(k.Name)]
			if !ok {
				continue
			}
			s := k.Section()
			if err := l.into(s, doc, "profiles", i, string(k.Name)); err != nil {
				return err
			}
			pr.parts = append(pr.parts, part{k, s})
		}
		p.profiles = append(p.profiles, pr)
	}
	return nil
}

// into decodes a part. One without a value is as good as none.
func (l *later) into(v any, doc *config.Document, at ...any) error {
	if l == nil {
		return nil
	}
	if err := l.decode(v); err != nil {
		return doc.Decoding(err)
	}
	return nil
}

// Hash identifies the policy in the audit log: SHA-256 of the file, followed by
// the certificates and key sets in it.
func (p *Policy) Hash() string { return p.hash }

// Lifetime of a verdict under this policy.
func (p *Policy) Lifetime() time.Duration { return p.lifetime }

// Trust returns who vouches for what.
func (p *Policy) Trust() Trusts { return p.trust }

// PCRs returns every register that some profile compares, ascending.
func (p *Policy) PCRs() []uint32 { return p.pcrs }

// Profiles returns the profiles, for people.
func (p *Policy) Profiles() []Profile { return p.profiles }

// Grants returns the grants, for people.
func (p *Policy) Grants() []Grant { return p.grants }

// Replicas returns the profiles of the machines that may be key services beside this one.
// Without any nobody may.
func (p *Policy) Replicas() []string { return p.replicas }

// Checker collects the first error, so that the checks read as a list.
type Checker struct {
	doc   *config.Document
	trust Trusts
	dir   string
	files []string // that were read
	err   error
}

func (c *Checker) Fail(format string, args []any, path ...any) {
	if c.err == nil {
		c.err = c.doc.Errorf(path, format, args...)
	}
}

func (c *Checker) Demand(ok bool, message string, path ...any) {
	if !ok {
		c.Fail("%s", []any{message}, path...)
	}
}

var namePattern = pattern.New(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)

func (c *Checker) check(p *Policy, f *file) {
	c.Demand(f.Version == openEnded || f.Version == withEnd, "must be 1 or 2", "version")
	var err error
	if p.lifetime, err = time.ParseDuration(f.Lifetime); err != nil || p.lifetime < time.Second || p.lifetime > 24*time.Hour {
		c.Fail("must be a duration from 1s to 24h, such as 15m", nil, "lifetime")
	}
	vouchers := 0
	for _, t := range p.trust {
		vouchers += t.by.Vouchers()
	}
	c.Demand(vouchers > 0, "no root and no enrolled TPM: nobody vouches for any hardware", "trust")
	for _, t := range p.trust {
		t.by.Check(c, Path{"trust", string(t.kind)})
	}
	c.Demand(len(p.profiles) > 0, "no profile: nothing could ever be accepted", "profiles")
	c.Demand(len(p.grants) > 0, "no grant: nothing could ever be allowed", "grants")
	seen := map[string]bool{}
	for i := range p.profiles {
		c.name(p.profiles[i].Name, seen, "profiles", i, "name")
		c.profile(&p.profiles[i], i)
	}
	for i := range p.profiles {
		t := p.profiles[i].TPM()
		if t == nil {
			continue
		}
		for _, r := range t.registers() {
			if !slices.Contains(p.pcrs, r) {
				p.pcrs = append(p.pcrs, r)
			}
		}
	}
	slices.Sort(p.pcrs)
	seen = map[string]bool{}
	for i := range p.grants {
		c.name(p.grants[i].Name, seen, "grants", i, "name")
		c.grant(p, &p.grants[i], i)
	}
	if f.Replicas != nil {
		c.Demand(len(p.replicas) > 0, "empty: no machine could be a replica; leave the section out if none is to be", "replicas", "profiles")
	}
	for i, name := range p.replicas {
		c.isProfile(p, name, "replicas", "profiles", i)
	}
}

func (c *Checker) isProfile(p *Policy, name string, path ...any) {
	known := slices.ContainsFunc(p.profiles, func(pr Profile) bool { return pr.Name == name })
	c.Demand(known, fmt.Sprintf("%q is not a profile", name), path...)
}

func (c *Checker) name(name string, seen map[string]bool, path ...any) {
	c.Demand(namePattern.MatchString(name), "must be 1 to 64 letters, digits, dots, dashes or underscores", path...)
	c.Demand(!seen[name], "is used twice", path...)
	seen[name] = true
}

// isHex reports whether s is size bytes in lower-case hex.
func isHex(s string, size int) bool {
	b, err := hex.DecodeString(s)
	return err == nil && len(b) == size && strings.ToLower(s) == s
}

func (c *Checker) grant(p *Policy, g *Grant, i int) {
	c.Demand(len(g.Profiles) > 0, "empty: the grant is for nobody", "grants", i, "profiles")
	for n, name := range g.Profiles {
		c.isProfile(p, name, "grants", i, "profiles", n)
	}
	c.Demand(len(g.Volumes) > 0, "empty: the grant is for no volume", "grants", i, "volumes")
	for n, v := range g.Volumes {
		c.Demand(validPattern(v), "must be a volume name, in which * stands for any run of characters", "grants", i, "volumes", n)
	}
	c.Demand(len(g.Operations) > 0, "empty: the grant allows nothing", "grants", i, "operations")
	for n, op := range g.Operations {
		c.Demand(slices.Contains(operations, op), fmt.Sprintf("%q is not an operation (hint: open, format, clone, rotate, retire)", op), "grants", i, "operations", n)
	}
	for n, name := range g.Adopts {
		c.Demand(namePattern.MatchString(name), "must be the name of a grant", "grants", i, "adopts", n)
	}
	c.writers(g, i)
	c.offline(g, i)
	if g.When != "" {
		var err error
		if g.when, err = compile(p.kinds, g.When); err != nil {
			c.Fail("%w", []any{err}, "grants", i, "when")
		}
	}
}

// writers checks what a grant says of those who write, and fills in what it does not.
func (c *Checker) writers(g *Grant, i int) {
	if g.Writers == "" {
		g.Writers = WritersOne
	}
	known := []Writers{WritersOne, WritersMany, WritersReaders}
	c.Demand(slices.Contains(known, g.Writers), fmt.Sprintf("%q is not known (hint: one, many, readers)", g.Writers), "grants", i, "writers")
	creates := slices.Contains(g.Operations, Format) || slices.Contains(g.Operations, Clone)
	c.Demand(g.Writers != WritersReaders || !creates, "readers create no volume: a grant for them has only the operation open", "grants", i, "writers")
	c.Demand(g.Takeover == "" || g.Takeover == takeoverExpiry, fmt.Sprintf("%q is not known (hint: expiry, or nothing for an operator's word only)", g.Takeover), "grants", i, "takeover")
	alone := g.Writers == WritersOne
	c.Demand(alone || g.Takeover == "", "there is no lease to take over unless one node writes", "grants", i, "takeover")
	c.Demand(g.Writers != WritersReaders || g.Lease == "", "readers have no lease", "grants", i, "lease")
	g.lease = defaultLease
	if g.Lease == "" {
		return
	}
	var err error
	if g.lease, err = time.ParseDuration(g.Lease); err != nil || g.lease < minLease || g.lease > maxLease {
		c.Fail("must be a duration from %s to %s, such as 2m", []any{minLease, maxLease}, "grants", i, "lease")
	}
}
