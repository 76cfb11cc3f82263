package node

import (
	"fmt"
	"log/slog"
	"testing"
)

// A volume is measured into a register that the machine's evidence covers, which the
// configuration alone decides: not whether a TPM's driver is there yet.
func TestTheRegisterIsOneThatTheEvidenceCovers(t *testing.T) {
	for _, tt := range []struct {
		evidence []string
		want     string
	}{
		{nil, "*measured.TPM"}, {[]string{"tpm"}, "*measured.TPM"}, {[]string{"snp", "tpm"}, "*measured.TPM"}, {[]string{"tdx", "tpm"}, "*measured.TPM"},
		{[]string{"azure"}, "*measured.TPM"}, {[]string{"nitro"}, "*measured.TPM"}, {[]string{"tdx"}, "*measured.RTMR"}, {[]string{"snp"}, "measured.None"},
	} {
		got := fmt.Sprintf("%T", (&Config{Evidence: tt.evidence}).Register(slog.New(slog.DiscardHandler)))
		if got != tt.want {
			t.Errorf("%v: %v, want %s", tt.evidence, got, tt.want)
		}
	}
}
