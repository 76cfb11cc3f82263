package kubekms

import (
	"context"
	"crypto/hkdf"
	"crypto/sha256"
	"time"

	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/keyclient"
	"github.com/keyagent/keyagent/internal/secret"
)

const (
	domainAttested  = "keyagent kubekms attested KEK v1"
	domainConfirmed = "keyagent kubekms attested KEK confirmation v1"
)

// Attested is a KEK that the key service releases to this machine, on the strength
// of its evidence. The key service treats it as a volume without a disk: its record
// is confirmed by a MAC that is derived from the key.
//
// A KEK is leased: it is wiped when the verdict on this machine ends, unless the key
// service has released it again. The [Refresher] sees to it that it does in time.
type Attested struct {
	Keys   keyclient.DisklessKeys
	Volume string
	// Left is how long the lease of what is fetched must last, if the key service
	// gives any for that long. See [Lease].
	Left time.Duration
}

// Lease is what to ask of a source whose keys are leased: with that much, one fetch
// may fail and the keys still stay.
func Lease(timeout time.Duration) time.Duration { return 2 * Interval(timeout) }

// minLease is the shortest lease that is of any use: a TPM may need seconds for its
// part of the next one.
const minLease = 10 * time.Second

// Init has the key service make the key, unless it is there.
func (a *Attested) Init(ctx context.Context) error {
	k, err := a.key().Obtain(ctx)
	if err != nil {
		return err
	}
	return k.Close()
}

func (a *Attested) key() *keyclient.Diskless {
	return &keyclient.Diskless{Keys: a.Keys, Volume: a.Volume, Domain: domainConfirmed, Left: a.Left}
}

// Fetch implements Source.
func (a *Attested) Fetch(ctx context.Context) (*Keys, error) {
	k, err := a.key().Get(ctx)
	if err != nil {
		return nil, err
	}
	defer k.Close()
	if left := time.Until(k.Expires); left < minLease {
		return nil, failure.Newf(failure.Configuration, "a longer lifetime in the key service's policy",
			"the key service's verdict on this machine ends in %s, a KEK needs one of at least %s", left.Round(time.Second), minLease)
	}
	kek, err := derive(k.DEK, domainAttested)
	if err != nil {
		return nil, err
	}
	return &Keys{Current: kek, Expires: k.Expires}, nil
}

func derive(dek *secret.Bytes, domain string) (out *secret.Bytes, err error) {
	err = dek.Use(func(b []byte) (err error) {
		secret.Do(func() {
			var sum []byte
			if sum, err = hkdf.Key(sha256.New, b, nil, domain, kekLength); err == nil {
				out, err = secret.From(sum)
			}
		})
		return err
	})
	return out, err
}
