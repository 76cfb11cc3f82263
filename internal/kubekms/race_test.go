package kubekms

import (
	"errors"
	"flag"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/keyagent/keyagent/internal/failure"
)

var raceFor = flag.Duration("purge-race", 30*time.Second, "how long the purge races with requests")

// TestAPurgeRacesWithRequests: the daemon of 2018 zeroed the KEK under a reader, which
// then encrypted under zeros (case 44). Whatever the schedule, a ciphertext opens
// under the KEK that it names, and Status names what Encrypt uses.
func TestAPurgeRacesWithRequests(t *testing.T) {
	keks := []string{kekA, kekB, kekC}
	names := map[string]*key{}
	for _, k := range keks {
		names[idOf(t, k)] = keyOf(t, k)
	}
	for _, mode := range []Mode{AESGCM, AESCBC} {
		t.Run(string(mode), func(t *testing.T) {
			r := ringOf(t, mode, kekA)
			lost := failure.Newf(failure.Unreachable, "", "lost")
			stop := make(chan struct{})
			var group sync.WaitGroup
			for range 4 {
				group.Go(func() {
					for {
						select {
						case <-stop:
							return
						default:
						}
						plain := "0123456789abcdef0123456789abcdef"
						out, id, err := r.encrypt(purposeV2, []byte(plain))
						if err != nil {
							if !errors.Is(err, ErrNoKey) {
								t.Errorf("encrypt: %v", err)
							}
							continue
						}
						var got []byte
						if mode == AESGCM {
							got, err = names[kekOf(id)].open(purposeV2, out)
						} else {
							got, err = openLegacy([]*key{names[kekOf(id)]}, out)
						}
						if err != nil || string(got) != plain {
							t.Errorf("what was encrypted under %s does not open under it: %q, %v", id, got, err)
						}
						switch got, err := r.decrypt(purposeV2, out, id); {
						case errors.Is(err, ErrNoKey), errors.Is(err, ErrUnknownKey):
						case err != nil || string(got) != plain:
							t.Errorf("decrypt: %q, %v", got, err)
						}
						if h := r.Health(); h.KeyID == "" && !errors.Is(h.Err, ErrNoKey) {
							t.Errorf("health: %+v", h)
						}
					}
				})
			}
			for end := time.Now().Add(*raceFor); time.Now().Before(end); {
				switch rand.N(4) {
				case 0:
					if err := r.purge(lost); err != nil {
						t.Error(err)
					}
				case 1:
					r.mark(r.Health().State, lost)
				default:
					give(t, r, keks[rand.N(3)], keks[rand.N(3)])
				}
				time.Sleep(rand.N(300 * time.Microsecond))
			}
			close(stop)
			group.Wait()
		})
	}
}
