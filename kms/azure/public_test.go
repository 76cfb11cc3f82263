package azure

import (
	"testing"

	"github.com/keyagent/keyagent/kms"
)

// Case 41: what Public says holds for every key that opens, also for one that was
// wrapped under an older version of another kind.
func TestUnderASymmetricKeyNothingOpensThatAnybodyCouldWrap(t *testing.T) {
	b := newBed(t, "oct-HSM")
	create(t, b.Vault, "kek", "RSA-HSM")
	k := open(t, b.options("kek"))
	key, byRSA := wrapped(t, k)
	if !kms.Public(k) {
		t.Error("an RSA key has no public half")
	}
	opens(t, k, byRSA, key)
	create(t, b.Vault, "kek", "oct-HSM")
	k = open(t, b.options("kek"))
	if kms.Public(k) {
		t.Error("a symmetric key has a public half")
	}
	fails(t, k, byRSA, kms.ErrWrongKey)
	key, bySymmetric := wrapped(t, k)
	opens(t, k, bySymmetric, key)
}
