package lab

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
)

func TestCacheBuildsAnEntryOnceForAllWhoWantIt(t *testing.T) {
	dir := t.TempDir()
	var built atomic.Int32
	var running sync.WaitGroup
	for range 8 {
		running.Go(func() {
			// Each with its own handle, as other processes have.
			cache, err := OpenCache(dir)
			if err != nil {
				t.Error(err)
				return
			}
			entry, err := cache.entry(t.Context(), "kind", []string{"a", "b"}, func(dir string) error {
				built.Add(1)
				return os.WriteFile(filepath.Join(dir, "file"), []byte("content"), 0o600)
			})
			if err != nil {
				t.Error(err)
				return
			}
			if data, err := os.ReadFile(filepath.Join(entry, "file")); err != nil || string(data) != "content" {
				t.Errorf("%q, %v", data, err)
			}
		})
	}
	running.Wait()
	if built.Load() != 1 {
		t.Errorf("built %d times", built.Load())
	}
}

func TestCacheKeepsNothingOfAFailedBuild(t *testing.T) {
	cache, err := OpenCache(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	reason := errors.New("no network")
	var half string
	_, err = cache.entry(t.Context(), "kind", nil, func(dir string) error { half = dir; return reason })
	if !errors.Is(err, reason) {
		t.Errorf("got %v", err)
	}
	if exists(half) {
		t.Error("the half-built entry is left behind")
	}
	if _, err := cache.entry(t.Context(), "kind", nil, func(string) error { return nil }); err != nil {
		t.Errorf("the second attempt: %v", err)
	}
}

func TestCacheWaitsForAnotherOnlyAsLongAsItsContext(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "lock")
	unlock, err := lock(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := lock(ctx, path); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	unlock()
	again, err := lock(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	again()
}

func TestDigestTellsListsApart(t *testing.T) {
	lists := [][]string{nil, {""}, {"a", "b"}, {"ab"}, {"ab", ""}, {"a,", "b"}, {"1:a"}}
	seen := map[string]int{}
	for i, list := range lists {
		digest := digestOf(list)
		if j, there := seen[digest]; there {
			t.Errorf("%q and %q", lists[j], list)
		}
		seen[digest] = i
	}
}
