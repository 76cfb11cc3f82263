package kubekms

import (
	"context"
	"errors"
	"fmt"

	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/internal/shell"
)

// Fetcher gives one KEK, as the commands of kms/command do.
type Fetcher interface {
	Fetch(ctx context.Context) (*secret.Bytes, error)
}

// FromFetchers is a source of the KEK that encrypts and of older ones, which decrypt.
// All of them are asked at a time, and one that fails fails the fetch.
func FromFetchers(current Fetcher, old ...Fetcher) Source {
	return fetchers(append([]Fetcher{current}, old...))
}

type fetchers []Fetcher

// Fetch implements Source.
func (f fetchers) Fetch(ctx context.Context) (*Keys, error) {
	keys := make([]*secret.Bytes, len(f))
	errs := make([]error, len(f))
	done := make(chan struct{})
	for i, one := range f {
		go func() {
			keys[i], errs[i] = one.Fetch(ctx)
			done <- struct{}{}
		}()
	}
	for range f {
		<-done
	}
	k := &Keys{Current: keys[0], Old: keys[1:]}
	if err := errors.Join(errs...); err != nil {
		hint := "the log has what it wrote to standard error"
		if errors.Is(err, shell.ErrDeadline) {
			hint = "let it take longer with --deadline, which must fit into a fifth of --timeout"
		}
		return nil, errors.Join(failure.New(failure.Unreachable, err, hint), k.Close())
	}
	return k, nil
}

var _ Source = fetchers(nil)

// errLength is for sources whose keys have a length of their own.
func errLength(n int) error {
	return fmt.Errorf("%w: its key has %d bytes, allowed are 16, 24 and 32", ErrSource, n)
}
