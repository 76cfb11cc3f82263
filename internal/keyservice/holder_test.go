package keyservice

import (
	"strings"
	"testing"
	"time"

	"github.com/keyagent/keyagent/attestation"
)

// Case 48: what tells one machine from another, for each kind of evidence.
func TestWhatTellsMachinesApart(t *testing.T) {
	claim := func(kind, via attestation.Kind, identity string) attestation.Claims {
		return attestation.Claims{Kind: kind, Via: via, Identity: identity, Facts: map[string]any{"vm_id": "x"}}
	}
	for _, tt := range []struct {
		name   string
		claims []attestation.Claims
		want   string
	}{
		{"a TPM", []attestation.Claims{claim(attestation.TPM, "", "aa")}, "tpm:aa"},
		{"SNP alone: the chip is not the VM", []attestation.Claims{claim(attestation.SNP, "", "chip")}, ""},
		{"TDX alone: the platform is not the VM", []attestation.Claims{claim(attestation.TDX, "", "platform")}, ""},
		{"SNP beside a cloud's TPM", []attestation.Claims{claim(attestation.SNP, "", "chip"), claim(attestation.TPM, "", "aa")}, "tpm:aa"},
		{"TDX beside a cloud's TPM", []attestation.Claims{claim(attestation.TDX, "", "platform"), claim(attestation.TPM, "", "aa")}, "tpm:aa"},
		{"Azure: its vTPM's key, and not the ID that the host gives", []attestation.Claims{
			claim(attestation.Azure, "", "vm"), claim(attestation.SNP, attestation.Azure, "chip"), claim(attestation.TPM, attestation.Azure, "ak")}, "tpm:ak"},
		{"an SVSM, whose vTPM is new at each boot", []attestation.Claims{
			claim(attestation.SVSM, "", "ek"), claim(attestation.SNP, attestation.SVSM, "chip"), claim(attestation.TPM, attestation.SVSM, "ek")}, ""},
		{"Nitro: the instance", []attestation.Claims{claim(attestation.Nitro, "", "i-1")}, "nitro:i-1"},
		{"Nitro beside its TPM, in any order", []attestation.Claims{claim(attestation.TPM, "", "aa"), claim(attestation.Nitro, "", "i-1")}, "nitro:i-1"},
		{"a TPM without an identity", []attestation.Claims{claim(attestation.TPM, "", "")}, ""},
	} {
		v, err := attestation.NewVerified(attestation.Binder{}, time.Time{}, tt.claims...)
		if err != nil {
			t.Fatal(err)
		}
		if got := machineOf(v); got != tt.want {
			t.Errorf("%s: %q, want %q", tt.name, got, tt.want)
		}
	}
}

// What a node calls itself is shown to others, and stands in logs.
func TestANodesNameIsHarmless(t *testing.T) {
	for in, want := range map[string]string{
		"node-1.example": "node-1.example", "": "", "a b\n\x1b[31m": "a_b__[31m", `"x\`: "_x_", "ä": "_",
		strings.Repeat("a", 100): strings.Repeat("a", 64), strings.Repeat("a", 63) + "ä": strings.Repeat("a", 63) + "_",
	} {
		if got := printable(in); got != want {
			t.Errorf("%q became %q, want %q", in, got, want)
		}
	}
}
