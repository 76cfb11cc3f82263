package kms

import (
	"context"
	"errors"
	"io"
)

// withOld is what WithOld returns.
type withOld struct {
	KMS
	old []KMS
}

// WithOld returns a KMS that makes and wraps keys under k, and opens those of old
// as well: what a key service runs on while its keys move from one KEK to
// another. Close closes all of them that can be closed.
func WithOld(k KMS, old ...KMS) KMS {
	if len(old) == 0 {
		return k
	}
	return &withOld{k, old}
}

// Unwrap implements KMS. Only one that says that the KEK is not its own makes way
// for the next: a key that was tampered with is refused by its own KMS.
func (m *withOld) Unwrap(ctx context.Context, b Binding, w Wrapped) (*Secret, error) {
	key, err := m.KMS.Unwrap(ctx, b, w)
	for _, k := range m.old {
		if !errors.Is(err, ErrWrongKey) || !foreign(err) {
			return key, err
		}
		key, err = k.Unwrap(ctx, b, w)
	}
	return key, err
}

// foreign says whether a KMS does not have the KEK, or does not know the scheme.
func foreign(err error) bool { return errors.Is(err, ErrKEKVersion) || errors.Is(err, ErrScheme) }

// Current implements Namer.
func (m *withOld) Current(ctx context.Context) (string, error) { return Current(ctx, m.KMS) }

// Salts implements Salter.
func (m *withOld) Salts() bool { return Salts(m.KMS) }

// Close implements io.Closer.
func (m *withOld) Close() error {
	var errs []error
	for _, k := range append([]KMS{m.KMS}, m.old...) {
		if c, ok := k.(io.Closer); ok {
			errs = append(errs, c.Close())
		}
	}
	return errors.Join(errs...)
}
