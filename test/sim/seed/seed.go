// Package seed gives tests random numbers that can be had again: the seed is in the
// log of a test that fails, and KEYAGENT_TEST_SEED repeats its run.
package seed

import (
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
)

// Rand returns a source for one test.
func Rand(t testing.TB) *rand.Rand {
	t.Helper()
	n := rand.Uint64()
	if text := os.Getenv("KEYAGENT_TEST_SEED"); text != "" {
		var err error
		if n, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatalf("KEYAGENT_TEST_SEED: %v", err)
		}
	}
	t.Logf("seed %d (KEYAGENT_TEST_SEED=%d repeats it)", n, n)
	return rand.New(rand.NewPCG(n, 0))
}
