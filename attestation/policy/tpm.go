package policy

import (
	"cmp"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"slices"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/facts"
)

// TPMProfile holds reference values of a TPM.
type TPMProfile struct {
	// Trust names who vouches: "root:NAME", "enrolled:NAME" or "ak-root:NAME", or
	// "azure" and "svsm" where the hardware does.
	Trust    []string    `yaml:"trust"`
	GCE      *GCEProfile `yaml:"gce,omitempty"`
	Bank     string      `yaml:"bank"`      // sha256
	EventLog string      `yaml:"event_log"` // required or optional
	PCRs     []PCR       `yaml:"pcrs"`
	// Measured are volumes that were opened on the machine since it started, see
	// docs/spec/measured-volume.md. Empty: none is demanded.
	Measured []MeasuredVolume `yaml:"measured_volumes,omitempty"`
}

// MeasuredVolume is a volume that a machine's agent measured into PCR 15.
type MeasuredVolume struct {
	Volume string   `yaml:"volume"` // for people
	Accept []string `yaml:"accept"` // SHA-256 digests in hex: one for each DEK that it may have
}

// measuredPCR is the register that volumes are measured into.
const measuredPCR = 15

// GCEProfile says which instances of Google Compute Engine are meant: everybody
// can rent one that Google vouches for.
type GCEProfile struct {
	Projects  []string `yaml:"projects"`
	Zones     []string `yaml:"zones,omitempty"`     // empty: any
	Instances []string `yaml:"instances,omitempty"` // names; empty: any
}

// PCR holds the reference values of one register.
type PCR struct {
	PCR             *uint32  `yaml:"pcr"`
	Accept          []string `yaml:"accept"` // hex
	WarnOnly        bool     `yaml:"warn_only,omitempty"`
	AllowUnextended bool     `yaml:"allow_unextended,omitempty"`
	// EventLog is required or optional: whether the log has to lead to the register's
	// value. Default: as the TPM's.
	EventLog string              `yaml:"event_log,omitempty"`
	Source   string              `yaml:"source,omitempty"` // for people
	Events   []attestation.Event `yaml:"events,omitempty"` // explain a mismatch, decide nothing
}

// Check implements Section.
func (t *TPMProfile) Check(c *Checker, pr *Profile, at Path) {
	c.Demand(t.Bank == "sha256", "must be sha256", at.To("bank")...)
	c.Demand(t.EventLog == "required" || t.EventLog == "optional", "must be required or optional", at.To("event_log")...)
	known := namesOf("root:", c.trust.TPM().Roots)
	for _, e := range c.trust.TPM().Enrolled {
		known = append(known, "enrolled:"+e.Name)
	}
	known = append(known, namesOf("ak-root:", c.trust.TPM().AKRoots)...)
	if carrier := pr.via(attestation.TPM); carrier != "" {
		known = []string{string(carrier)}
	}
	c.Vouchers(t.Trust, known, at.To("trust"))
	t.checkGCE(c, at.To("gce"))
	c.checkPCRs(t.PCRs, sha256.Size, at.To("pcrs"))
	t.checkMeasured(c, at.To("measured_volumes"))
}

func (t *TPMProfile) checkMeasured(c *Checker, at Path) {
	seen := map[string]bool{}
	for n, v := range t.Measured {
		c.Demand(ValidVolume(v.Volume), "must be a volume's ID", at.To(n, "volume")...)
		c.Demand(!seen[v.Volume], "is named twice", at.To(n, "volume")...)
		seen[v.Volume] = true
		c.Demand(len(v.Accept) > 0, "empty: no digest would be accepted", at.To(n, "accept")...)
		c.Hexes(v.Accept, sha256.Size, at.To(n, "accept"))
	}
}

// registers are those that the section compares.
func (t *TPMProfile) registers() []uint32 {
	var out []uint32
	for _, r := range t.PCRs {
		if r.PCR != nil {
			out = append(out, *r.PCR)
		}
	}
	if len(t.Measured) > 0 {
		out = append(out, measuredPCR)
	}
	return out
}

// checkGCE demands that a profile that trusts Google's vTPMs says whose.
func (t *TPMProfile) checkGCE(c *Checker, at Path) {
	rented := slices.ContainsFunc(c.trust.TPM().AKRoots, func(r Root) bool {
		return r.google() && slices.Contains(t.Trust, "ak-root:"+r.Name)
	}) || slices.ContainsFunc(c.trust.TPM().Roots, func(r Root) bool {
		return r.google() && slices.Contains(t.Trust, "root:"+r.Name)
	})
	c.Demand(!rented || t.GCE != nil, "missing: everybody can rent an instance that Google vouches for, so the profile must name its projects", at...)
	if t.GCE != nil {
		c.Demand(len(t.GCE.Projects) > 0, "empty: no project would be accepted", at.To("projects")...)
		c.Filled(t.GCE.Projects, at.To("projects"))
		for name, list := range map[string][]string{"zones": t.GCE.Zones, "instances": t.GCE.Instances} {
			c.Demand(list == nil || len(list) > 0, "empty: leave it out if any is meant", at.To(name)...)
			c.Filled(list, at.To(name))
		}
	}
}

// googleRoots are the SHA-256 of the roots that Google's vTPMs have. A root is the same
// one whether the policy names it or brings it.
var googleRoots = []string{
	"594759594b9b61524f6c8ef668f7177f7b9066bc0674f2f49fe9e052be78beb2",
	"9bd5285f8fb18502a7947e621ffd470266f49fcd3b73e19a190f690ad32a7caf",
}

// google reports whether an authority's certificates are Google's.
func (r Root) google() bool {
	return r.Builtin == "google" || slices.ContainsFunc(r.certificates, func(c *x509.Certificate) bool {
		sum := sha256.Sum256(c.Raw)
		return slices.Contains(googleRoots, hex.EncodeToString(sum[:])) || issuedByGoogle(c)
	})
}

// issuedByGoogle is what an issuing authority says of itself, which may stand in a
// policy without its root.
func issuedByGoogle(c *x509.Certificate) bool {
	return slices.Contains(c.Subject.Organization, "Google LLC") && slices.Contains(c.Subject.OrganizationalUnit, "Google Cloud")
}

func (c *Checker) checkPCRs(pcrs []PCR, size int, at Path) {
	c.Demand(len(pcrs) > 0, "empty: no register would be compared", at...)
	seen := map[uint32]bool{}
	enforced := false
	for n, r := range pcrs {
		if r.PCR == nil || *r.PCR > 23 {
			c.Fail("must be a number from 0 to 23", nil, at.To(n, "pcr")...)
			return
		}
		c.Demand(!seen[*r.PCR], "is named twice", at.To(n, "pcr")...)
		seen[*r.PCR] = true
		enforced = enforced || !r.WarnOnly
		c.Demand(r.EventLog == "" || size == sha256.Size && (r.EventLog == "required" || r.EventLog == "optional"),
			"must be required or optional, and be left out where there is no log", at.To(n, "event_log")...)
		c.Demand(len(r.Accept) > 0, "empty: no value would be accepted", at.To(n, "accept")...)
		c.Hexes(r.Accept, size, at.To(n, "accept"))
		for m, v := range r.Accept {
			c.Demand(r.AllowUnextended || !unextended(v),
				"is the value of a register that nothing was measured into; if that is meant, say allow_unextended: true", at.To(n, "accept", m)...)
		}
	}
	c.Demand(enforced, "every register is warn_only: nothing would be enforced", at...)
}

// Compare implements Section.
func (t *TPMProfile) Compare(d *Differences, claims attestation.Claims) {
	d.Trust("trust", t.Trust)
	t.compareLog(d, claims)
	if t.GCE != nil {
		d.Text("gce.project", facts.GCEProjectID, t.GCE.Projects)
		d.Flag("gce.production", facts.GCEProduction, true)
		if len(t.GCE.Zones) > 0 {
			d.Text("gce.zone", facts.GCEZone, t.GCE.Zones)
		}
		if len(t.GCE.Instances) > 0 {
			d.Text("gce.instance", facts.GCEInstanceName, t.GCE.Instances)
		}
	}
	d.pcrs("", t.PCRs)
	t.compareMeasured(d, claims)
}

// compareMeasured demands the event of each volume. A register has events only if they
// lead to the value that the quote covers, so that each of them was extended.
func (t *TPMProfile) compareMeasured(d *Differences, claims attestation.Claims) {
	got := claims.Measurements[fmt.Sprintf("pcr%d", measuredPCR)]
	for _, v := range t.Measured {
		if slices.ContainsFunc(got.Events, func(e attestation.Event) bool { return slices.Contains(v.Accept, e.Digest) }) {
			continue
		}
		found := cmp.Or(got.Unexplained, fmt.Sprintf("%d other events in pcr%d", len(got.Events), measuredPCR))
		if len(got.Events) == 0 && got.Unexplained == "" {
			found = fmt.Sprintf("no log that leads to pcr%d, or nothing was measured into it", measuredPCR)
		}
		d.Refuse("measured_volumes."+v.Volume, v.Accept, found)
	}
}

// compareLog demands that the log leads to each register that needs it. What it
// does not lead to has its value from the quote all the same.
func (t *TPMProfile) compareLog(d *Differences, claims attestation.Claims) {
	if hasLog, _ := facts.EventLog.Of(claims); t.EventLog == "required" && !hasLog {
		d.Refuse("event_log", []string{"an event log"}, cmp.Or(text(claims, facts.EventLogError), "none"))
		return
	}
	for _, ref := range t.PCRs {
		d.explained("", fmt.Sprintf("pcr%d", *ref.PCR), ref.EventLog, t.EventLog, ref.WarnOnly)
	}
}

// explained demands that the log leads to a register. own is what the profile says of
// the register, whole of all: required, or optional; own may be empty.
func (d *Differences) explained(prefix, register, own, whole string, warnOnly bool) {
	got, ok := d.claims.Measurements[register]
	why := got.Unexplained
	if own == "required" && why == "" && len(got.Events) == 0 {
		why = "no events"
	}
	if !ok || why == "" || cmp.Or(own, whole) != "required" {
		return
	}
	m := Mismatch{Profile: d.profile, Field: prefix + register + ".event_log", Expected: []string{"events that lead to its value"}, Found: why}
	if warnOnly {
		d.soft = append(d.soft, m)
	} else {
		d.hard = append(d.hard, m)
	}
}

func (d *Differences) pcrs(prefix string, pcrs []PCR) {
	for _, ref := range pcrs {
		register := fmt.Sprintf("pcr%d", *ref.PCR)
		got, ok := d.claims.Measurements[register]
		if ok && ref.AllowUnextended {
			if value := hex.EncodeToString(got.Value); unextended(value) && slices.Contains(ref.Accept, value) {
				continue
			}
		}
		d.Values(prefix+register, register, Values{Accept: ref.Accept, WarnOnly: ref.WarnOnly}, ref.Events)
	}
}

// WarnOnly names the registers that only warn.
func (t *TPMProfile) WarnOnly() []string { return warnOnly("pcr", t.PCRs) }

func tpmReference(c attestation.Claims, source string) (Section, error) {
	t := &TPMProfile{Trust: []string{trustOr(c, "root:NAME")}, Bank: "sha256", EventLog: logOf(c), PCRs: pcrReferences(c, source)}
	if project, ok := facts.GCEProjectID.Of(c); ok {
		t.GCE = &GCEProfile{Projects: []string{project}}
	}
	return t, nil
}
