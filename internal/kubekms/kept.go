package kubekms

import (
	"errors"
	"time"

	"github.com/keyagent/keyagent/internal/secret"
)

// purposeKept is that of old KEKs which outlive a purge.
const purposeKept purpose = "kept"

// kept is an old KEK that is not in memory any more, but sealed under another one,
// which is not there either: the source must give that one again before anything
// opens. A purge therefore ends what can be decrypted, and an outage of the source
// does not end what --keep-old promises.
type kept struct {
	under string // key_id
	blob  []byte
	seen  time.Time
}

// keep seals each KEK under those that the source gave last. The lock is held.
func (r *Ring) keep() error {
	var errs []error
	r.kept = nil
	for _, under := range []string{r.current, r.pending} {
		wrapping, ok := r.entries[under]
		if !ok {
			continue
		}
		for id, e := range r.entries {
			if id == under {
				continue
			}
			errs = append(errs, e.key.secret.Use(func(kek []byte) error {
				blob, err := wrapping.key.seal(purposeKept, kek)
				r.kept = append(r.kept, kept{under, blob, e.seen})
				return err
			}))
		}
	}
	return errors.Join(errs...)
}

// restore opens what was kept under a KEK that is here again. What the source does not
// give any more is forgotten as if there had been no purge. The lock is held.
func (r *Ring) restore(now time.Time) error {
	var errs []error
	var left []kept
	for _, k := range r.kept {
		wrapping, ok := r.entries[k.under]
		switch {
		case now.Sub(k.seen) >= r.keepOld:
		case !ok:
			left = append(left, k)
		default:
			errs = append(errs, r.reopen(wrapping.key, k))
		}
	}
	r.kept = left
	return errors.Join(errs...)
}

func (r *Ring) reopen(under *key, k kept) error {
	kek, err := under.open(purposeKept, k.blob)
	if err != nil {
		return err
	}
	defer secret.Wipe(kek)
	s, err := secret.From(kek)
	if err != nil {
		return err
	}
	old, err := newKey(s)
	if err != nil {
		return err
	}
	if _, ok := r.entries[old.id]; ok {
		return old.secret.Close()
	}
	r.entries[old.id] = &entry{old, k.seen}
	return nil
}
