package audit

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/mod/sumdb/tlog"
)

// stored is the plain way to keep a tree: all of its hashes.
type stored []tlog.Hash

func (s stored) ReadHashes(indexes []int64) ([]tlog.Hash, error) {
	out := make([]tlog.Hash, len(indexes))
	for i, x := range indexes {
		out[i] = s[x]
	}
	return out, nil
}

// The tree that is computed again from the log is the one of a library that keeps all hashes,
// at each size and for proofs between any two.
func TestTheTreeIsTheOneThatALibraryKeeps(t *testing.T) {
	const n = 3*blockSize + 77
	var all stored
	var log strings.Builder
	tr := &tree{}
	for i := range int64(n) {
		line := fmt.Sprintf("entry %d%s", i, strings.Repeat("x", int(i%97)))
		h, err := tlog.StoredHashes(i, []byte(line), all)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, h...)
		tr.add([]byte(line))
		fmt.Fprintln(&log, line)
		want, err := tlog.TreeHash(i+1, all)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := tr.rootAt(i + 1); err != nil || got != want {
			t.Fatalf("over %d: %v, %v", i+1, got, err)
		}
	}
	tr.log = strings.NewReader(log.String())
	for range 500 {
		to := 1 + rand.Int64N(n)
		from := 1 + rand.Int64N(to)
		old, err := tr.rootAt(from)
		if err != nil {
			t.Fatal(err)
		}
		now, err := tlog.TreeHash(to, all)
		if err != nil {
			t.Fatal(err)
		}
		proof, err := tlog.ProveTree(to, from, tr)
		if err != nil {
			t.Fatalf("from %d to %d: %v", from, to, err)
		}
		if err := tlog.CheckTree(proof, to, now, from, old); err != nil {
			t.Fatalf("from %d to %d: %v", from, to, err)
		}
	}
	for _, size := range []int64{0, -1, n + 1} {
		if _, err := tr.rootAt(size); err == nil {
			t.Errorf("there is a root over %d", size)
		}
	}
}

func TestALogProvesThatItGoesOn(t *testing.T) {
	path, _, _ := whole(t, 600)
	l := open(t, path)
	defer l.Close()
	old, err := l.Root(l.Size())
	if err != nil {
		t.Fatal(err)
	}
	for i := range 10 {
		if err := l.Append(entry(i)); err != nil {
			t.Fatal(err)
		}
	}
	now, err := l.Root(610)
	if err != nil {
		t.Fatal(err)
	}
	proof, err := l.Consistency(600, 610)
	if err != nil {
		t.Fatal(err)
	}
	hashes := make(tlog.TreeProof, len(proof))
	for i := range proof {
		hashes[i] = tlog.Hash(proof[i])
	}
	if err := tlog.CheckTree(hashes, 610, now, 600, old); err != nil {
		t.Error(err)
	}
	for _, bad := range [][2]int64{{0, 610}, {-1, 5}, {600, 611}, {601, 600}} {
		if _, err := l.Consistency(bad[0], bad[1]); err == nil {
			t.Errorf("a proof from %d to %d", bad[0], bad[1])
		}
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w, err := Verify(f, nil)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := w.Root(600); err != nil || got != old {
		t.Errorf("%v, %v", got, err)
	}
	if first, ok := l.First(); !ok || first != w.First {
		t.Error("the log and its reader do not agree on the first line")
	}
}

// What is not on the disk yet a crash may take back: no checkpoint covers it.
func TestWhatIsNotSyncedIsNotCounted(t *testing.T) {
	l := open(t, filepath.Join(t.TempDir(), "audit.log"))
	defer l.Close()
	if _, ok := l.First(); ok || l.Size() != 0 {
		t.Error("an empty log has an entry")
	}
	if err := l.Append(entry(1)); err != nil {
		t.Fatal(err)
	}
	if _, err := l.write(entry(2)); err != nil {
		t.Fatal(err)
	}
	if l.Size() != 1 || l.Head().Entries != 2 {
		t.Errorf("%d of %d", l.Size(), l.Head().Entries)
	}
	if err := l.Append(entry(3)); err != nil || l.Size() != 3 {
		t.Errorf("%d, %v", l.Size(), err)
	}
}

// A log that is changed below the process is noticed when its old entries are needed.
func TestALogThatIsChangedBelowIsNoticed(t *testing.T) {
	path, _, _ := whole(t, 300)
	l := open(t, path)
	defer l.Close()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	data[1000] ^= 1
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Consistency(10, 300); !errors.Is(err, ErrBroken) {
		t.Errorf("got %v", err)
	}
}
