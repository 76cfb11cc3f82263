package kubekms

import (
	"context"
	"crypto/hkdf"
	"crypto/sha256"
	"errors"
	"time"

	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/keyclient"
	"github.com/keyagent/keyagent/internal/secret"
)

const (
	domainAttested  = "keyagent kubekms attested KEK v1"
	domainConfirmed = "keyagent kubekms attested KEK confirmation v1"
)

// Releaser is where an attested KEK comes from.
type Releaser interface {
	// GetKey returns the key of a volume. The caller closes it.
	GetKey(ctx context.Context, r keyclient.Request) (*keyclient.Key, error)
	// CreateDiskless makes a key known as one that is in use.
	CreateDiskless(ctx context.Context, k *keyclient.Key, mac [32]byte) error
}

// Attested is a KEK that the key service releases to this machine, on the strength
// of its evidence. The key service treats it as a volume without a disk: its record
// is confirmed by a MAC that is derived from the key.
//
// A KEK is leased: it is wiped when the verdict on this machine ends, unless the key
// service has released it again. The [Refresher] sees to it that it does in time.
type Attested struct {
	Keys   Releaser
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
	k, err := a.get(ctx, false)
	if class := failure.Of(err).Class; class == failure.NotFound || class == failure.State {
		k, err = a.get(ctx, true)
	}
	if err != nil {
		return err
	}
	defer k.Close()
	mac, err := confirmation(k.DEK)
	switch {
	case err != nil:
		return err
	case k.State == keyclient.Active:
		return checkConfirmation(k, mac)
	case k.State == keyclient.Formatted && k.MACs.Header != mac:
		return notThisKEK(k)
	}
	return a.Keys.CreateDiskless(ctx, k, mac)
}

func (a *Attested) get(ctx context.Context, create bool) (*keyclient.Key, error) {
	return a.Keys.GetKey(ctx, keyclient.Request{Volume: a.Volume, Format: create, Diskless: true, Left: a.Left})
}

// Fetch implements Source.
func (a *Attested) Fetch(ctx context.Context) (*Keys, error) {
	k, err := a.get(ctx, false)
	if err != nil {
		return nil, err
	}
	defer k.Close()
	if left := time.Until(k.Expires); left < minLease {
		return nil, failure.Newf(failure.Configuration, "a longer lifetime in the key service's policy",
			"the key service's verdict on this machine ends in %s, a KEK needs one of at least %s", left.Round(time.Second), minLease)
	}
	mac, err := confirmation(k.DEK)
	if err == nil {
		err = checkConfirmation(k, mac)
	}
	if err != nil {
		return nil, err
	}
	kek, err := derive(k.DEK, domainAttested)
	if err != nil {
		return nil, err
	}
	return &Keys{Current: kek, Expires: k.Expires}, nil
}

// checkConfirmation tells the record of a KEK from that of a volume with a disk, and
// a key from another one.
func checkConfirmation(k *keyclient.Key, mac [32]byte) error {
	if k.State != keyclient.Active || k.MACs.Header != mac {
		return notThisKEK(k)
	}
	return nil
}

func notThisKEK(k *keyclient.Key) error {
	return failure.Newf(failure.WrongKey, "choose a volume ID that no disk has", "the key service's record of %q is not that of this KEK", k.Volume)
}

// confirmation is what the record keeps in the place of a header's MAC.
func confirmation(dek *secret.Bytes) (mac [32]byte, err error) {
	s, err := derive(dek, domainConfirmed)
	if err != nil {
		return mac, err
	}
	err = s.Use(func(b []byte) error { copy(mac[:], b); return nil })
	return mac, errors.Join(err, s.Close())
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
