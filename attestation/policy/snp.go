package policy

import (
	"fmt"
	"slices"

	"github.com/keyagent/keyagent/attestation"
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
	VMPL        []uint64 `yaml:"vmpl,omitempty"` // empty: 0 alone
	CSPs        []string `yaml:"csps,omitempty"` // whose VLEKs, as their certificates name the cloud
	Chips       []string `yaml:"chips,omitempty"`
	AnyChip     bool     `yaml:"any_chip,omitempty"`
	HostData    []string `yaml:"host_data,omitempty"`
	IDKeys      []string `yaml:"id_keys,omitempty"`     // digests
	AuthorKeys  []string `yaml:"author_keys,omitempty"` // digests
	Allow       []string `yaml:"allow,omitempty"`
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
	{"smt", "smt_allowed", false},
	{"multi-socket", "single_socket", true},
	{"migration-agent", "migration_agent", false},
	{"cxl", "cxl_allowed", false},
	{"alias-check-incomplete", "platform_alias_check_complete", true},
	{"visible-ciphertext", "platform_ciphertext_hiding", true},
	{"rapl", "platform_rapl_disabled", true},
	{"trusted-io", "platform_tio", false},
}

func (*SNPProfile) kind() attestation.Kind { return attestation.SNP }

func (s *SNPProfile) check(c *checker, _ *Profile, at path) {
	c.vouchers(s.Trust, namesOf("root:", c.file.Trust.SNP.Roots), at.to("trust"))
	c.demand(len(s.Products) > 0, "empty: no product would be accepted", at.to("products")...)
	c.oneOf(s.Products, products, at.to("products"))
	c.demand(len(s.Signers) > 0, "empty: neither vcek nor vlek would be accepted", at.to("signers")...)
	c.oneOf(s.Signers, []string{"vcek", "vlek"}, at.to("signers"))
	c.demand(slices.Contains(s.Signers, "vlek") == (len(s.CSPs) > 0), "must name the clouds whose VLEKs are accepted, and only with vlek among the signers", at.to("csps")...)
	s.Measurement.check(c, 48, at.to("measurement"))
	c.demand(!s.Measurement.WarnOnly, "must not be warn_only: nothing else says what runs", at.to("measurement")...)
	if s.MinTCB == nil {
		c.fail("missing: every version of the firmware would be accepted", nil, at.to("min_tcb")...)
		return
	}
	for name, part := range s.MinTCB.parts() {
		if name != "fmc" || slices.Contains(s.Products, "Turin") {
			c.set(part, 255, at.to("min_tcb", name))
		}
	}
	for n, v := range s.VMPL {
		c.demand(v <= 3, "must be a number from 0 to 3", at.to("vmpl", n)...)
	}
	c.listOrAny(s.Chips, s.AnyChip, "any_chip", at.to("chips"))
	c.hexes(s.Chips, 64, at.to("chips"))
	c.hexes(s.HostData, 32, at.to("host_data"))
	c.hexes(s.IDKeys, 48, at.to("id_keys"))
	c.hexes(s.AuthorKeys, 48, at.to("author_keys"))
	c.oneOf(s.Allow, words(snpWeaknesses), at.to("allow"))
}

func (t *SNPTCB) parts() map[string]*uint64 {
	return map[string]*uint64{"fmc": t.FMC, "bootloader": t.Bootloader, "tee": t.TEE, "snp": t.SNP, "microcode": t.Microcode}
}

func (s *SNPProfile) compare(d *differences, claims attestation.Claims) {
	d.trust("snp.trust", s.Trust)
	d.text("snp.product", "product", s.Products)
	d.text("snp.signer", "signer", s.Signers)
	if signer, _ := claims.Facts["signer"].(string); signer == "vlek" && slices.Contains(s.Signers, signer) {
		d.text("snp.csp", "csp_id", s.CSPs)
	}
	d.values("snp.measurement", "measurement", s.Measurement, nil)
	// The reported version is what the certificate stands for; a committed one
	// that is lower could be gone back to, and a launch under a lower one
	// happened under firmware that is not good enough.
	for _, when := range []string{"reported", "committed", "current", "launch"} {
		for _, name := range []string{"fmc", "bootloader", "tee", "snp", "microcode"} {
			if least := s.MinTCB.parts()[name]; least != nil {
				d.atLeast(fmt.Sprintf("snp.tcb.%s.%s", when, name), fmt.Sprintf("tcb_%s_%s", when, name), *least)
			}
		}
	}
	vmpl, ok := claims.Facts["vmpl"].(uint64)
	if accept := append([]uint64(nil), s.VMPL...); !ok || !slices.Contains(orZero(accept), vmpl) {
		d.refuse("snp.vmpl", []string{fmt.Sprint(orZero(accept))}, fmt.Sprint(claims.Facts["vmpl"]))
	}
	if !s.AnyChip {
		d.text("snp.chip", "chip_id", s.Chips)
	}
	d.text("snp.host_data", "host_data", s.HostData)
	d.text("snp.id_key", "id_key_digest", s.IDKeys)
	d.text("snp.author_key", "author_key_digest", s.AuthorKeys)
	d.flag("snp.debug", "debug", false)
	d.weaknesses("snp", snpWeaknesses, s.Allow)
}

func orZero(list []uint64) []uint64 {
	if len(list) == 0 {
		return []uint64{0}
	}
	return list
}
