package snp_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"testing"

	"github.com/google/go-sev-guest/abi"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/snp"
	"github.com/keyagent/keyagent/test/sim/amd"
)

func TestEveryProductVersionAndKeyIsAccepted(t *testing.T) {
	for _, product := range []string{"Milan", "Genoa", "Turin"} {
		chip := newChip(t, product)
		for _, version := range []uint32{2, 3, 5} {
			for _, vlek := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s, version %d, VLEK %v", product, version, vlek), func(t *testing.T) {
					r := amd.Report{Version: version, VLEK: vlek, Data: testBinder, Measurement: [48]byte{7: 1}, VMPL: 2, HostData: [32]byte{1}}
					if version == 5 {
						r.Edit = func(b []byte) { b[0x1F8], b[0x200] = 1, 1 } // vectors of mitigations
					}
					c, err := verify(t.Context(), lab(t, chip.Authority), must[*evidence](t)(chip.Evidence(r)))
					if err != nil {
						t.Fatal(err)
					}
					id, signer, csp, fmc := chip.ID[:], "vcek", "", uint64(0)
					if vlek {
						id, signer, csp = bytes.Repeat([]byte{1}, 32), "vlek", "CN=cc.example.com"
					}
					if product == "Turin" {
						fmc = 2
					}
					sum := sha256.Sum256(id)
					if c.Kind != attestation.SNP || c.Trust != "root:lab" || c.Identity != hex.EncodeToString(sum[:]) ||
						c.Epoch != hex.EncodeToString(bytes.Repeat([]byte{1}, 32)) || !bytes.Equal(c.Measurements["measurement"].Value, r.Measurement[:]) {
						t.Errorf("%+v", c)
					}
					for name, want := range map[string]any{
						"product": product, "report_version": uint64(version), "signer": signer, "csp_id": csp, "vmpl": uint64(2),
						"chip_id": hex.EncodeToString(chip.ID[:]), "host_data": "01" + hex.EncodeToString(make([]byte, 31)), "family_id": "",
						"tcb_reported_fmc": fmc, "tcb_current_bootloader": uint64(4), "tcb_committed_tee": uint64(1),
						"tcb_launch_snp": uint64(24), "tcb_reported_microcode": uint64(219), "version_current": "1.55.7", "version_committed": "1.55.6",
					} {
						if c.Facts[name] != want {
							t.Errorf("%s is %v, not %v", name, c.Facts[name], want)
						}
					}
				})
			}
		}
	}
}

// The names are a contract with the policy.
func TestTheFactsAreTheOnesThatPoliciesName(t *testing.T) {
	chip := newChip(t, "Milan")
	for name, tc := range map[string]struct {
		report amd.Report
		fact   string
	}{
		"debug":                         {amd.Report{Policy: abi.SnpPolicy{Debug: true}}, "debug"},
		"migration agent":               {amd.Report{Policy: abi.SnpPolicy{MigrateMA: true}}, "migration_agent"},
		"SMT":                           {amd.Report{Policy: abi.SnpPolicy{SMT: true}}, "smt_allowed"},
		"single socket":                 {amd.Report{Policy: abi.SnpPolicy{SingleSocket: true}}, "single_socket"},
		"CXL":                           {amd.Report{Policy: abi.SnpPolicy{CXLAllowed: true}}, "cxl_allowed"},
		"AES-256":                       {amd.Report{Policy: abi.SnpPolicy{MemAES256XTS: true}}, "aes256_xts_required"},
		"RAPL":                          {amd.Report{Policy: abi.SnpPolicy{RAPLDis: true}}, "rapl_must_be_off"},
		"ciphertext hiding":             {amd.Report{Policy: abi.SnpPolicy{CipherTextHidingDRAM: true}}, "ciphertext_hiding_required"},
		"page swap":                     {amd.Report{Policy: abi.SnpPolicy{PageSwapDisable: true}}, "page_swap_disabled"},
		"author key":                    {amd.Report{Edit: func(b []byte) { b[0x48] |= 1 }}, "author_key_enabled"},
		"masked key":                    {amd.Report{Edit: func(b []byte) { b[0x48] |= 2 }}, "mask_chip_key"},
		"platform SMT":                  {amd.Report{Platform: 1 << 0}, "platform_smt"},
		"TSME":                          {amd.Report{Platform: 1 << 1}, "platform_tsme"},
		"ECC":                           {amd.Report{Platform: 1 << 2}, "platform_ecc"},
		"RAPL off":                      {amd.Report{Platform: 1 << 3}, "platform_rapl_disabled"},
		"hiding":                        {amd.Report{Platform: 1 << 4}, "platform_ciphertext_hiding"},
		"alias check":                   {amd.Report{Platform: 1 << 5}, "platform_alias_check_complete"},
		"IOMMU write safe":              {amd.Report{Platform: 1 << 6}, "platform_iommu_write_safe"},
		"TIO":                           {amd.Report{Platform: 1 << 7}, "platform_tio"},
		"a policy bit without a name":   {amd.Report{Edit: func(b []byte) { b[0x0B] |= 0x80 }}, "unknown_bits"},
		"a platform bit without a name": {amd.Report{Edit: func(b []byte) { b[0x41] |= 1 }}, "unknown_bits"},
		"a key bit without a name":      {amd.Report{Edit: func(b []byte) { b[0x48] |= 1 << 5 }}, "unknown_bits"},
		"none":                          {amd.Report{}, ""},
	} {
		tc.report.Data = testBinder
		c, err := verify(t.Context(), lab(t, chip.Authority), must[*evidence](t)(chip.Evidence(tc.report)))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if len(c.Facts) != 61 {
			t.Errorf("%d facts", len(c.Facts))
		}
		for fact, v := range c.Facts {
			if b, ok := v.(bool); ok && b != (fact == tc.fact) {
				t.Errorf("%s: %s is %v", name, fact, b)
			}
		}
	}
	full := newChip(t, "Genoa")
	c, err := verify(t.Context(), lab(t, full.Authority), must[*evidence](t)(full.Evidence(amd.Report{Data: testBinder,
		Policy: abi.SnpPolicy{ABIMajor: 1, ABIMinor: 55}, Edit: func(b []byte) {
			b[0x04], b[0x10], b[0x20], b[0xE0], b[0x110], b[0x160] = 9, 0xA1, 0xA2, 0xA3, 0xA4, 0xA5
		}})))
	if err != nil {
		t.Fatal(err)
	}
	for fact, want := range map[string]any{"guest_svn": uint64(9), "abi_major": uint64(1), "abi_minor": uint64(55)} {
		if c.Facts[fact] != want {
			t.Errorf("%s is %v", fact, c.Facts[fact])
		}
	}
	for fact, want := range map[string]string{"family_id": "a1", "image_id": "a2", "id_key_digest": "a3", "author_key_digest": "a4", "report_id_ma": "a5"} {
		if got, _ := c.Facts[fact].(string); len(got) < 32 || got[:2] != want {
			t.Errorf("%s is %v", fact, c.Facts[fact])
		}
	}
}

func TestUnverifiedClaimsAreNamedAsTheVerifiedOnes(t *testing.T) {
	chip := newChip(t, "Turin")
	ev := must[*evidence](t)(chip.Evidence(amd.Report{Data: testBinder}))
	got := must[*snp.Report](t)(snp.Parse(ev.GetReport())).Claims()
	want, err := verify(t.Context(), lab(t, chip.Authority), ev)
	if err != nil || got.Trust != "" || got.Identity != want.Identity || got.Epoch != want.Epoch {
		t.Errorf("%v, %+v", err, got)
	}
	for name, v := range want.Facts {
		if got.Facts[name] != v {
			t.Errorf("%s is %v, then %v", name, got.Facts[name], v)
		}
	}
}

func TestASummaryIsForPeople(t *testing.T) {
	chip := newChip(t, "Milan")
	for version, product := range map[uint32]string{2: "Milan", 3: "Milan"} {
		ev := must[*evidence](t)(chip.Evidence(amd.Report{Version: version, Data: testBinder, Policy: abi.SnpPolicy{Debug: true}, HostData: [32]byte{1}}))
		var out bytes.Buffer
		must[*snp.Summary](t)(snp.Summarize(ev)).Print(&out)
		for _, want := range []string{product + ", report version", "debug", "VMPL          0", "microcode 219", "revocations   carried, valid until", hex.EncodeToString(chip.ID[:])} {
			if !bytes.Contains(out.Bytes(), []byte(want)) {
				t.Errorf("no %q in\n%s", want, out.String())
			}
		}
		ev.Certificate, ev.Crl = nil, []byte("x")
		out.Reset()
		must[*snp.Summary](t)(snp.Summarize(ev)).Print(&out)
		if bytes.Count(out.Bytes(), []byte("not carried")) != 2 {
			t.Error(out.String())
		}
	}
	_, err := snp.Summarize(&evidence{})
	refused(t, err, snp.ErrMalformed)
}
