package macstore

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/storage"
)

// Visit hands each wrapped key in a record's body to f, and returns the body with
// what f made of them: the same bytes, if f changed nothing.
type Visit func(id string, body []byte, f func(kms.Binding, kms.Wrapped) (kms.Wrapped, error)) ([]byte, error)

// Progress of a walk over all records of a collection.
type Progress struct {
	Total   int `json:"total"`   // records when the walk began
	Done    int `json:"done"`    // looked at so far
	Changed int `json:"changed"` // written again
	Failed  int `json:"failed"`  // of Done; they stay as they are
	Refused int `json:"refused"` // of Failed: objects that are no record of ours
}

// ErrIncomplete: there are records that a walk did not get to, or that it could not
// work on although they are ours. Without it, all that failed were objects that are
// no records of ours ([ErrRefused]).
var ErrIncomplete = errors.New("not every record was worked on")

// Plus adds up two walks.
func (p Progress) Plus(q Progress) Progress {
	return Progress{p.Total + q.Total, p.Done + q.Done, p.Changed + q.Changed, p.Failed + q.Failed, p.Refused + q.Refused}
}

// maxFailures bounds how many failures a walk names.
const maxFailures = 20

// parallel bounds how many records are worked on at once.
const parallel = 8

// Walk looks at every record of a collection, changes those whose keys f changes, and
// goes on behind those that fail. Anyone who changes a record in the meantime wins,
// and the record is looked at again. It ends early if ctx ends, or the KMS or
// storage does not work: walking again carries on, since what was changed needs
// no second change. The error says so by [ErrIncomplete]. report, if not nil, is called after each record, never twice
// at once.
func (m *Store) Walk(ctx context.Context, c Collection, visit Visit, f func(context.Context, kms.Binding, kms.Wrapped) (kms.Wrapped, error), report func(Progress)) (Progress, error) {
	ids, err := m.all(ctx, c)
	if err != nil {
		return Progress{}, errors.Join(ErrIncomplete, err)
	}
	asked := ctx
	var mu sync.Mutex
	var failures []error
	p := Progress{Total: len(ids)}
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(parallel)
	for _, id := range ids {
		if ctx.Err() != nil {
			break
		}
		group.Go(func() error {
			changed, err := m.change(ctx, c, id, visit, f)
			if stops(ctx, err) {
				return fmt.Errorf("%s%s: %w", c.Prefix, id, err)
			}
			mu.Lock()
			defer mu.Unlock()
			p.Done++
			if changed {
				p.Changed++
			}
			if err != nil {
				p.Failed++
				if Foreign(err) {
					p.Refused++
				}
				if len(failures) < maxFailures { // a stranger can make any number of them
					failures = append(failures, fmt.Errorf("%s%s: %w", c.Prefix, id, err))
				}
			}
			if report != nil {
				report(p)
			}
			return nil
		})
	}
	err = group.Wait()
	mu.Lock()
	defer mu.Unlock()
	if more := p.Failed - len(failures); more > 0 {
		failures = append(failures, fmt.Errorf("and %d more", more))
	}
	// A walk that was cancelled between two records has met no error of its own.
	if err = errors.Join(err, asked.Err()); err != nil || p.Done < p.Total || p.Failed > p.Refused {
		failures = append(failures, ErrIncomplete, err)
	}
	return p, errors.Join(failures...)
}

// Foreign reports that an object is no record of ours, or none any more: it has no MAC
// of ours, or the backend itself says that it is damaged. Nothing can be done with it,
// and nothing waits for it.
func Foreign(err error) bool {
	return errors.Is(err, ErrRefused) || errors.Is(err, storage.ErrCorrupt) || errors.Is(err, storage.ErrTooLarge)
}

// stops says whether an error would meet the next record as well.
func stops(ctx context.Context, err error) bool {
	if err == nil {
		return false
	}
	for _, e := range []error{kms.ErrUnavailable, kms.ErrCredentials, kms.ErrDenied, storage.ErrUnavailable, storage.ErrCredentials, storage.ErrDenied, storage.ErrNoBucket} {
		if errors.Is(err, e) {
			return true
		}
	}
	return ctx.Err() != nil
}

// maxConflicts bounds how often a change is tried against other writers.
const maxConflicts = 16

func (m *Store) change(ctx context.Context, c Collection, id string, visit Visit, f func(context.Context, kms.Binding, kms.Wrapped) (kms.Wrapped, error)) (bool, error) {
	for range maxConflicts {
		body, version, err := m.Get(ctx, c, id)
		if errors.Is(err, storage.ErrNotFound) {
			return false, nil // deleted since it was listed
		}
		if err != nil {
			return false, err
		}
		next, err := visit(id, body, func(bind kms.Binding, w kms.Wrapped) (kms.Wrapped, error) { return f(ctx, bind, w) })
		if err != nil || string(next) == string(body) {
			return false, err
		}
		if err := m.Put(ctx, c, id, next, version); !errors.Is(err, storage.ErrConflict) {
			return err == nil, err
		}
	}
	return false, storage.ErrConflict
}

// all lists the IDs of a collection to the end.
func (m *Store) all(ctx context.Context, c Collection) (ids []string, err error) {
	for after := ""; ; after = ids[len(ids)-1] {
		page, err := m.List(ctx, c, after, 1000)
		if err != nil {
			return nil, err
		}
		if len(page) == 0 {
			return ids, nil
		}
		ids = append(ids, page...)
	}
}

// Rewrap returns a function that wraps a key again under the KEK that k has in
// force, unless it is under that already.
func Rewrap(k kms.KMS, current string) func(context.Context, kms.Binding, kms.Wrapped) (kms.Wrapped, error) {
	return func(ctx context.Context, b kms.Binding, w kms.Wrapped) (kms.Wrapped, error) {
		if w.KEK == current {
			return w, nil
		}
		key, err := k.Unwrap(ctx, b, w)
		if err != nil {
			return w, err
		}
		defer key.Close()
		next, err := WrapAndOpen(ctx, k, b, key)
		if err != nil {
			return w, err
		}
		return next, nil
	}
}

// WrapAndOpen wraps a key, and opens its new form once before it is returned: it is to
// be the only one that there is.
func WrapAndOpen(ctx context.Context, k kms.KMS, b kms.Binding, key *kms.Secret) (kms.Wrapped, error) {
	w, err := k.Wrap(ctx, b, key)
	if err != nil {
		return kms.Wrapped{}, err
	}
	again, err := k.Unwrap(ctx, b, w)
	if err != nil {
		return kms.Wrapped{}, fmt.Errorf("the key does not come back from its new form: %w", err)
	}
	defer again.Close()
	if !again.Equal(key) {
		return kms.Wrapped{}, fmt.Errorf("%w: another key came back from its new form", kms.ErrWrongKey)
	}
	return w, nil
}
