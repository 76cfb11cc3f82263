package kubekms

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/secret"
)

// gives has the ring accept one fetch.
func gives(t *testing.T, r *Ring, current string, old ...string) {
	t.Helper()
	k := &Keys{Current: secretOf(t, current)}
	for _, o := range old {
		k.Old = append(k.Old, secretOf(t, o))
	}
	if _, err := r.accept(k, time.Now()); err != nil {
		t.Fatal(err)
	}
}

// under encrypts something with the KEK of this moment.
func under(t *testing.T, r *Ring) (opens func() error) {
	t.Helper()
	blob, id, err := r.encrypt(purposeV2, []byte("a secret"))
	if err != nil {
		t.Fatal(err)
	}
	return func() error {
		plain, err := r.decrypt(purposeV2, blob, id)
		if err == nil && string(plain) != "a secret" {
			t.Errorf("it opens as %q", plain)
		}
		return err
	}
}

var errOutage = failure.Newf(failure.Unreachable, "", "an outage")

// Case 87: an outage behind a rotation purges all KEKs. What was written under the old
// one opens again once the source answers, for as long as --keep-old says.
func TestAnOldKEKOutlivesAPurge(t *testing.T) {
	for name, tt := range map[string]struct {
		outage time.Duration
		back   string
		want   error
	}{
		"the same KEK is back":             {time.Hour, kekB, nil},
		"it is back after keep-old":        {25 * time.Hour, kekB, ErrUnknownKey},
		"another KEK is back":              {time.Hour, kekC, ErrUnknownKey},
		"the old one itself is back":       {time.Hour, kekA, nil},
		"it is still away, and so are all": {time.Hour, "", ErrNoKey},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRing(AESGCM, 1, 24*time.Hour)
				defer r.purge(errOutage)
				gives(t, r, kekA)
				opens := under(t, r)
				gives(t, r, kekB)
				if err := opens(); err != nil {
					t.Fatal(err)
				}
				if err := r.purge(errOutage); err != nil {
					t.Fatal(err)
				}
				if err := opens(); !errors.Is(err, ErrNoKey) {
					t.Errorf("after the purge: %v", err)
				}
				time.Sleep(tt.outage)
				if tt.back != "" {
					gives(t, r, tt.back)
				}
				if err := opens(); !errors.Is(err, tt.want) {
					t.Errorf("got %v, want %v", err, tt.want)
				}
			})
		})
	}
}

// What outlives a purge is sealed: no KEK is in memory, nor in what is kept.
func TestAPurgeLeavesNoKEK(t *testing.T) {
	r := newRing(AESGCM, 2, 24*time.Hour)
	gives(t, r, kekA, kekC)
	gives(t, r, kekB, kekC) // waits for its promotion
	keys := r.snapshot.Load().keys
	if err := r.purge(errOutage); err != nil {
		t.Fatal(err)
	}
	if len(r.entries) != 0 || len(r.kept) != 4 { // each of two KEKs, under each of those
		t.Errorf("%d KEKs, %d kept", len(r.entries), len(r.kept))
	}
	for _, k := range keys {
		if err := k.secret.Use(func([]byte) error { return nil }); !errors.Is(err, secret.ErrClosed) {
			t.Errorf("%s is still there: %v", k.id, err)
		}
	}
	for _, k := range r.kept {
		for _, kek := range []string{kekA, kekB, kekC} {
			if string(k.blob) == kek || len(k.blob) < envelopeOverhead {
				t.Error("it is not sealed")
			}
		}
	}
	gives(t, r, kekB)
	if h := r.Health(); h.Keys != 3 || h.KeyID != idOf(t, kekB) {
		t.Errorf("%+v", h)
	}
	_ = r.purge(errOutage)
}

// Case 87: kube-apiserver takes what has the key_id of this moment for fresh. A KEK
// that comes back gets a key_id of its own; all of them go on opening.
func TestAKeyIDIsNotUsedAgain(t *testing.T) {
	r := newRing(AESGCM, 1, 24*time.Hour)
	defer r.purge(errOutage)
	seen := map[string]bool{}
	var opens []func() error
	for _, kek := range []string{kekA, kekB, kekA, kekB, kekC, kekA} {
		gives(t, r, kek)
		gives(t, r, kek) // again, which is no news
		id := r.Health().KeyID
		if seen[id] || kekOf(id) != idOf(t, kek) {
			t.Errorf("%s is of %s, and was used: %v", id, idOf(t, kek), seen[id])
		}
		seen[id] = true
		opens = append(opens, under(t, r))
	}
	for i, f := range opens {
		if err := f(); err != nil {
			t.Errorf("ciphertext %d: %v", i, err)
		}
	}
	before := r.Health().KeyID
	if err := r.purge(errOutage); err != nil {
		t.Fatal(err)
	}
	gives(t, r, kekA)
	if got := r.Health().KeyID; got != before {
		t.Errorf("an outage made %s of %s", got, before)
	}
	for _, id := range []string{idOf(t, kekA) + ".1", idOf(t, kekA) + ".02", idOf(t, kekA) + ".x", idOf(t, kekA) + ".", "." + idOf(t, kekA)} {
		if kekOf(id) != id {
			t.Errorf("%q is a key_id", id)
		}
	}
}

func TestZeroMeansWhatItSays(t *testing.T) {
	good := Options{Timeout: time.Hour, Observations: 1, KeepOld: time.Hour}
	for name, tt := range map[string]struct {
		change func(*Options)
		ok     bool
	}{
		"all set":       {func(*Options) {}, true},
		"timeout":       {func(o *Options) { o.Timeout = 0 }, false},
		"observations":  {func(o *Options) { o.Observations = 0 }, false},
		"keep-old":      {func(o *Options) { o.KeepOld = 0 }, true},
		"below nothing": {func(o *Options) { o.KeepOld = -1 }, false},
	} {
		o := good
		tt.change(&o)
		if _, err := Typed(o); (err == nil) != tt.ok || err != nil && failure.Of(err).Class != failure.Usage {
			t.Errorf("%s: %v", name, err)
		}
	}
	o := good
	o.KeepOld = 0
	o, err := Typed(o)
	if err != nil {
		t.Fatal(err)
	}
	play(t, o, &script{t: t, answers: []string{kekA, kekB}}, func(n int, r *Ring) bool {
		if h := r.Health(); h.Keys != 1 {
			t.Errorf("after %d intervals there are %d KEKs", n, h.Keys)
		}
		return n < 2
	})
}

// The daemon of 2018 was called citadel later, and its ciphertexts began otherwise.
func TestCiphertextsOfCitadelAreRead(t *testing.T) {
	r := ringOf(t, AESCBC, kekA)
	blob, _, err := r.encrypt(purposeV1, []byte("a secret"))
	if err != nil {
		t.Fatal(err)
	}
	later := append([]byte(laterPrefix), blob[len(legacyPrefix):]...)
	if plain, err := r.decrypt(purposeV1, later, ""); err != nil || string(plain) != "a secret" {
		t.Errorf("%q, %v", plain, err)
	}
	if _, err := r.decrypt(purposeV1, append([]byte(":c5l:aescbc:v2:"), blob[len(legacyPrefix):]...), ""); err == nil {
		t.Error("another version is read")
	}
}
