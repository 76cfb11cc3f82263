package policy

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/facts"
)

// SNPProfile holds reference values of an SEV-SNP report. What is unset is
// refused: a list that is empty accepts only what is all zero, and a weakness
// that Allow does not name is not accepted.
type SNPProfile struct {
	Trust       []string `yaml:"trust"`    // "root:NAME"
	Products    []string `yaml:"products"` // Milan, Genoa, Turin
	Signers     []string `yaml:"signers"`  // vcek, vlek
	Measurement Values   `yaml:"measurement"`
	MinTCB      *SNPTCB  `yaml:"min_tcb"`
	// MinVersion is the least firmware version, MAJOR.MINOR.BUILD, of what runs and of
	// what can be gone back to. Empty: MinTCB alone counts.
	MinVersion string `yaml:"min_version,omitempty"`
	// Mitigations must have been in force. Reports before version 5 name none.
	Mitigations *SNPMitigations `yaml:"mitigations,omitempty"`
	MinGuestSVN *uint64         `yaml:"min_guest_svn,omitempty"`
	// Demand names further facts that must be true, such as platform_iommu_write_safe.
	Demand     []string `yaml:"demand,omitempty"`
	VMPL       []uint64 `yaml:"vmpl,omitempty"` // empty: 0 alone
	CSPs       []string `yaml:"csps,omitempty"` // whose VLEKs, as their certificates name the cloud
	Chips      []string `yaml:"chips,omitempty"`
	AnyChip    bool     `yaml:"any_chip,omitempty"`
	HostData   []string `yaml:"host_data,omitempty"`
	IDKeys     []string `yaml:"id_keys,omitempty"`     // digests
	AuthorKeys []string `yaml:"author_keys,omitempty"` // digests
	Allow      []string `yaml:"allow,omitempty"`
}

// SNPMitigations are bits of AMD's mitigation vectors that must be set.
type SNPMitigations struct {
	Launch  uint64 `yaml:"launch,omitempty"`  // when the guest was launched
	Current uint64 `yaml:"current,omitempty"` // now
}

// SNPTCB is the least security version of each part of the firmware.
type SNPTCB struct {
	FMC        *uint64 `yaml:"fmc,omitempty"` // Turin alone has one
	Bootloader *uint64 `yaml:"bootloader"`
	TEE        *uint64 `yaml:"tee"`
	SNP        *uint64 `yaml:"snp"`
	Microcode  *uint64 `yaml:"microcode"`
}

// snpWeaknesses are the properties of guest policy and platform that a profile
// has to allow by name. Debugging is not among them: a machine that its host can
// read is never accepted.
var snpWeaknesses = []weakness{
	{"smt", facts.SNPSMTAllowed, false},
	{"multi-socket", facts.SNPSingleSocket, true},
	{"migration-agent", facts.SNPMigrationAgent, false},
	{"cxl", facts.SNPCXLAllowed, false},
	{"alias-check-incomplete", facts.SNPPlatformAliasCheck, true},
	{"visible-ciphertext", facts.SNPPlatformCiphertextHiding, true},
	{"rapl", facts.SNPPlatformRAPLDisabled, true},
	{"trusted-io", facts.SNPPlatformTIO, false},
	{"unknown-bits", facts.SNPUnknownBits, false},
}

// Check implements Section.
func (s *SNPProfile) Check(c *Checker, _ *Profile, at Path) {
	c.Vouchers(s.Trust, namesOf("root:", c.trust.SNP().Roots), at.To("trust"))
	c.Demand(len(s.Products) > 0, "empty: no product would be accepted", at.To("products")...)
	c.OneOf(s.Products, products, at.To("products"))
	c.Demand(len(s.Signers) > 0, "empty: neither vcek nor vlek would be accepted", at.To("signers")...)
	c.OneOf(s.Signers, []string{"vcek", "vlek"}, at.To("signers"))
	c.Demand(slices.Contains(s.Signers, "vlek") == (len(s.CSPs) > 0), "must name the clouds whose VLEKs are accepted, and only with vlek among the signers", at.To("csps")...)
	s.Measurement.check(c, 48, at.To("measurement"))
	c.Demand(!s.Measurement.WarnOnly, "must not be warn_only: nothing else says what runs", at.To("measurement")...)
	if s.MinTCB == nil {
		c.Fail("missing: every version of the firmware would be accepted", nil, at.To("min_tcb")...)
		return
	}
	for name, part := range s.MinTCB.parts() {
		if name != "fmc" || slices.Contains(s.Products, "Turin") {
			c.Set(part, 255, at.To("min_tcb", name))
		}
	}
	s.checkDemands(c, at)
	for n, v := range s.VMPL {
		c.Demand(v <= 3, "must be a number from 0 to 3", at.To("vmpl", n)...)
	}
	c.ListOrAny(s.Chips, s.AnyChip, "any_chip", at.To("chips"))
	c.Hexes(s.Chips, 64, at.To("chips"))
	c.Hexes(s.HostData, 32, at.To("host_data"))
	c.Hexes(s.IDKeys, 48, at.To("id_keys"))
	c.Hexes(s.AuthorKeys, 48, at.To("author_keys"))
	c.OneOf(s.Allow, words(snpWeaknesses), at.To("allow"))
}

func (t *SNPTCB) parts() map[string]*uint64 {
	return map[string]*uint64{"fmc": t.FMC, "bootloader": t.Bootloader, "tee": t.TEE, "snp": t.SNP, "microcode": t.Microcode}
}

// Compare implements Section.
func (s *SNPProfile) Compare(d *Differences, claims attestation.Claims) {
	d.Trust("snp.trust", s.Trust)
	d.Text("snp.product", facts.SNPProduct, s.Products)
	d.Text("snp.signer", facts.SNPSigner, s.Signers)
	if signer, _ := facts.SNPSigner.Of(claims); signer == "vlek" && slices.Contains(s.Signers, signer) {
		d.Text("snp.csp", facts.SNPCSP, s.CSPs)
	}
	d.Values("snp.measurement", "measurement", s.Measurement, nil)
	// The reported version is what the certificate stands for; a committed one
	// that is lower could be gone back to, and a launch under a lower one
	// happened under firmware that is not good enough.
	for _, when := range []string{"reported", "committed", "current", "launch"} {
		for _, name := range []string{"fmc", "bootloader", "tee", "snp", "microcode"} {
			if least := s.MinTCB.parts()[name]; least != nil {
				d.AtLeast(fmt.Sprintf("snp.tcb.%s.%s", when, name), facts.SNPTCB(when, name), *least)
			}
		}
	}
	s.compareDemands(d)
	vmpl, ok := facts.SNPVMPL.Of(claims)
	if accept := append([]uint64(nil), s.VMPL...); !ok || !slices.Contains(orZero(accept), vmpl) {
		d.Refuse("snp.vmpl", []string{fmt.Sprint(orZero(accept))}, fmt.Sprint(claims.Facts[string(facts.SNPVMPL)]))
	}
	if !s.AnyChip {
		d.Text("snp.chip", facts.SNPChipID, s.Chips)
	}
	d.Text("snp.host_data", facts.SNPHostData, s.HostData)
	d.Text("snp.id_key", facts.SNPIDKey, s.IDKeys)
	d.Text("snp.author_key", facts.SNPAuthorKey, s.AuthorKeys)
	d.Flag("snp.debug", facts.Debug, false)
	d.weaknesses("snp", snpWeaknesses, s.Allow)
}

// Allowed says what the section leaves open.
func (s *SNPProfile) Allowed() (string, []string) { return every("chip", s.AnyChip), s.Allow }

// checkDemands checks what a profile may demand and need not.
func (s *SNPProfile) checkDemands(c *Checker, at Path) {
	_, err := versionOf(s.MinVersion)
	c.Demand(s.MinVersion == "" || err == nil, "must be a firmware version such as 1.55.29", at.To("min_version")...)
	var known []string
	for _, f := range facts.SNPGuarantees {
		known = append(known, string(f))
	}
	c.OneOf(s.Demand, known, at.To("demand"))
	if s.MinGuestSVN != nil {
		c.Set(s.MinGuestSVN, 1<<32-1, at.To("min_guest_svn"))
	}
	if m := s.Mitigations; m != nil {
		c.Demand(m.Launch != 0 || m.Current != 0, "empty: no mitigation is demanded", at.To("mitigations")...)
	}
}

func (s *SNPProfile) compareDemands(d *Differences) {
	if s.MinVersion != "" {
		for field, fact := range map[string]facts.Fact[string]{"snp.version.current": facts.SNPVersionCurrent, "snp.version.committed": facts.SNPVersionCommitted} {
			least, _ := versionOf(s.MinVersion)
			text, _ := fact.Of(d.claims)
			if got, err := versionOf(text); err != nil || slices.Compare(got[:], least[:]) < 0 {
				d.Refuse(field, []string{"at least " + s.MinVersion}, text)
			}
		}
	}
	if s.MinGuestSVN != nil {
		d.AtLeast("snp.guest_svn", facts.SNPGuestSVN, *s.MinGuestSVN)
	}
	if m := s.Mitigations; m != nil {
		d.Bits("snp.mitigations.launch", facts.SNPLaunchMitigations, m.Launch)
		d.Bits("snp.mitigations.current", facts.SNPCurrentMitigations, m.Current)
	}
	for _, name := range s.Demand {
		d.Flag("snp."+name, facts.Fact[bool](name), true)
	}
}

// versionOf reads a firmware version, MAJOR.MINOR.BUILD.
func versionOf(text string) (v [3]uint64, err error) {
	parts := strings.Split(text, ".")
	if len(parts) != len(v) {
		return v, fmt.Errorf("%q is no firmware version", text)
	}
	for i, part := range parts {
		if v[i], err = strconv.ParseUint(part, 10, 8); err != nil {
			return v, err
		}
	}
	return v, nil
}

func orZero(list []uint64) []uint64 {
	if len(list) == 0 {
		return []uint64{0}
	}
	return list
}
