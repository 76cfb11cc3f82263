package policy

import (
	"cmp"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/facts"
)

// ErrMasked means that a report signed by a chip's own key does not say which chip.
var ErrMasked = errors.New("the report's chip ID is masked, so that its key's certificate cannot be compared with it")

// Reference makes a profile that accepts exactly what claims say, for a machine
// that is trusted for another reason. source says to people where the values come
// from. The trust of each section is the claims' own, or what is built in.
//
// It accepts the chip or platform that the claims name. Where they name none, as a
// report of a VLEK may, it says nothing of it, and is no whole policy before somebody
// decides: the check of a policy demands that.
//
// A machine that its host may read, or whose chip its host hides ([ErrMasked]), gives no
// profile: no verifier would ever accept it.
func Reference(kinds []Kind, name, source string, claims []attestation.Claims) (*Profile, error) {
	p := &Profile{Name: name}
	for i := range kinds {
		k := &kinds[i]
		n := slices.IndexFunc(claims, func(c attestation.Claims) bool { return c.Kind == k.Name })
		if n < 0 {
			continue
		}
		if debug, _ := facts.Debug.Of(claims[n]); debug {
			return nil, fmt.Errorf("the machine runs with debugging allowed: its host can read it, and no profile accepts it")
		}
		s, err := k.Reference(claims[n], source)
		if err != nil {
			return nil, err
		}
		p.parts = append(p.parts, part{k, s})
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
	if has, _ := facts.EventLog.Of(c); has {
		return "required"
	}
	return "optional"
}

func text(c attestation.Claims, fact facts.Fact[string]) string {
	s, _ := fact.Of(c)
	return s
}

// nonzero is the list that accepts a fact as it is.
func nonzero(c attestation.Claims, fact facts.Fact[string]) []string {
	if s := text(c, fact); s != "" {
		return []string{s}
	}
	return nil
}

func number(c attestation.Claims, fact facts.Fact[uint64]) *uint64 {
	n, _ := fact.Of(c)
	return &n
}

// seen are the words of the weaknesses that the machine has.
func seen(c attestation.Claims, all []weakness) []string {
	var out []string
	for _, w := range all {
		if v, ok := w.fact.Of(c); ok && v != w.safe {
			out = append(out, w.word)
		}
	}
	return out
}

func valueOf(c attestation.Claims, register, source string) Values {
	return Values{Accept: []string{hex.EncodeToString(c.Measurements[register].Value)}, Source: source}
}

func snpReference(c attestation.Claims, source string) (Section, error) {
	if text(c, facts.SNPSigner) == "vcek" && text(c, facts.SNPChipID) == "" {
		return nil, ErrMasked
	}
	least := func(part string) *uint64 {
		n := *number(c, facts.SNPTCB("reported", part))
		for _, when := range []string{"committed", "current", "launch"} {
			n = min(n, *number(c, facts.SNPTCB(when, part)))
		}
		return &n
	}
	s := &SNPProfile{
		Trust: []string{trustOr(c, "root:amd")}, Products: nonzero(c, facts.SNPProduct), Signers: nonzero(c, facts.SNPSigner),
		Measurement: valueOf(c, "measurement", source),
		MinTCB:      &SNPTCB{Bootloader: least("bootloader"), TEE: least("tee"), SNP: least("snp"), Microcode: least("microcode")},
		Chips:       nonzero(c, facts.SNPChipID), HostData: nonzero(c, facts.SNPHostData), IDKeys: nonzero(c, facts.SNPIDKey), AuthorKeys: nonzero(c, facts.SNPAuthorKey),
		Allow: seen(c, snpWeaknesses),
	}
	if text(c, facts.SNPSigner) == "vlek" {
		s.CSPs = []string{cmp.Or(text(c, facts.SNPCSP), "CSP")}
	}
	if text(c, facts.SNPProduct) == "Turin" {
		s.MinTCB.FMC = least("fmc")
	}
	if launch, current := *number(c, facts.SNPLaunchMitigations), *number(c, facts.SNPCurrentMitigations); launch|current != 0 {
		s.Mitigations = &SNPMitigations{Launch: launch, Current: current}
	}
	if safe, _ := facts.SNPPlatformIOMMUWriteSafe.Of(c); safe {
		s.Demand = []string{string(facts.SNPPlatformIOMMUWriteSafe)}
	}
	if vmpl := *number(c, facts.SNPVMPL); vmpl != 0 {
		s.VMPL = []uint64{vmpl}
	}
	return s, nil
}

func tdxReference(c attestation.Claims, source string) (Section, error) {
	status := text(c, facts.TDXTCBStatus)
	if status == "" {
		status = "UpToDate"
	}
	t := &TDXProfile{
		Trust: []string{trustOr(c, "root:intel")}, TCBStatus: []string{status}, MRTD: valueOf(c, "mrtd", source), EventLog: logOf(c),
		MRSEAM: Values{Accept: nonzero(c, facts.TDXMRSEAM), Source: source}, XFAM: nonzero(c, facts.TDXXFAM), Platforms: platforms(c),
		MinSVN:     &TDXSVN{TEETCB: text(c, facts.TDXTEETCBSVN), QE: number(c, facts.TDXQESVN), PCE: number(c, facts.TDXPCESVN), TCBEvaluation: number(c, facts.TDXTCBEvaluation)},
		MRConfigID: nonzero(c, facts.TDXMRConfigID), MROwner: nonzero(c, facts.TDXMROwner), MROwnerConfig: nonzero(c, facts.TDXMROwnerConfig),
		MRServiceTD: nonzero(c, facts.TDXMRServiceTD), Allow: seen(c, tdxWeaknesses),
	}
	for n := range uint32(4) {
		m, ok := c.Measurements[fmt.Sprintf("rtmr%d", n)]
		if value := hex.EncodeToString(m.Value); ok && !unextended(value) {
			ref := RTMR{RTMR: &n, Accept: []string{value}, Source: source, Events: timeless(m.Events)}
			ref.EventLog, ref.Source = unexplained(m, source)
			t.RTMRs = append(t.RTMRs, ref)
		}
	}
	return t, nil
}

// platforms are what a PCK certificate names the machine by.
func platforms(c attestation.Claims) []string {
	if id := nonzero(c, facts.TDXPIID); id != nil {
		return id
	}
	return nonzero(c, facts.TDXPPID)
}

func pcrReferences(c attestation.Claims, source string) []PCR {
	var out []PCR
	for n := range uint32(24) {
		m, ok := c.Measurements[fmt.Sprintf("pcr%d", n)]
		if value := hex.EncodeToString(m.Value); ok && !unextended(value) {
			ref := PCR{PCR: &n, Accept: []string{value}, Source: source, Events: timeless(m.Events)}
			ref.EventLog, ref.Source = unexplained(m, source)
			out = append(out, ref)
		}
	}
	return out
}

// unexplained is what a profile says of a register's log, and of where its value is
// from.
func unexplained(m attestation.Measurement, source string) (eventLog, from string) {
	if m.Unexplained == "" {
		return "", source
	}
	return "optional", source + ", whose event log does not lead to it: " + cut(m.Unexplained, 200)
}

// timeless leaves out an event's place in one log.
func timeless(events []attestation.Event) []attestation.Event {
	out := slices.Clone(events)
	for i := range out {
		out[i].Seq = 0
	}
	return out
}
