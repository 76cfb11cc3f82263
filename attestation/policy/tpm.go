package policy

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"

	"github.com/keyagent/keyagent/attestation"
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
}

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

func (*TPMProfile) kind() attestation.Kind { return attestation.TPM }

func (t *TPMProfile) check(c *checker, pr *Profile, at path) {
	c.demand(t.Bank == "sha256", "must be sha256", at.to("bank")...)
	c.demand(t.EventLog == "required" || t.EventLog == "optional", "must be required or optional", at.to("event_log")...)
	known := namesOf("root:", c.file.Trust.TPM.Roots)
	for _, e := range c.file.Trust.TPM.Enrolled {
		known = append(known, "enrolled:"+e.Name)
	}
	known = append(known, namesOf("ak-root:", c.file.Trust.TPM.AKRoots)...)
	if carrier := pr.carrier(); carrier != "" {
		known = []string{string(carrier)}
	}
	c.vouchers(t.Trust, known, at.to("trust"))
	t.checkGCE(c, at.to("gce"))
	c.checkPCRs(t.PCRs, sha256.Size, at.to("pcrs"))
}

// checkGCE demands that whoever trusts Google's vTPMs says whose.
func (t *TPMProfile) checkGCE(c *checker, at path) {
	rented := slices.ContainsFunc(c.file.Trust.TPM.AKRoots, func(r Root) bool {
		return r.Builtin == "google" && slices.Contains(t.Trust, "ak-root:"+r.Name)
	})
	c.demand(!rented || t.GCE != nil, "missing: everybody can rent an instance that Google vouches for, so the profile must name its projects", at...)
	if t.GCE != nil {
		c.demand(len(t.GCE.Projects) > 0, "empty: no project would be accepted", at.to("projects")...)
		c.filled(t.GCE.Projects, at.to("projects"))
		for name, list := range map[string][]string{"zones": t.GCE.Zones, "instances": t.GCE.Instances} {
			c.demand(list == nil || len(list) > 0, "empty: leave it out if any is meant", at.to(name)...)
			c.filled(list, at.to(name))
		}
	}
}

func (c *checker) checkPCRs(pcrs []PCR, size int, at path) {
	c.demand(len(pcrs) > 0, "empty: no register would be compared", at...)
	seen := map[uint32]bool{}
	enforced := false
	for n, r := range pcrs {
		if r.PCR == nil || *r.PCR > 23 {
			c.fail("must be a number from 0 to 23", nil, at.to(n, "pcr")...)
			return
		}
		c.demand(!seen[*r.PCR], "is named twice", at.to(n, "pcr")...)
		seen[*r.PCR] = true
		enforced = enforced || !r.WarnOnly
		c.demand(r.EventLog == "" || size == sha256.Size && (r.EventLog == "required" || r.EventLog == "optional"),
			"must be required or optional, and be left out where there is no log", at.to(n, "event_log")...)
		c.demand(len(r.Accept) > 0, "empty: no value would be accepted", at.to(n, "accept")...)
		c.hexes(r.Accept, size, at.to(n, "accept"))
		for m, v := range r.Accept {
			c.demand(r.AllowUnextended || !unextended(v),
				"is the value of a register that nothing was measured into; if that is meant, say allow_unextended: true", at.to(n, "accept", m)...)
		}
	}
	c.demand(enforced, "every register is warn_only: nothing would be enforced", at...)
}

func (t *TPMProfile) compare(d *differences, claims attestation.Claims) {
	d.trust("trust", t.Trust)
	t.compareLog(d, claims)
	if t.GCE != nil && strings.HasPrefix(claims.Trust, "ak-root:") {
		d.text("gce.project", "gce_project_id", t.GCE.Projects)
		d.flag("gce.production", "gce_production", true)
		if len(t.GCE.Zones) > 0 {
			d.text("gce.zone", "gce_zone", t.GCE.Zones)
		}
		if len(t.GCE.Instances) > 0 {
			d.text("gce.instance", "gce_instance_name", t.GCE.Instances)
		}
	}
	d.pcrs("", t.PCRs)
}

// compareLog demands that the log leads to each register that needs it. What it
// does not lead to has its value from the quote all the same.
func (t *TPMProfile) compareLog(d *differences, claims attestation.Claims) {
	if hasLog, _ := claims.Facts["event_log"].(bool); t.EventLog == "required" && !hasLog {
		d.refuse("event_log", []string{"an event log"}, cmp.Or(text(claims, "event_log_error"), "none"))
		return
	}
	for _, ref := range t.PCRs {
		register := fmt.Sprintf("pcr%d", *ref.PCR)
		got, ok := claims.Measurements[register]
		why := got.Unexplained
		if ref.EventLog == "required" && why == "" && len(got.Events) == 0 {
			why = "no events"
		}
		if !ok || why == "" || cmp.Or(ref.EventLog, t.EventLog) != "required" {
			continue
		}
		m := Mismatch{Profile: d.profile, Field: register + ".event_log", Expected: []string{"events that lead to its value"}, Found: why}
		if ref.WarnOnly {
			d.soft = append(d.soft, m)
		} else {
			d.hard = append(d.hard, m)
		}
	}
}

func (d *differences) pcrs(prefix string, pcrs []PCR) {
	for _, ref := range pcrs {
		register := fmt.Sprintf("pcr%d", *ref.PCR)
		got, ok := d.claims.Measurements[register]
		if ok && ref.AllowUnextended {
			if value := hex.EncodeToString(got.Value); unextended(value) && slices.Contains(ref.Accept, value) {
				continue
			}
		}
		d.values(prefix+register, register, Values{Accept: ref.Accept, WarnOnly: ref.WarnOnly}, ref.Events)
	}
}
