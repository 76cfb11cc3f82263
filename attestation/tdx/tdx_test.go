package tdx

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"reflect"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/test/sim/intel"
)

// shapes are the quotes that exist: their versions, bodies and authorities.
var shapes = []struct {
	name   string
	change func(p *intel.Platform, f *intel.Fields)
}{
	{"version 4, platform CA", func(*intel.Platform, *intel.Fields) {}},
	{"version 4, processor CA", func(p *intel.Platform, _ *intel.Fields) { p.CA = "processor" }},
	{"version 4, module 1.0", func(_ *intel.Platform, f *intel.Fields) { f.TCBSVN = [16]byte{5, 0, 6} }},
	{"version 5, TD report 1.0", func(_ *intel.Platform, f *intel.Fields) { f.Version = 5 }},
	{"version 5, TD report 1.5", func(_ *intel.Platform, f *intel.Fields) { f.Version, f.Body15, f.Service = 5, true, [48]byte{7} }},
	{"version 5, processor CA", func(p *intel.Platform, f *intel.Fields) { p.CA, f.Version, f.Body15 = "processor", 5, true }},
}

func TestGenuineQuotesAreAccepted(t *testing.T) {
	for _, shape := range shapes {
		t.Run(shape.name, func(t *testing.T) {
			s := newScene(t, shape.change)
			c := s.accepted()
			if c.Kind != attestation.TDX || c.Trust != "root:lab" || c.Via != "" || c.Epoch != "" || c.Identity == "" {
				t.Errorf("%+v", c)
			}
			if data, _ := proto.Marshal(s.ev); c.EvidenceDigest != sha256.Sum256(data) {
				t.Error("the digest is not that of the evidence")
			}
			for i, v := range s.fields.RTMR {
				m := c.Measurements[register(i)]
				if !reflect.DeepEqual(m.Value, v[:]) || (i < 3) != (len(m.Events) > 0) {
					t.Errorf("rtmr%d: %x with %d events", i, m.Value, len(m.Events))
				}
			}
			if c.Measurements["rtmr2"].Events[1].Name != "kernel command line (.cmdline)" {
				t.Errorf("%+v", c.Measurements["rtmr2"].Events)
			}
		})
	}
}

// TestFactsAreAContract holds the names and types that policies use.
func TestFactsAreAContract(t *testing.T) {
	s := newScene(t, shapes[4].change)
	got := s.accepted()
	p, err := parsePCK(must[*Quote](t)(Parse(s.ev.Quote)).chain)
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]any{
		"quote_version": uint64(5), "tee_tcb_svn": "05010600000000000000000000000000", "tee_tcb_svn_2": "06010600000000000000000000000000",
		"mr_seam": "09" + strings.Repeat("00", 47), "mr_signer_seam": "", "seam_attributes": "",
		"td_attributes": "0000001000000000", "xfam": "e700060000000000",
		"mr_config_id": "", "mr_owner": "", "mr_owner_config": "", "mr_service_td": "07" + strings.Repeat("00", 47),
		"debug": false, "sept_ve_disable": true, "migratable": false, "pks": false, "key_locker": false, "perfmon": false,
		"fmspc": "50806f000000", "ppid": p.PPID, "piid": p.piid, "pce_id": "0000", "cpu_svn": "08080202040100050000000000000000",
		"pce_svn": uint64(13), "qe_svn": uint64(6), "tcb_status": "UpToDate", "qe_tcb_status": "UpToDate", "module_tcb_status": "UpToDate",
		"tcb_date": "2024-03-13T00:00:00Z", "tcb_evaluation_number": uint64(17), "advisories": []string{}, "ca": "platform",
		"dynamic_platform": true, "cached_keys": false, "smt_enabled": true, "event_log": true,
	}
	for name, w := range want {
		if g := got.Facts[name]; !reflect.DeepEqual(g, w) && !(name == "advisories" && len(g.([]string)) == 0) {
			t.Errorf("%s is %#v, want %#v", name, g, w)
		}
	}
	for name := range got.Facts {
		if _, ok := want[name]; !ok {
			t.Errorf("fact %s is not in the contract", name)
		}
	}
	if got.Identity != p.piid || len(p.piid) != 32 {
		t.Errorf("identity %q, platform instance %q", got.Identity, p.piid)
	}
	processor := newScene(t, shapes[1].change).accepted()
	if _, ok := processor.Facts["smt_enabled"]; ok || processor.Identity != processor.Facts["ppid"] {
		t.Errorf("a processor's certificate says nothing of a platform: %+v", processor)
	}
}

// Attack 23: profiling by the host is debugging by another name (HGS_PLUS_PROF,
// PERF_PROF and PMT_PROF), and so is what Intel gives a name to later.
func TestEachAttributeHasItsBit(t *testing.T) {
	for bit, name := range map[int]string{0: "debug", 1: "debug", 4: "debug", 5: "debug", 6: "debug", 15: "debug", 28: "sept_ve_disable", 29: "migratable", 30: "pks", 31: "key_locker", 63: "perfmon"} {
		s := newScene(t, func(_ *intel.Platform, f *intel.Fields) { f.Attr = [8]byte{}; f.Attr[bit/8] = 1 << (bit % 8) })
		facts := s.accepted().Facts
		for _, other := range []string{"debug", "sept_ve_disable", "migratable", "pks", "key_locker", "perfmon"} {
			if facts[other] != (other == name) {
				t.Errorf("bit %d: %s is %v", bit, other, facts[other])
			}
		}
	}
}

func TestAVerifierWithoutTrustIsNotConfigured(t *testing.T) {
	if _, err := NewVerifier(VerifierOptions{}); !errors.Is(err, ErrConfiguration) {
		t.Errorf("no trust: %v", err)
	}
	s := newScene(t)
	for name, trust := range map[string]Trust{
		"no root": {}, "a root without a name": {Roots: []Root{{"", s.w.Root.Certificate}}}, "a root without a certificate": {Roots: []Root{{"x", nil}}},
	} {
		s.trust = trust
		if _, err := s.verify(); !errors.Is(err, ErrConfiguration) || errors.Is(err, attestation.ErrRefused) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestAnOfferIsRefused(t *testing.T) {
	if _, err := newScene(t).verifier().Begin(t.Context(), []byte{1}); !errors.Is(err, ErrMalformed) {
		t.Error(err)
	}
}

func TestTheEmbeddedRootIsIntels(t *testing.T) {
	r := Intel()
	if sum := sha256.Sum256(r.Certificate.Raw); hex.EncodeToString(sum[:]) != intelRootSHA256 || r.Name != "intel" {
		t.Errorf("%s: %x", r.Name, sum)
	}
	if r.Certificate.Subject.CommonName != "Intel SGX Root CA" || r.Certificate.CheckSignatureFrom(r.Certificate) != nil {
		t.Errorf("%s", r.Certificate.Subject)
	}
}

func TestTheRootThatVouchesIsNamed(t *testing.T) {
	s := newScene(t)
	s.trust.Roots = append([]Root{Intel()}, s.trust.Roots...)
	if c := s.accepted(); c.Trust != "root:lab" {
		t.Error(c.Trust)
	}
}

func TestASummaryShowsWhatIsThere(t *testing.T) {
	s := newScene(t, func(_ *intel.Platform, f *intel.Fields) { f.Attr[0] = 1 })
	s.ev.Collateral.QeIdentity = nil
	sum := must[*Summary](t)(Summarize(s.ev))
	var out strings.Builder
	sum.Print(&out)
	for _, want := range []string{"version 4", "FMSPC 50806f000000", "rtmr2", "carries          TCB info", "the host can read"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in\n%s", want, out.String())
		}
	}
	if strings.Contains(out.String(), "QE identity") || len(sum.Carried) != 3 {
		t.Errorf("%v", sum.Carried)
	}
	if _, err := Summarize(&attestv1.TDXEvidence{}); !errors.Is(err, ErrMalformed) {
		t.Error(err)
	}
}
