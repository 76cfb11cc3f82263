package policy

import (
	"cmp"
	"encoding/hex"
	"fmt"
	"slices"

	"github.com/keyagent/keyagent/attestation"
)

// Reference makes a profile that accepts exactly what claims say, for a machine
// that is trusted for another reason. source says to people where the values come
// from. The trust of each section is the claims' own, or what is built in.
//
// It accepts the chip or platform that the claims name. Where they name none, as a
// report with a masked chip ID, it says nothing of it, and is no whole policy
// before somebody decides: the check of a policy demands that.
//
// A machine that may be read by its host gives no profile, since none would ever
// accept it.
func Reference(name, source string, claims []attestation.Claims) (*Profile, error) {
	p := &Profile{Name: name}
	for _, c := range claims {
		if debug, _ := c.Facts["debug"].(bool); debug {
			return nil, fmt.Errorf("the machine runs with debugging allowed: its host can read it, and no profile accepts it")
		}
		switch c.Kind {
		case attestation.SNP:
			p.SNP = snpReference(c, source)
		case attestation.TDX:
			p.TDX = tdxReference(c, source)
		case attestation.TPM:
			p.TPM = &TPMProfile{Trust: []string{trustOr(c, "root:NAME")}, Bank: "sha256", EventLog: logOf(c), PCRs: pcrReferences(c, source)}
			if project, ok := c.Facts["gce_project_id"].(string); ok {
				p.TPM.GCE = &GCEProfile{Projects: []string{project}}
			}
		case attestation.Nitro:
			p.Nitro = &NitroProfile{Trust: []string{trustOr(c, "root:aws")}, AnyInstance: true, PCRs: pcrReferences(c, source)}
		case attestation.Azure:
			p.Azure = &AzureProfile{AnyVM: true, Allow: seen(c, azureWeaknesses)}
		case attestation.SVSM:
			p.SVSM = &SVSMProfile{}
		}
	}
	return p, nil
}

func trustOr(c attestation.Claims, unset string) string {
	if c.Trust != "" {
		return c.Trust
	}
	return unset
}

func logOf(c attestation.Claims) string {
	if has, _ := c.Facts["event_log"].(bool); has {
		return "required"
	}
	return "optional"
}

func text(c attestation.Claims, fact string) string {
	s, _ := c.Facts[fact].(string)
	return s
}

// nonzero is the list that accepts a fact as it is.
func nonzero(c attestation.Claims, fact string) []string {
	if s := text(c, fact); s != "" {
		return []string{s}
	}
	return nil
}

func number(c attestation.Claims, fact string) *uint64 {
	n, _ := c.Facts[fact].(uint64)
	return &n
}

// seen are the words of the weaknesses that the machine has.
func seen(c attestation.Claims, all []weakness) []string {
	var out []string
	for _, w := range all {
		if v, ok := c.Facts[w.fact].(bool); ok && v != w.safe {
			out = append(out, w.word)
		}
	}
	return out
}

func valueOf(c attestation.Claims, register, source string) Values {
	return Values{Accept: []string{hex.EncodeToString(c.Measurements[register].Value)}, Source: source}
}

func snpReference(c attestation.Claims, source string) *SNPProfile {
	least := func(part string) *uint64 {
		n := *number(c, "tcb_reported_"+part)
		for _, when := range []string{"committed", "current", "launch"} {
			n = min(n, *number(c, "tcb_"+when+"_"+part))
		}
		return &n
	}
	s := &SNPProfile{
		Trust: []string{trustOr(c, "root:amd")}, Products: nonzero(c, "product"), Signers: nonzero(c, "signer"),
		Measurement: valueOf(c, "measurement", source),
		MinTCB:      &SNPTCB{Bootloader: least("bootloader"), TEE: least("tee"), SNP: least("snp"), Microcode: least("microcode")},
		Chips:       nonzero(c, "chip_id"), HostData: nonzero(c, "host_data"), IDKeys: nonzero(c, "id_key_digest"), AuthorKeys: nonzero(c, "author_key_digest"),
		Allow: seen(c, snpWeaknesses),
	}
	if text(c, "signer") == "vlek" {
		s.CSPs = []string{cmp.Or(text(c, "csp_id"), "CSP")}
	}
	if text(c, "product") == "Turin" {
		s.MinTCB.FMC = least("fmc")
	}
	if vmpl := *number(c, "vmpl"); vmpl != 0 {
		s.VMPL = []uint64{vmpl}
	}
	return s
}

func tdxReference(c attestation.Claims, source string) *TDXProfile {
	status := text(c, "tcb_status")
	if status == "" {
		status = "UpToDate"
	}
	t := &TDXProfile{
		Trust: []string{trustOr(c, "root:intel")}, TCBStatus: []string{status}, MRTD: valueOf(c, "mrtd", source), EventLog: logOf(c),
		MRSEAM: Values{Accept: nonzero(c, "mr_seam"), Source: source}, XFAM: nonzero(c, "xfam"), Platforms: platforms(c),
		MinSVN:     &TDXSVN{TEETCB: text(c, "tee_tcb_svn"), QE: number(c, "qe_svn"), PCE: number(c, "pce_svn"), TCBEvaluation: number(c, "tcb_evaluation_number")},
		MRConfigID: nonzero(c, "mr_config_id"), MROwner: nonzero(c, "mr_owner"), MROwnerConfig: nonzero(c, "mr_owner_config"),
		MRServiceTD: nonzero(c, "mr_service_td"), Allow: seen(c, tdxWeaknesses),
	}
	for n := range uint32(4) {
		m, ok := c.Measurements[fmt.Sprintf("rtmr%d", n)]
		if value := hex.EncodeToString(m.Value); ok && !unextended(value) {
			t.RTMRs = append(t.RTMRs, RTMR{RTMR: &n, Accept: []string{value}, Source: source, Events: timeless(m.Events)})
		}
	}
	return t
}

// platforms are what a PCK certificate names the machine by.
func platforms(c attestation.Claims) []string {
	if id := nonzero(c, "piid"); id != nil {
		return id
	}
	return nonzero(c, "ppid")
}

func pcrReferences(c attestation.Claims, source string) []PCR {
	var out []PCR
	for n := range uint32(24) {
		m, ok := c.Measurements[fmt.Sprintf("pcr%d", n)]
		if value := hex.EncodeToString(m.Value); ok && !unextended(value) {
			ref := PCR{PCR: &n, Accept: []string{value}, Source: source, Events: timeless(m.Events)}
			if m.Unexplained != "" {
				ref.EventLog, ref.Source = "optional", source+", whose event log does not lead to it: "+cut(m.Unexplained, 200)
			}
			out = append(out, ref)
		}
	}
	return out
}

// timeless leaves out an event's place in one log.
func timeless(events []attestation.Event) []attestation.Event {
	out := slices.Clone(events)
	for i := range out {
		out[i].Seq = 0
	}
	return out
}
