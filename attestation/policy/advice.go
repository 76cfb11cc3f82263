package policy

import (
	"fmt"
	"slices"
	"strings"
)

// Advice is what is allowed in a policy and seldom meant, in sentences for people.
func (p *Policy) Advice() []string {
	var out []string
	say := func(format string, args ...any) { out = append(out, fmt.Sprintf(format, args...)) }
	if p.version == openEnded {
		say("a policy of version 1 that is cut off may be read as a shorter one: write \"version: %d\", and %q as the last line", withEnd, end)
	}
	for i := range p.profiles {
		pr := &p.profiles[i]
		if t := pr.TPM(); t != nil {
			for _, r := range t.PCRs {
				if r.PCR != nil && resettable(*r.PCR) {
					say("profile %q compares PCR %d, which any software on the machine can reset: it says nothing of how the machine booted", pr.Name, *r.PCR)
				}
			}
		}
		if s := pr.SNP(); s != nil && s.MinTCB != nil && s.MinTCB.none() {
			say("profile %q accepts every version of the firmware: its min_tcb is zeros", pr.Name)
		}
		if t := pr.TDX(); t != nil && t.MinSVN != nil && t.MinSVN.none() {
			say("profile %q accepts every version of the TDX module: its min_svn is zeros", pr.Name)
		}
	}
	for i := range p.grants {
		for _, name := range p.grants[i].Profiles {
			if slices.Contains(p.replicas, name) {
				say("profile %q is in replicas and in grant %q: each machine that gets volumes by it may have the master secret, and with it every volume", name, p.grants[i].Name)
			}
		}
	}
	return out
}

// resettable are the registers that TPM2_PCR_Reset clears at locality 0 (TCG PC
// Client Platform TPM Profile, table of PCR attributes): 16, for debugging, and 23,
// for applications.
func resettable(pcr uint32) bool { return pcr == 16 || pcr == 23 }

func (t *SNPTCB) none() bool {
	for _, part := range t.parts() {
		if part != nil && *part > 0 {
			return false
		}
	}
	return true
}

func (s *TDXSVN) none() bool {
	for _, part := range []*uint64{s.QE, s.PCE, s.TCBEvaluation} {
		if part != nil && *part > 0 {
			return false
		}
	}
	return strings.Trim(s.TEETCB, "0") == ""
}
