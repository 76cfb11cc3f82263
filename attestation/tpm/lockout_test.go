package tpm

import (
	"testing"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

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

// A process that is killed leaves what it had loaded in a TPM without a resource manager,
// which has room for three objects and as many sessions: the next process goes on all the
// same.
func TestWhatAKilledProcessLeftInTheTPMIsInNobodysWay(t *testing.T) {
	p := swtpm.New(t, nil)
	v := newVerifier(t, trustOf(t, p))
	i := newIssuer(t, p, IssuerOptions{EK: EKRSA2048})
	for range 3 {
		killed := must[transport.TPMCloser](t)(OpenDevice(p.Device))
		full := 0
		for ; full < 8; full++ {
			if _, err := (tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHOwner, InPublic: tpm2.New2B(tpm2.ECCSRKTemplate)}).Execute(killed); err != nil {
				break
			}
		}
		sessions := 0
		for ; sessions < 8; sessions++ {
			nonce := tpm2.TPM2BNonce{Buffer: make([]byte, 16)}
			if _, err := (tpm2.StartAuthSession{TPMKey: tpm2.TPMRHNull, Bind: tpm2.TPMRHNull, NonceCaller: nonce, SessionType: tpm2.TPMSEPolicy,
				Symmetric: tpm2.TPMTSymDef{Algorithm: tpm2.TPMAlgNull}, AuthHash: tpm2.TPMAlgSHA256}).Execute(killed); err != nil {
				break
			}
		}
		if full != 3 || sessions == 0 || sessions == 8 {
			t.Fatalf("the TPM took %d objects and %d sessions", full, sessions)
		}
		killed.Close()
		if _, err := (exchange{}).run(t, i, v); err != nil {
			t.Fatal(err)
		}
	}
}
