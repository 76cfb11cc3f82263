package witness

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/keyagent/keyagent/internal/checkpoint"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/secret"
)

func must[T any](t testing.TB) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// service is a key service's log, which can be put back and forked.
type service struct {
	t      testing.TB
	signer *checkpoint.Signer
	hashes []tlog.Hash
	size   int64
}

func newService(t testing.TB, first string) *service {
	t.Helper()
	seed := must[*secret.Bytes](t)(secret.From(bytes.Repeat([]byte{7}, 32)))
	t.Cleanup(func() { seed.Close() })
	s := &service{t: t, signer: must[*checkpoint.Signer](t)(checkpoint.NewSigner(seed, sha256.Sum256([]byte(first))))}
	s.add(first)
	return s
}

func (s *service) ReadHashes(indexes []int64) ([]tlog.Hash, error) {
	out := make([]tlog.Hash, len(indexes))
	for i, x := range indexes {
		out[i] = s.hashes[x]
	}
	return out, nil
}

func (s *service) add(lines ...string) {
	s.t.Helper()
	for _, line := range lines {
		s.hashes = append(s.hashes, must[[]tlog.Hash](s.t)(tlog.StoredHashes(s.size, []byte(line), s))...)
		s.size++
	}
}

// snapshot is a copy of the log as it is now.
func (s *service) snapshot() *service {
	out := *s
	out.hashes = append([]tlog.Hash{}, s.hashes...)
	return &out
}

// answer is what a key service says to one that sent notes. It never looks at them, as one
// that is hostile or was put back together with its program.
func (s *service) answer(notes [][]byte) Answer {
	s.t.Helper()
	c := must[*checkpoint.Signed](s.t)(s.signer.Sign(s.size, must[tlog.Hash](s.t)(tlog.TreeHash(s.size, s))))
	a := Answer{Key: s.signer.Public(), Note: c.Note}
	for _, n := range notes {
		old, err := checkpoint.Parse(s.signer.Public(), n)
		if err != nil || old.Log != c.Log || old.Size > c.Size {
			continue
		}
		for _, h := range must[tlog.TreeProof](s.t)(tlog.ProveTree(c.Size, old.Size, s)) {
			a.Consistency = append(a.Consistency, h[:])
		}
	}
	return a
}

// memory is one that may fail.
type memory struct {
	data   []byte
	unread error // of Load
	err    error // of both
	puts   int
}

func (m *memory) Load() ([]byte, error) { return m.data, errors.Join(m.unread, m.err) }
func (m *memory) Store(p []byte) error {
	if len(p) != Size {
		return errors.New("another size")
	}
	m.puts++
	if m.err == nil {
		m.data = bytes.Clone(p)
	}
	return m.err
}

type world struct {
	memory *memory
	logged *bytes.Buffer
	now    time.Time
	later  func() // what is to be done after a while
}

func newWorld() *world {
	return &world{memory: &memory{}, logged: &bytes.Buffer{}, now: time.Unix(1e9, 0)}
}

// node is a process that begins now.
func (w *world) node() *Witness {
	return New(Options{Memory: w.memory, Log: slog.New(slog.NewTextHandler(w.logged, nil)), Every: time.Hour, Now: func() time.Time { return w.now },
		After: func(d time.Duration, f func()) func() bool {
			w.later = func() { w.now = w.now.Add(d); f() }
			return func() bool { w.later = nil; return true }
		}})
}

func visit(n *Witness, s *service) error {
	a := n.Ask()
	return a.Hear(s.answer(a.Notes()))
}

func wantBack(t *testing.T, err error, says ...string) {
	t.Helper()
	if !errors.Is(err, checkpoint.ErrBack) || failure.Of(err).Class != failure.Tampered {
		t.Errorf("got %v", err)
		return
	}
	for _, s := range says {
		if !strings.Contains(err.Error(), s) {
			t.Errorf("%q is not in %v", s, err)
		}
	}
}

// Case 104: storage and log are put back together, and the first node that comes back sees it,
// also as another process.
func TestALogThatWasPutBackIsRefused(t *testing.T) {
	w, s := newWorld(), newService(t, "a")
	n := w.node()
	s.add("b", "c")
	old := s.snapshot()
	s.add("d", "e")
	if err := visit(n, s); err != nil {
		t.Fatal(err)
	}
	wantBack(t, visit(n, old), "5 entries", "3 entries")
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	wantBack(t, visit(w.node(), old), "5 entries", "3 entries")
	old.add("x", "y", "z")
	wantBack(t, visit(w.node(), old), "5 entries", "6 entries")
	// The refusal is not remembered: the right log is welcome.
	s.add("f")
	if err := visit(w.node(), s); err != nil {
		t.Error(err)
	}
}

// Two replicas that were made from one copy show two views of one log.
func TestASplitViewIsNoticed(t *testing.T) {
	w, a := newWorld(), newService(t, "a")
	a.add("b", "c")
	b := a.snapshot()
	a.add("of a")
	b.add("of b")
	n := w.node()
	if err := visit(n, a); err != nil {
		t.Fatal(err)
	}
	wantBack(t, visit(n, b), "4 entries")
	b.add("more")
	wantBack(t, visit(n, b))
}

func TestALogThatIsNewIsTakenAndSaid(t *testing.T) {
	w, a, b := newWorld(), newService(t, "a"), newService(t, "b")
	n := w.node()
	for range 3 {
		for _, s := range []*service{a, b} {
			s.add("more")
			if err := visit(n, s); err != nil {
				t.Fatal(err)
			}
		}
	}
	if got := strings.Count(w.logged.String(), "has not seen"); got != 1 {
		t.Errorf("said %d times:\n%s", got, w.logged)
	}
	wantBack(t, visit(n, newService(t, "a")))
}

// A service that shows nothing is of a release before; one that shows what nobody signed is
// not.
func TestAServiceThatShowsNothing(t *testing.T) {
	w, s := newWorld(), newService(t, "a")
	n := w.node()
	if err := n.Ask().Hear(Answer{}); err != nil || w.logged.Len() > 0 {
		t.Errorf("%v\n%s", err, w.logged)
	}
	if err := visit(n, s); err != nil {
		t.Fatal(err)
	}
	if err := n.Ask().Hear(Answer{}); err != nil || !strings.Contains(w.logged.String(), "older release") {
		t.Errorf("%v\n%s", err, w.logged)
	}
	good := s.answer(nil)
	for name, a := range map[string]Answer{
		"no key":      {Note: good.Note},
		"no note":     {Key: good.Key},
		"garbage":     {Key: good.Key, Note: []byte("x")},
		"another key": {Key: bytes.Repeat([]byte{3}, 32), Note: good.Note},
		"a short key": {Key: good.Key[:31], Note: good.Note},
	} {
		if err := n.Ask().Hear(a); failure.Of(err).Class != failure.Tampered {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Two requests are under way, and their answers come in the other order.
func TestAnswersOvertakeOneAnother(t *testing.T) {
	w, s := newWorld(), newService(t, "a")
	n := w.node()
	first := n.Ask()
	early := s.answer(first.Notes())
	s.add("b")
	if err := visit(n, s); err != nil {
		t.Fatal(err)
	}
	if err := first.Hear(early); err != nil {
		t.Errorf("an answer that was on its way: %v", err)
	}
	if got := n.Logs()[0].Last.Size; got != 2 {
		t.Errorf("%d entries are remembered", got)
	}
}

// A memory that wears is written once an hour, and at the end.
func TestTheMemoryIsSpared(t *testing.T) {
	w, s := newWorld(), newService(t, "a")
	n := w.node()
	for range 10 {
		s.add("more")
		if err := visit(n, s); err != nil {
			t.Fatal(err)
		}
	}
	if w.memory.puts != 1 {
		t.Errorf("written %d times", w.memory.puts)
	}
	w.now = w.now.Add(10 * time.Minute)
	s.add("more")
	if err := visit(n, s); err != nil || w.later == nil {
		t.Fatalf("nothing is to be written later: %v", err)
	}
	w.later()
	if got := w.node().Logs()[0].Last.Size; w.memory.puts != 2 || got != s.size {
		t.Errorf("written %d times, the last time of %d entries", w.memory.puts, got)
	}
	w.now = w.now.Add(time.Hour)
	s.add("more")
	if err := visit(n, s); err != nil || w.memory.puts != 3 {
		t.Errorf("written %d times, %v", w.memory.puts, err)
	}
	s.add("more")
	if err := errors.Join(visit(n, s), n.Close(), n.Close()); err != nil || w.memory.puts != 4 || w.later != nil {
		t.Errorf("written %d times, %v", w.memory.puts, err)
	}
	if got := w.node().Logs()[0].Last.Size; got != s.size {
		t.Errorf("%d entries, want %d", got, s.size)
	}
}

// Two processes on one memory: the later view stays.
func TestTwoProcessesShareAMemory(t *testing.T) {
	w, s, other := newWorld(), newService(t, "a"), newService(t, "b")
	one, two := w.node(), w.node()
	if err := visit(one, s); err != nil {
		t.Fatal(err)
	}
	s.add("b", "c")
	if err := errors.Join(visit(two, s), visit(two, other), two.Close()); err != nil {
		t.Fatal(err)
	}
	late := s.snapshot()
	w.now = w.now.Add(2 * time.Hour)
	// one has seen one entry, and is told of it again: what two wrote is not lost.
	early := newService(t, "a")
	if err := errors.Join(visit(one, early), one.Close()); err != nil {
		t.Fatal(err)
	}
	if got := w.node().Logs(); len(got) != 2 {
		t.Errorf("%d logs are left", len(got))
	}
	wantBack(t, visit(w.node(), early), "3 entries", "1 entries")
	if err := visit(w.node(), late); err != nil {
		t.Error(err)
	}
}

// What cannot be read now is not overwritten, and read later.
func TestAMemoryThatFails(t *testing.T) {
	w, s := newWorld(), newService(t, "a")
	s.add("b")
	n := w.node()
	if err := errors.Join(visit(n, s), n.Close()); err != nil {
		t.Fatal(err)
	}
	kept := bytes.Clone(w.memory.data)
	w.memory.err = errors.New("the TPM is busy")
	n = w.node()
	early := newService(t, "a")
	if err := visit(n, early); err != nil {
		t.Fatalf("nobody can know: %v", err)
	}
	if !strings.Contains(w.logged.String(), "the TPM is busy") || !bytes.Equal(w.memory.data, kept) {
		t.Errorf("%s", w.logged)
	}
	w.memory.err, w.memory.unread = nil, errors.New("the TPM is busy")
	for range 2 { // the second time it has something to write
		if err := errors.Join(visit(n, early), n.Close()); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(w.memory.data, kept) {
		t.Error("what could not be read was overwritten")
	}
	w.memory.unread = nil
	wantBack(t, visit(n, early), "2 entries", "1 entries")
}

func TestADamagedMemoryLosesWhatIsDamaged(t *testing.T) {
	w := newWorld()
	n := w.node()
	for _, first := range []string{"a", "b", "c", "d", "e", "f", "g"} {
		if err := visit(n, newService(t, first)); err != nil {
			t.Fatal(err)
		}
	}
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	good := bytes.Clone(w.memory.data)
	if got := w.node().Logs(); len(got) != MaxLogs {
		t.Fatalf("%d logs", len(got))
	}
	for name, tt := range map[string]struct {
		change func([]byte) []byte
		left   int
	}{
		"nothing":            {func([]byte) []byte { return nil }, 0},
		"zeros":              {func(p []byte) []byte { return make([]byte, len(p)) }, 0},
		"cut":                {func(p []byte) []byte { return p[:len(p)-1] }, 0},
		"another version":    {func(p []byte) []byte { p[0]++; return p }, 0},
		"too many":           {func(p []byte) []byte { p[1] = 200; return p }, 0},
		"a bit of a size":    {func(p []byte) []byte { p[2+50] ^= 1; return p }, MaxLogs - 1},
		"half of it was old": {func(p []byte) []byte { copy(p[512:], make([]byte, 500)); return p }, 3},
	} {
		w.memory.data = tt.change(bytes.Clone(good))
		w.logged.Reset()
		if got := len(w.node().Logs()); got != tt.left {
			t.Errorf("%s: %d logs are left", name, got)
		}
		if said := strings.Contains(w.logged.String(), "damaged"); said != (name != "nothing") {
			t.Errorf("%s: %s", name, w.logged)
		}
	}
}

func FuzzDecode(f *testing.F) {
	w := newWorld()
	n := w.node()
	if err := errors.Join(visit(n, newService(f, "a")), n.Close()); err != nil {
		f.Fatal(err)
	}
	f.Add(w.memory.data)
	f.Fuzz(func(t *testing.T, data []byte) {
		logs, _ := decode(data)
		if len(logs) > MaxLogs {
			t.Errorf("%d logs", len(logs))
		}
		for _, l := range logs {
			if _, err := checkpoint.Parse(l.Key, l.Last.Note); err != nil {
				t.Error(err)
			}
		}
	})
}
