package policy

import (
	"crypto/sha256"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/keyagent/keyagent/attestation"
)

func offlineGrant(more string) string {
	return strings.Replace(whole, "[open, format]\n", "[open, format]\n"+more, 1)
}

func TestAGrantSaysWhatMayBeOpenedOffline(t *testing.T) {
	for text, want := range map[string]OfflineLimits{
		"":                                    {},
		"    offline: {for: 24h, boots: 3}\n": {24 * time.Hour, 3},
	} {
		p := parse(t, offlineGrant(text))
		a, err := appraise(t, p, nil)
		if err != nil {
			t.Fatal(err)
		}
		if d, err := p.Authorize(a, Request{Volume: "data-1", Operation: Open}); err != nil || d.Offline != want {
			t.Errorf("%q: %+v, %v", text, d.Offline, err)
		}
	}
	for text, want := range map[string]string{
		"    offline: {for: 24h}\n":                                      "boots must be",
		"    offline: {boots: 3}\n":                                      "for must be",
		"    offline: {}\n":                                              "for must be",
		"    offline: {for: 30s, boots: 1}\n":                            "for must be",
		"    offline: {for: 721h, boots: 1}\n":                           "for must be",
		"    offline: {for: 1h, boots: 0}\n":                             "boots must be",
		"    offline: {for: 1h, boots: 65}\n":                            "boots must be",
		"    offline: {for: 1h, boots: -1}\n":                            "boots must be",
		"    offline: {for: 1h, boots: 1, clock: wall}\n":                "clock",
		"    offline: {for: 1h, boots: 1}\n    writers: many\n":          "one writer",
		"    offline: {for: 1h, boots: 1}\n    takeover: expiry\n":       "takeover",
		"    when: 'true'\n    offline: {for: 1h, boots: 1, boots: 2}\n": "boots",
	} {
		if _, err := Parse(Builtin(), "policy.yaml", []byte(offlineGrant(text))); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", text, err)
		}
	}
	_, err := Parse(Builtin(), "policy.yaml", []byte(strings.Replace(whole, "[open, format]\n", "[format]\n    offline: {for: 1h, boots: 1}\n", 1)))
	if err == nil || !strings.Contains(err.Error(), "operation open") {
		t.Errorf("without open: %v", err)
	}
}

// A key is left only with a TPM that is the machine's own, sealed to what the profile
// enforces.
func TestAKeyIsSealedToWhatTheProfileEnforces(t *testing.T) {
	sum := func(values ...string) (out [32]byte) {
		var all []byte
		for _, v := range values {
			all = append(all, unhex(v)...)
		}
		return sha256.Sum256(all)
	}
	other := func(kind, via attestation.Kind) attestation.Claims { return attestation.Claims{Kind: kind, Via: via} }
	soft := strings.Replace(whole, "        - pcr: 7\n", "        - pcr: 7\n          warn_only: true\n", 1)
	backwards := strings.Replace(strings.Replace(whole, "pcr: 4\n          accept: ["+good4, "pcr: X\n          accept: ["+good7, 1), "pcr: 7\n          accept: ["+good7, "pcr: 4\n          accept: ["+good4, 1)
	backwards = strings.Replace(backwards, "pcr: X", "pcr: 7", 1)
	for name, tt := range map[string]struct {
		policy string
		more   []attestation.Claims
		pcrs   []uint32
		digest [32]byte
		why    string
	}{
		"a TPM alone":                {policy: whole, pcrs: []uint32{4, 7}, digest: sum(good4, good7)},
		"registers in another order": {policy: backwards, pcrs: []uint32{4, 7}, digest: sum(good4, good7)},
		"one that only warns":        {policy: soft, pcrs: []uint32{4}, digest: sum(good4)},
		"beside a report of SNP":     {policy: whole, more: []attestation.Claims{other(attestation.SNP, "")}, why: "no report covers it"},
		"beside a quote of TDX":      {policy: whole, more: []attestation.Claims{other(attestation.TDX, "")}, why: "no report covers it"},
		"beside a Nitro document":    {policy: whole, more: []attestation.Claims{other(attestation.Nitro, "")}, why: "no report covers it"},
		"measured volumes": {policy: strings.Replace(whole, "grants:", "      measured_volumes: [{volume: root, accept: [\""+good4+"\"]}]\ngrants:", 1),
			why: "measured_volumes"},
	} {
		p := parse(t, tt.policy)
		c := claims()
		c.Measurements["pcr15"] = attestation.Measurement{Value: unhex(good4), Events: []attestation.Event{{Digest: good4}}}
		a, err := p.Appraise(verified(t, append([]attestation.Claims{c}, tt.more...)...))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		pcrs, digest, err := a.SealedTo()
		if tt.why != "" {
			if wantErr(t, err, ErrNotSealable); err == nil || !strings.Contains(err.Error(), tt.why) {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		if err != nil || !slices.Equal(pcrs, tt.pcrs) || digest != tt.digest {
			t.Errorf("%s: %v %x, %v", name, pcrs, digest, err)
		}
	}
}

// Azure's report covers its vTPM; Google's is beside the report; the rest shows no TPM.
func TestWhichHardwareKeepsAKey(t *testing.T) {
	p := parse(t, hardware)
	for name, tt := range map[string]struct {
		claims []attestation.Claims
		ok     bool
	}{
		"snp": {[]attestation.Claims{snpClaims()}, false}, "tdx": {[]attestation.Claims{tdxClaims()}, false}, "azure": {azureClaims(), true},
		"google": {googleClaims(), false}, "nitro": {nitroClaims(), false},
	} {
		a, err := p.Appraise(verified(t, tt.claims...))
		if err != nil {
			t.Fatal(name, err)
		}
		if _, _, err := a.SealedTo(); (err == nil) != tt.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}
