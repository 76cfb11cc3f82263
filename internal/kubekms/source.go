package kubekms

import (
	"context"
	"errors"
	"time"

	"github.com/keyagent/keyagent/internal/secret"
)

// Source is where KEKs come from.
type Source interface {
	// Fetch returns the KEKs of this moment, or an error with a class of
	// internal/failure. It is never called twice at a time, and returns soon after
	// ctx ends. The caller closes the keys.
	Fetch(ctx context.Context) (*Keys, error)
}

// Keys are what a source gives, of 16, 24 or 32 bytes each.
type Keys struct {
	Current *secret.Bytes   // encrypts
	Old     []*secret.Bytes // decrypt
	// Expires is when the keys must be wiped unless they are fetched again: the end
	// of a lease. Zero means that there is none.
	Expires time.Time
}

// Close wipes the keys.
func (k *Keys) Close() error {
	err := k.Current.Close()
	for _, old := range k.Old {
		err = errors.Join(err, old.Close())
	}
	return err
}

// named moves the keys out of k and names them: the key_id of the current one, and
// all, each once. On error everything is wiped.
func (k *Keys) named() (current string, all []*key, err error) {
	have := map[string]bool{}
	for i, s := range append([]*secret.Bytes{k.Current}, k.Old...) {
		one, nameErr := newKey(s)
		if nameErr != nil {
			return "", nil, errors.Join(nameErr, k.Close(), closeAll(all))
		}
		if i == 0 {
			current = one.id
		}
		if have[one.id] {
			err = errors.Join(err, s.Close())
			continue
		}
		have[one.id] = true
		all = append(all, one)
	}
	return current, all, err
}
