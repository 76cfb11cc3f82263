package audit

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

func wantErr(t testing.TB, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("got %v, want %v", err, want)
	}
}

func clock() time.Time { return time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC) }

func open(t testing.TB, path string) *Log {
	t.Helper()
	l, err := Open(path, clock, nil)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func entry(i int) Entry {
	return Entry{Event: "get-key", CorrelationID: fmt.Sprint("id-", i), Volume: "data-1", Operation: "open", Result: "allowed", Revision: uint64(i)}
}

// whole writes a log of n entries and returns its path, lines and head.
func whole(t testing.TB, n int) (path string, lines [][]byte, head Head) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "audit.log")
	l := open(t, path)
	for i := range n {
		if err := l.Append(entry(i + 1)); err != nil {
			t.Fatal(err)
		}
	}
	head = l.Head()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	lines = bytes.SplitAfter(data, []byte("\n"))
	return path, lines[:n], head
}

func check(data []byte) (Head, error) {
	w, err := Verify(bytes.NewReader(data), nil)
	return w.Head, err
}

func TestAWholeLogVerifies(t *testing.T) {
	_, lines, head := whole(t, 5)
	var seen []string
	got, err := Verify(bytes.NewReader(bytes.Join(lines, nil)), func(e Entry) { seen = append(seen, e.CorrelationID) })
	if err != nil || got.Head != head || head.Entries != 5 || strings.Join(seen, " ") != "id-1 id-2 id-3 id-4 id-5" {
		t.Fatalf("%+v, %+v, %v, %v", got, head, seen, err)
	}
	if empty, err := check(nil); err != nil || empty != genesis {
		t.Errorf("an empty log: %+v, %v", empty, err)
	}
}

// Every byte of every entry. A change of the last one leaves a chain that holds
// in itself; its head is another one.
func TestEverySingleByteThatIsChangedIsFound(t *testing.T) {
	_, lines, head := whole(t, 4)
	log := bytes.Join(lines, nil)
	for i := range log {
		for _, flip := range []byte{1, 0x20, 0x80} {
			changed := bytes.Clone(log)
			changed[i] ^= flip
			if got, err := check(changed); err == nil && got == head {
				t.Errorf("byte %d (%q) became %q, and nobody noticed", i, log[i], changed[i])
			} else if err != nil {
				wantErr(t, err, ErrBroken)
			}
			if last := len(log) - len(lines[3]); i < last {
				if _, err := check(changed); err == nil {
					t.Errorf("byte %d, before the last entry: the chain holds", i)
				}
			}
		}
	}
}

func TestEntriesThatAreMovedAreFound(t *testing.T) {
	_, l, head := whole(t, 4)
	_, other, _ := whole(t, 5)
	join := func(lines ...[]byte) []byte { return bytes.Join(lines, nil) }
	for name, log := range map[string][]byte{
		"the first is removed":     join(l[1], l[2], l[3]),
		"one is removed":           join(l[0], l[2], l[3]),
		"two are swapped":          join(l[0], l[2], l[1], l[3]),
		"one is there twice":       join(l[0], l[1], l[1], l[2], l[3]),
		"the last is there twice":  join(l[0], l[1], l[2], l[3], l[3]),
		"one is added in front":    join(other[4], l[0], l[1], l[2], l[3]),
		"one is added between":     join(l[0], other[4], l[1], l[2], l[3]),
		"an empty line":            join(l[0], []byte("\n"), l[1], l[2], l[3]),
		"a line without an end":    join(l[0], l[1], l[2], l[3][:len(l[3])-1]),
		"half a line behind":       join(l[0], l[1], l[2], l[3], []byte(`{"seq":5`)),
		"two objects on a line":    join(l[0], bytes.TrimSpace(l[1]), l[2], l[3]),
		"something behind the end": append(join(l[0], l[1], l[2]), append(bytes.TrimSpace(l[3]), "}\n"...)...),
		"a bracket behind the end": append(join(l[0], l[1], l[2]), append(bytes.TrimSpace(l[3]), "]\n"...)...),
		"an unknown field":         append(join(l[0], l[1], l[2]), append([]byte(`{"more":1,`), l[3][1:]...)...),
		"an endless line":          append(join(l[0]), append(bytes.Repeat([]byte(" "), 2*maxLine), '\n')...),
		"NULs":                     append(join(l[0]), append(make([]byte, 10), '\n')...),
	} {
		t.Run(name, func(t *testing.T) {
			_, err := check(log)
			wantErr(t, err, ErrBroken)
		})
	}
	// What cannot be seen without the head: a cut at the end. The head shows it.
	if got, err := check(join(l[0], l[1], l[2])); err != nil || got == head {
		t.Errorf("%+v, %v", got, err)
	}
}

// Case 40: a crash leaves half an entry, which nobody acted upon.
func TestATornTailIsCutOff(t *testing.T) {
	path, lines, _ := whole(t, 3)
	two := int64(len(lines[0]) + len(lines[1]))
	for cut := two + 1; cut < two+int64(len(lines[2])); cut += 7 {
		if err := os.WriteFile(path, bytes.Join(lines, nil)[:cut], 0o600); err != nil {
			t.Fatal(err)
		}
		l := open(t, path)
		if l.Recovered() != cut-two || l.Head().Entries != 2 {
			t.Errorf("cut at %d: %d bytes cut off, head %+v", cut, l.Recovered(), l.Head())
		}
		if err := l.Append(entry(3)); err != nil {
			t.Fatal(err)
		}
		l.Close()
		after, err := os.ReadFile(path)
		if err != nil || !bytes.Equal(after, bytes.Join(lines, nil)) {
			t.Fatalf("cut at %d: the log is another one, %v", cut, err)
		}
	}
}

func TestABrokenLogIsNotOpened(t *testing.T) {
	path, lines, _ := whole(t, 3)
	broken := append(bytes.Clone(lines[0]), lines[2]...)
	if err := os.WriteFile(path, broken, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := Open(path, clock, nil)
	wantErr(t, err, ErrBroken)
	if after, _ := os.ReadFile(path); !bytes.Equal(after, broken) {
		t.Error("the evidence was changed")
	}
	link := path + ".link"
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(link, clock, nil); err == nil {
		t.Error("a symbolic link was followed")
	}
}

// TestHelperOpens is the second process of the test below.
func TestHelperOpens(t *testing.T) {
	path := os.Getenv("AUDIT_HELPER")
	if path == "" {
		return
	}
	l, err := Open(path, clock, nil)
	if err != nil {
		fmt.Println("refused:", err)
		return
	}
	l.Close()
	fmt.Println("opened")
}

func TestOnlyOneProcessHasALogOpen(t *testing.T) {
	path, _, _ := whole(t, 1)
	second := func() string {
		cmd := exec.Command(os.Args[0], "-test.run", "^TestHelperOpens$")
		cmd.Env = append(os.Environ(), "AUDIT_HELPER="+path)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return string(out)
	}
	l := open(t, path)
	if out := second(); !strings.Contains(out, "another process") {
		t.Errorf("while it is open: %s", out)
	}
	if _, err := Open(path, clock, nil); err == nil {
		t.Error("the same process opens it twice")
	}
	l.Close()
	if out := second(); !strings.Contains(out, "opened") {
		t.Errorf("after it was closed: %s", out)
	}
}

func TestConcurrentEntriesAreAllThereInOneChain(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	l := open(t, path)
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			for i := range 25 {
				if err := l.Append(entry(w*100 + i)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	head := l.Head()
	l.Close()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	seen := map[string]bool{}
	got, err := Verify(f, func(e Entry) { seen[e.CorrelationID] = true })
	if err != nil || got.Head != head || len(seen) != 200 {
		t.Errorf("%d entries, %+v, %v", len(seen), got, err)
	}
}

// What cannot be written is not acted upon, and nothing follows it.
func TestALogThatFailsTakesNothingMore(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	l := open(t, path)
	l.file.Close()
	for range 2 {
		if err := l.Append(entry(1)); err == nil {
			t.Error("an entry was taken")
		}
	}
	if st, err := os.Stat(path); err != nil || st.Size() != 0 || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st, err)
	}
}

func TestTextOfAnyKindStaysOnItsLine(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	l := open(t, path)
	texts := []string{"line\nbreak\r\n", "\x00\xff\xfe", "{\"seq\":1}", "  ", strings.Repeat("é", maxLine)}
	for _, s := range texts {
		if err := l.Append(Entry{Event: "refused", Result: "refused", Detail: s}); err != nil {
			t.Errorf("%q: %v", s[:min(len(s), 20)], err)
		}
	}
	if err := l.Append(Entry{Event: strings.Repeat("x", 2*maxLine)}); err == nil {
		t.Error("an entry that no reader takes was written")
	}
	l.Close()
	l = open(t, path)
	defer l.Close()
	if l.Head().Entries != uint64(len(texts)) || l.Recovered() != 0 {
		t.Errorf("%+v", l.Head())
	}
}

// FuzzLine: a line is an entry or an error.
func FuzzLine(f *testing.F) {
	_, lines, _ := whole(f, 2)
	for _, l := range lines {
		f.Add(l)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		head, err := check(data)
		if err != nil {
			wantErr(t, err, ErrBroken)
			return
		}
		if (head == genesis) != (len(data) == 0) {
			t.Fatalf("%q is a log of %d entries", data, head.Entries)
		}
	})
}
