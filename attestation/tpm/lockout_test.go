package tpm

import (
	"testing"

	"github.com/keyagent/keyagent/test/sim/swtpm"
)

// A machine whose power fails again and again, each time after it has attested and
// with no shutdown of its TPM, attests all the same: no key that is used counts for
// the TPM's protection against guessing.
func TestHardPowerCyclesDoNotLockTheTPM(t *testing.T) {
	p := swtpm.New(t, nil)
	v := newVerifier(t, trustOf(t, p))
	for _, kind := range []EKType{EKP384, EKRSA2048} {
		t.Run(string(kind), func(t *testing.T) {
			i := newIssuer(t, p, IssuerOptions{EK: kind})
			for range 6 { // twice what a TPM takes by default
				extendAll(t, p, 0, 4, 7, 11)
				if _, err := (exchange{}).run(t, i, v); err != nil {
					t.Fatal(err)
				}
				p.Restart(t)
			}
		})
	}
}
