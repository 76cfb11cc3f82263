package kinds

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	tdxdata "github.com/google/go-tdx-guest/testing/testdata"
	"go.yaml.in/yaml/v3"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/azure"
	"github.com/keyagent/keyagent/attestation/policy"
	"github.com/keyagent/keyagent/attestation/snp"
	"github.com/keyagent/keyagent/attestation/tdx"
)

// genuine are claims of real evidence, as a verifier would give them: packages snp,
// tdx and azure test that it verifies.
func genuine(t *testing.T) map[string][]attestation.Claims {
	t.Helper()
	all := map[string][]attestation.Claims{}
	reports := must[[]string](t)(filepath.Glob("../snp/testdata/real/*.report"))
	if len(reports) < 8 {
		t.Fatalf("only %d reports", len(reports))
	}
	for _, path := range reports {
		r := must[*snp.Report](t)(snp.Parse(must[[]byte](t)(os.ReadFile(path))))
		c := r.Claims()
		c.Trust = "root:amd"
		if c.Facts["product"] == "" {
			c.Facts["product"] = "Milan" // a report of version 2 does not say, its certificate does
		}
		if c.Facts["signer"] == "vlek" {
			c.Facts["csp_id"] = "CN=cc-us-east-2.amazonaws.com"
		}
		all[filepath.Base(path)] = []attestation.Claims{c}
	}
	extra := []byte("\nextra bytes(only for testing purpose)\n")
	c := must[attestation.Claims](t)(tdx.UnverifiedClaims(&attestv1.TDXEvidence{Quote: bytes.TrimSuffix(tdxdata.RawQuote, extra)}))
	c.Trust = "root:intel"
	c.Facts["tcb_status"], c.Facts["tcb_evaluation_number"] = "UpToDate", uint64(15) // what collateral says
	all["tdx SPR E4"] = []attestation.Claims{c}
	return all
}

// accepting makes a policy of a machine's own reference values, by way of a file.
func accepting(t *testing.T, claims []attestation.Claims) (*policy.Policy, error) {
	t.Helper()
	profile, err := policy.Reference(policy.Builtin(), "real", "a real machine", claims)
	if err != nil {
		return nil, err
	}
	if s := profile.SNP(); s != nil && len(s.Chips) == 0 {
		s.AnyChip = true // its report is under a key of the cloud's, and names no chip
	}
	var out bytes.Buffer
	if err := yaml.NewEncoder(&out).Encode(profile); err != nil {
		t.Fatal(err)
	}
	text := `version: 1
lifetime: 1h
trust:
  snp: {roots: [{name: amd, builtin: amd}]}
  tdx: {roots: [{name: intel, builtin: intel}]}
profiles:
  - ` + strings.ReplaceAll(strings.TrimSpace(out.String()), "\n", "\n    ") + `
grants:
  - {name: all, profiles: [real], volumes: ["*"], operations: [open]}
`
	return policy.Parse(policy.Builtin(), "policy.yaml", []byte(text))
}

// undecided are facts that no rule of a policy looks at; expressions may.
var undecided = []string{
	"report_version", "guest_svn", "family_id", "image_id", "report_id", "report_id_ma", "chip_id", "abi_major", "abi_minor",
	"aes256_xts_required", "rapl_must_be_off", "ciphertext_hiding_required", "page_swap_disabled", "author_key_enabled", "mask_chip_key",
	"policy_unknown_bits", "platform_unknown_bits", "key_unknown_bits", // unknown_bits has them
	"platform_smt", "platform_tsme", "platform_ecc", "version_current", "version_committed",
	"quote_version", "tee_tcb_svn_2", "pks", "fmspc", "ppid", "piid", "pce_id", "cpu_svn", "qe_tcb_status", "module_tcb_status", "tcb_date",
	"advisories", "ca", "dynamic_platform", "cached_keys", "smt_enabled", "event_log",
	"td_attributes", // its bits are facts of their own
}

// Real machines fit their own reference values; with one fact or measurement that
// decides changed they do not, and the refusal is of one field.
func TestARealMachineFitsItsOwnReferenceValuesAndNoOthers(t *testing.T) {
	judge := func(p *policy.Policy, claims []attestation.Claims) error {
		v := must[*attestation.Verified](t)(attestation.NewVerified(attestation.Binder{}, time.Now(), claims...))
		_, err := p.Appraise(v)
		return err
	}
	for name, claims := range genuine(t) {
		t.Run(name, func(t *testing.T) {
			p, err := accepting(t, claims)
			if debug := claims[0].Facts["debug"] == true; debug {
				if err == nil {
					t.Error("a machine with debugging has reference values")
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if err := judge(p, claims); err != nil {
				t.Fatal(err)
			}
			decided := 0
			for fact, value := range claims[0].Facts {
				other, changes := worse(value)
				if !changes || slices.Contains(undecided, fact) || better(fact, value) || (fact == "csp_id" && value == "") {
					continue
				}
				decided++
				claims[0].Facts[fact] = other
				err := judge(p, claims)
				var m *policy.MismatchError
				if !errors.As(err, &m) || len(m.Mismatches) != 1 {
					t.Errorf("%s %v instead of %v: %v", fact, other, value, err)
				}
				claims[0].Facts[fact] = value
			}
			for register, m := range claims[0].Measurements {
				if len(m.Value) == 0 {
					continue
				}
				changed := bytes.Clone(m.Value)
				changed[0] ^= 1
				claims[0].Measurements[register] = attestation.Measurement{Value: changed}
				if err := judge(p, claims); !errors.Is(err, policy.ErrMismatch) {
					t.Errorf("another %s: %v", register, err)
				}
				claims[0].Measurements[register] = m
				decided++
			}
			if decided < 15 {
				t.Errorf("only %d facts decide", decided)
			}
		})
	}
}

// worse is another value of a fact, one that a minimum refuses.
func worse(value any) (any, bool) {
	switch v := value.(type) {
	case bool:
		return !v, true
	case string:
		if v == "" {
			return strings.Repeat("01", 48), true
		}
		return strings.Repeat("00", len(v)/2), true
	case uint64:
		return uint64(0), v > 0
	}
	return nil, false
}

// better is a fact whose other value is no weakness of this machine: the profile
// allows the worse of the two.
func better(fact string, value any) bool {
	safe := map[string]bool{
		"smt_allowed": false, "single_socket": true, "migration_agent": false, "cxl_allowed": false, "platform_alias_check_complete": true,
		"platform_ciphertext_hiding": true, "platform_rapl_disabled": true, "platform_tio": false, "platform_iommu_write_safe": true, "unknown_bits": false,
		"migratable": false, "sept_ve_disable": true, "key_locker": false, "perfmon": false,
	}
	want, ok := safe[fact]
	return ok && value != want
}

// Real reports of Azure's are read, for reference values.
func TestRealReportsOfAzureAreRead(t *testing.T) {
	paths := must[[]string](t)(filepath.Glob("../azure/testdata/*.bin"))
	for _, path := range paths {
		if r, err := azure.Parse(must[[]byte](t)(os.ReadFile(path))); err != nil || r.Claims().Facts["vm_id"] == "" {
			t.Errorf("%s: %v", path, err)
		}
	}
	if len(paths) == 0 {
		t.Error(fmt.Errorf("no reports"))
	}
}
