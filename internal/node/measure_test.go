package node

import (
	"fmt"
	"log/slog"
	"testing"

	"github.com/keyagent/keyagent/internal/measured"
)

// A volume is measured into a register that the machine's evidence covers.
func TestTheRegisterIsOneThatTheEvidenceCovers(t *testing.T) {
	for _, tt := range []struct {
		evidence []string
		want     string
	}{
		{nil, "[*measured.TPM *measured.RTMR]"}, {[]string{"tpm"}, "[*measured.TPM]"}, {[]string{"snp", "tpm"}, "[*measured.TPM]"},
		{[]string{"azure"}, "[*measured.TPM]"}, {[]string{"nitro"}, "[*measured.TPM]"}, {[]string{"tdx"}, "[*measured.RTMR]"}, {[]string{"snp"}, "[]"},
	} {
		got := []string{}
		for _, r := range (&Config{Evidence: tt.evidence}).Register(slog.New(slog.DiscardHandler)).(measured.First) {
			got = append(got, fmt.Sprintf("%T", r))
		}
		if fmt.Sprint(got) != tt.want {
			t.Errorf("%v: %v, want %s", tt.evidence, got, tt.want)
		}
	}
}
