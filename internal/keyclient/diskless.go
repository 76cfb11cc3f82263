package keyclient

import (
	"context"
	"crypto/hkdf"
	"crypto/sha256"
	"errors"
	"time"

	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/secret"
)

// DisklessKeys is where keys come from that open no disk.
type DisklessKeys interface {
	// GetKey returns the key of a volume. The caller closes it.
	GetKey(ctx context.Context, r Request) (*Key, error)
	// CreateDiskless makes a key known as one that is in use.
	CreateDiskless(ctx context.Context, k *Key, mac [32]byte) error
}

// Diskless is a key that opens no disk. The key service knows it as a volume, whose
// record has a MAC that is derived from the key in the place of a header's.
type Diskless struct {
	Keys   DisklessKeys
	Volume string
	// Domain is what the key is for: a key of one domain is never taken for one of
	// another, nor for that of a disk.
	Domain string
	Length int           // in bytes; 0 is the key service's choice
	Left   time.Duration // see [Request]
}

// Get returns the key of a record that is confirmed. The caller closes it.
func (d *Diskless) Get(ctx context.Context) (*Key, error) {
	k, err := d.get(ctx, false)
	if err != nil {
		return nil, err
	}
	return closedUnless(k, d.check(k))
}

// Obtain is Get, and has the key service make the key if there is none.
func (d *Diskless) Obtain(ctx context.Context) (*Key, error) {
	k, err := d.Get(ctx)
	if !unmade(err) {
		return k, err
	}
	select {
	case making <- struct{}{}:
	default: // what is being made now may be this one
		select {
		case making <- struct{}{}:
		case <-ctx.Done():
			return nil, errors.Join(err, ctx.Err())
		}
		if k, err = d.Get(ctx); !unmade(err) {
			<-making
			return k, err
		}
	}
	defer func() { <-making }()
	k, err = d.create(ctx)
	if class := failure.Of(err).Class; err != nil && (class == failure.Held || class == failure.State) {
		// Somebody else may have been faster.
		if k, again := d.Get(ctx); again == nil {
			return k, nil
		}
	}
	return k, err
}

// making is the turn of who makes a key. Of two attempts of one machine the later one
// ends the earlier.
var making = make(chan struct{}, 1)

// unmade reports that a first attempt to make the key may help.
func unmade(err error) bool {
	class := failure.Of(err).Class
	return err != nil && (class == failure.NotFound || class == failure.State)
}

func (d *Diskless) create(ctx context.Context) (*Key, error) {
	k, err := d.get(ctx, true)
	if err != nil {
		return nil, err
	}
	return closedUnless(k, d.confirm(ctx, k))
}

func (d *Diskless) get(ctx context.Context, create bool) (*Key, error) {
	return d.Keys.GetKey(ctx, Request{Volume: d.Volume, Format: create, Diskless: true, Length: d.Length, Left: d.Left})
}

// closedUnless gives a key that nothing speaks against.
func closedUnless(k *Key, err error) (*Key, error) {
	if err != nil {
		return nil, errors.Join(err, k.Close())
	}
	return k, nil
}

func (d *Diskless) confirm(ctx context.Context, k *Key) error {
	mac, err := d.confirmation(k)
	switch {
	case err != nil:
		return err
	case k.State == Active:
		return d.check(k)
	case k.State == Formatted && k.MACs.Header != mac:
		return d.notThis()
	}
	return d.Keys.CreateDiskless(ctx, k, mac)
}

// check tells the record of a key like this from that of a volume with a disk, and a key
// from another one.
func (d *Diskless) check(k *Key) error {
	mac, err := d.confirmation(k)
	if err == nil && (k.State != Active || k.MACs.Header != mac) {
		err = d.notThis()
	}
	return err
}

func (d *Diskless) notThis() error {
	return failure.Newf(failure.WrongKey, "choose an ID that neither a disk nor another use has", "the key service's record of %q is not that of a key of this use", d.Volume)
}

// confirmation is what the record keeps in the place of a header's MAC.
func (d *Diskless) confirmation(k *Key) (mac [32]byte, err error) {
	err = k.DEK.Use(func(b []byte) (err error) {
		secret.Do(func() {
			var sum []byte
			if sum, err = hkdf.Key(sha256.New, b, nil, d.Domain, len(mac)); err == nil {
				copy(mac[:], sum)
			}
		})
		return err
	})
	return mac, err
}
