package policysource

import (
	"errors"
	"testing"
	"time"

	"github.com/keyagent/keyagent/attestation"
)

// A verdict lasts as long as the policy says, and not longer than what it rests on.
func TestAVerdictEndsWithWhatItRestsOn(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	for name, tt := range map[string]struct {
		until []time.Duration // of each piece of evidence; 0: it does not end
		want  time.Duration   // 0: refused
	}{
		"nothing ends":              {[]time.Duration{0, 0}, time.Hour},
		"it ends later":             {[]time.Duration{2 * time.Hour}, time.Hour},
		"it ends before":            {[]time.Duration{0, 10 * time.Minute}, 10 * time.Minute},
		"the first of two":          {[]time.Duration{5 * time.Minute, 10 * time.Minute}, 5 * time.Minute},
		"it has ended in the while": {[]time.Duration{-time.Second}, 0},
	} {
		var claims []attestation.Claims
		for i, d := range tt.until {
			c := attestation.Claims{Kind: []attestation.Kind{attestation.TPM, attestation.SNP}[i]}
			if d != 0 {
				c.Until = now.Add(d)
			}
			claims = append(claims, c)
		}
		v, err := attestation.NewVerified(attestation.Binder{}, now, claims...)
		if err != nil {
			t.Fatal(err)
		}
		got, err := lifetime(time.Hour, v)
		if got != tt.want || (tt.want == 0) != errors.Is(err, attestation.ErrUnendorsed) {
			t.Errorf("%s: %s, %v", name, got, err)
		}
	}
}
