package kmstest

import (
	"errors"
	"testing"
	"time"

	"github.com/keyagent/keyagent/kms"
)

// Compare runs ours and bare in turns, so that both see the same machine, and
// reports how much longer ours takes.
func Compare(b *testing.B, ours, bare func() error) {
	b.Helper()
	var mine, theirs time.Duration
	for b.Loop() {
		start := time.Now()
		if err := bare(); err != nil {
			b.Fatal(err)
		}
		middle := time.Now()
		if err := ours(); err != nil {
			b.Fatal(err)
		}
		theirs += middle.Sub(start)
		mine += time.Since(middle)
	}
	b.ReportMetric(float64(mine)/float64(theirs), "ratio")
	b.ReportMetric(float64(theirs.Nanoseconds())/float64(b.N), "bare-ns/op")
}

// Bare is how the SDK of a backend does the same without this module.
type Bare struct{ Unwrap, Generate func() error }

// Bench compares a backend with the bare calls of its SDK: an unwrap of w, and a
// new key.
func Bench(b *testing.B, k kms.KMS, bind kms.Binding, w kms.Wrapped, bare Bare) {
	b.Run("unwrap", func(b *testing.B) {
		Compare(b, func() error {
			key, err := k.Unwrap(b.Context(), bind, w)
			return errors.Join(err, key.Close())
		}, bare.Unwrap)
	})
	b.Run("generate", func(b *testing.B) {
		Compare(b, func() error {
			key, _, err := k.Generate(b.Context(), bind)
			return errors.Join(err, key.Close())
		}, bare.Generate)
	})
}
