package policy

import (
	"errors"
	"strings"
	"testing"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/facts"
)

// What a profile of SNP may demand beyond what it must.
func TestWhatASNPProfileDemands(t *testing.T) {
	text := strings.Replace(plain(hardware), "      chips:", "      min_version: 1.55.29\n      min_guest_svn: 2\n      mitigations: {launch: 0x3, current: 0x5}\n      demand: [platform_iommu_write_safe]\n      chips:", 1)
	good := func() attestation.Claims {
		c := snpClaims()
		facts.SNPVersionCurrent.Put(c.Facts, "1.55.61")
		facts.SNPVersionCommitted.Put(c.Facts, "1.55.29")
		facts.SNPGuestSVN.Put(c.Facts, 2)
		facts.SNPLaunchMitigations.Put(c.Facts, 0x3f)
		facts.SNPCurrentMitigations.Put(c.Facts, 0x5)
		facts.SNPPlatformIOMMUWriteSafe.Put(c.Facts, true)
		return c
	}
	if a, err := parse(t, text).Appraise(verified(t, good())); err != nil || a.Profile != "snp" {
		t.Fatalf("%+v, %v", a, err)
	}
	for field, change := range map[string]func(set map[string]any){
		"snp.version.current":           func(set map[string]any) { facts.SNPVersionCurrent.Put(set, "1.55.28") },
		"snp.version.committed":         func(set map[string]any) { facts.SNPVersionCommitted.Put(set, "0.255.255") },
		"snp.guest_svn":                 func(set map[string]any) { facts.SNPGuestSVN.Put(set, 1) },
		"snp.mitigations.launch":        func(set map[string]any) { facts.SNPLaunchMitigations.Put(set, 0x2) },
		"snp.mitigations.current":       func(set map[string]any) { delete(set, string(facts.SNPCurrentMitigations)) },
		"snp.platform_iommu_write_safe": func(set map[string]any) { facts.SNPPlatformIOMMUWriteSafe.Put(set, false) },
	} {
		c := good()
		change(c.Facts)
		var m *MismatchError
		if _, err := parse(t, text).Appraise(verified(t, c)); !errors.As(err, &m) || len(m.Mismatches) != 1 || m.Mismatches[0].Field != field {
			t.Errorf("%s: %v", field, err)
		}
	}
	for from, to := range map[string]string{"1.55.29": "1.55", "launch: 0x3, current: 0x5": "", "[platform_iommu_write_safe]": "[platform_tio]"} {
		if _, err := Parse(Builtin(), "policy.yaml", []byte(strings.Replace(text, from, to, 1))); err == nil {
			t.Errorf("%q in place of %q is accepted", to, from)
		}
	}
}
