package revocation

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/keyagent/keyagent/internal/macstore"
	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/kms/cluster"
	"github.com/keyagent/keyagent/storage"
	"github.com/keyagent/keyagent/storage/memfs"
)

var (
	node = Subject{Node, "tpm:af26140fbd4a46a55146b1172dd0dbcf3ce364e7a6fbc951905f2f0190b365e2"}
	data = Subject{Volume, "data-1"}
)

// world is one storage, a clock, and key services over them.
type world struct {
	t       *testing.T
	storage storage.Storage
	records *macstore.Store
	at      time.Time
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, storage: memfs.New(), at: time.Date(2026, 11, 28, 12, 0, 0, 0, time.UTC)}
	w.over(w.storage)
	return w
}

// over has the books that follow use another storage.
func (w *world) over(s storage.Storage) {
	w.t.Helper()
	records, err := macstore.Open(w.t.Context(), newKMS(w.t), s, nil)
	must(w.t, err)
	w.t.Cleanup(func() { records.Close() })
	w.records = records
}

func newKMS(t *testing.T) *cluster.KMS {
	t.Helper()
	master, err := secret.From([]byte(strings.Repeat("m", 32)))
	must(t, err)
	k, err := cluster.New(cluster.Options{MasterSecret: master})
	must(t, err)
	t.Cleanup(func() { k.Close() })
	return k
}

func (w *world) book(known ...Word) *Book {
	w.t.Helper()
	b := NewBook(w.records, func() time.Time { return w.at }, slog.New(slog.DiscardHandler), known)
	must(w.t, b.Load(w.t.Context()))
	return b
}

// bookOver is a book of another key service, over the same storage or one in front of it.
func (w *world) bookOver(s storage.Storage) *Book {
	w.t.Helper()
	other := &world{t: w.t, storage: s, at: w.at}
	other.over(s)
	return other.book()
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func say(t *testing.T, b *Book, s Subject, revoked bool) Word {
	t.Helper()
	w, err := b.Say(t.Context(), Word{Subject: s, Revoked: revoked, ID: rand.Text(), By: "uid:0", Reason: "stolen"}, unlogged)
	must(t, err)
	return w
}

func unlogged(Word) error { return nil }

func is(t *testing.T, b *Book, want bool, s ...Subject) {
	t.Helper()
	if w := b.Revoked(t.Context(), s...); (w != nil) != want {
		t.Errorf("%v: revoked by %+v", s, w)
	}
}

func TestAWordCountsUntilItIsLifted(t *testing.T) {
	w := newWorld(t)
	b, other := w.book(), w.book()
	is(t, b, false, node, data)
	if first := say(t, b, node, true); first.Number != 1 || !first.At.Equal(w.at) {
		t.Errorf("%+v", first)
	}
	is(t, b, true, node, data)
	is(t, b, false, data)
	if again := say(t, b, node, true); again.Number != 1 {
		t.Errorf("said twice it is %+v", again)
	}
	// Another key service hears of it at the next request after a while.
	is(t, other, false, node)
	w.at = w.at.Add(freshFor)
	is(t, other, true, node)
	if lifted := say(t, other, node, false); lifted.Number != 2 {
		t.Errorf("%+v", lifted)
	}
	is(t, other, false, node)
	is(t, b, false, node)
	if _, err := b.Say(t.Context(), Word{Subject: node}, unlogged); !errors.Is(err, ErrNotRevoked) {
		t.Error(err)
	}
	say(t, b, data, true)
	all, err := w.book().All(t.Context())
	if err != nil || len(all) != 1 || all[0].Subject != data || all[0].Reason != "stolen" {
		t.Errorf("%+v, %v", all, err)
	}
}

func TestASubjectIsANodeOrAVolume(t *testing.T) {
	b := newWorld(t).book()
	for _, s := range []Subject{{}, {Node, ""}, {Volume, ""}, {Volume, "a/b"}, {"fleet", "x"}, {Node, "a\nb"}, {Node, "snp:a+tpm:b"}, {Node, "tpm:af26"}, {Node, "tmp:x"}, {Node, "TPM:" + node.Name[4:]}, {Node, node.Name[4:]}, {Node, "snp:"}, {Node, "\xff"}, {Node, strings.Repeat("x", maxName+1)}} {
		if _, err := b.Say(t.Context(), Word{Subject: s, Revoked: true}, unlogged); !errors.Is(err, ErrSubject) {
			t.Errorf("%.40q: %v", s, err)
		}
	}
	for _, reason := range []string{"a\nb", strings.Repeat("x", maxReason+1), "\x1b[0m"} {
		if _, err := b.Say(t.Context(), Word{Subject: node, Revoked: true, Reason: reason}, unlogged); !errors.Is(err, ErrWord) {
			t.Errorf("%.40q: %v", reason, err)
		}
	}
	for _, s := range []Subject{node, data} {
		if got, err := ParseSubject(s.String()); err != nil || got != s {
			t.Errorf("%v, %v", got, err)
		}
	}
}

// hiding is a storage that leaves revocations out, or puts something among them.
type hiding struct {
	storage.Storage
	hidden bool
	fails  error // of a list
	full   error // of a write
	once   bool  // of one write alone
	read   error // of a volume's word
	hang   chan struct{}
}

func (h *hiding) Put(ctx context.Context, name string, data []byte, expect storage.Version) (storage.Version, error) {
	if err := h.full; err != nil && strings.HasPrefix(name, macstore.Revocation.Prefix) {
		if h.once {
			h.full = nil
		}
		return "", err
	}
	return h.Storage.Put(ctx, name, data, expect)
}

func (h *hiding) Get(ctx context.Context, name string) ([]byte, storage.Version, error) {
	if h.read != nil && strings.HasPrefix(name, macstore.Revocation.Prefix+"volume-") {
		return nil, "", h.read
	}
	return h.Storage.Get(ctx, name)
}

func (h *hiding) List(ctx context.Context, prefix, after string, limit int) ([]string, error) {
	if h.hang != nil && prefix == macstore.Revocation.Prefix {
		select {
		case <-h.hang:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	if h.fails != nil || h.hidden && prefix == macstore.Revocation.Prefix {
		return nil, h.fails
	}
	return h.Storage.List(ctx, prefix, after, limit)
}

func TestAWordIsNotForgotten(t *testing.T) {
	w := newWorld(t)
	h := &hiding{Storage: w.storage}
	w.over(h)
	b := w.book()
	word := say(t, b, node, true)
	h.hidden = true
	w.at = w.at.Add(time.Hour)
	is(t, b, true, node)            // by who has seen it
	is(t, w.book(word), true, node) // by who has it from the audit log
	h.hidden, h.fails = false, storage.ErrUnavailable
	w.at = w.at.Add(time.Hour)
	is(t, b, true, node)
	if err := b.Load(t.Context()); !errors.Is(err, storage.ErrUnavailable) {
		t.Error(err)
	}
	h.fails = nil
	// Two key services that did not hear of each other: the one that revokes counts.
	lifted := word
	lifted.Revoked = false
	is(t, w.book(lifted), true, node)
}

// An audit log that takes no entry does not keep anybody in.
func TestAWordIsInTheLog(t *testing.T) {
	b := newWorld(t).book()
	full := errors.New("full")
	var logged []uint64
	log := func(w Word) error { logged = append(logged, w.Number); return full }
	if w, err := b.Say(t.Context(), Word{Subject: node, Revoked: true}, log); !errors.Is(err, full) || w.Number != 1 {
		t.Errorf("%+v, %v", w, err)
	}
	is(t, b, true, node)
	if _, err := b.Say(t.Context(), Word{Subject: node}, log); !errors.Is(err, full) || len(logged) != 2 {
		t.Errorf("%v, %v", logged, err)
	}
	is(t, b, true, node)
}

// A key service whose log has more than the storage, by a crash in between or because that
// lost something, puts it back.
func TestWhatTheLogKnowsIsPutBack(t *testing.T) {
	w := newWorld(t)
	at := time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)
	known := []Word{{node, 1, true, "a", "uid:0", "stolen", at}, {data, 1, true, "b", "uid:0", "", at}, {data, 2, false, "c", "uid:0", "", at}}
	w.book(known...)
	other := w.book()
	is(t, other, true, node)
	is(t, other, false, data)
	if names, err := w.storage.List(t.Context(), macstore.Revocation.Prefix, "", 10); err != nil || len(names) != 2 {
		t.Errorf("%v, %v", names, err)
	}
}

// Who writes the storage makes no word, and moves none.
func TestJunkIsNoWord(t *testing.T) {
	w := newWorld(t)
	b := w.book()
	word := say(t, b, node, true)
	good, _, err := w.storage.Get(t.Context(), macstore.Revocation.Prefix+word.id())
	must(t, err)
	moved := word
	moved.Number = 2
	body, err := json.Marshal(word)
	must(t, err)
	if _, err := Parse(word.id(), body); err != nil {
		t.Error(err)
	}
	if _, err := Parse(moved.id(), body); !errors.Is(err, ErrWord) {
		t.Errorf("a word under another's name: %v", err)
	}
	for name, body := range map[string][]byte{
		moved.id():                          good,
		Word{Subject: data, Number: 1}.id(): good,
		"junk":                              []byte("junk"),
		"node-x/0000000001":                 nil,
	} {
		_, err := w.storage.Put(t.Context(), macstore.Revocation.Prefix+name, body, storage.Absent)
		must(t, err)
	}
	fresh := w.book()
	is(t, fresh, true, node)
	is(t, fresh, false, data)
	// A name that something else has is passed over.
	lift, err := fresh.Say(t.Context(), Word{Subject: node, By: "uid:0"}, unlogged)
	if err != nil || lift.Number != 3 {
		t.Errorf("%+v, %v", lift, err)
	}
	is(t, fresh, false, node)
	is(t, w.book(), false, node)
}

// A revocation is in force where it was said, whatever the storage does, and is stored as soon
// as that can be. A lift that was not stored never counts.
func TestAWordThatIsNotStored(t *testing.T) {
	w := newWorld(t)
	h := &hiding{Storage: w.storage, full: storage.ErrThrottled}
	w.over(h)
	b := w.book()
	var log []Word
	logged := func(w Word) error { log = append(log, w); return nil }
	word := Word{Subject: node, Revoked: true, ID: "said here", By: "uid:0"}
	for range 2 { // said again, it is still not stored
		if got, err := b.Say(t.Context(), word, logged); !errors.Is(err, ErrNotStored) || got.Number != 1 {
			t.Errorf("%+v, %v", got, err)
		}
		is(t, b, true, node)
	}
	h.fails = storage.ErrUnavailable
	if _, err := b.Say(t.Context(), word, logged); !errors.Is(err, ErrNotStored) || !errors.Is(err, storage.ErrUnavailable) {
		t.Error(err)
	}
	h.full, h.fails = nil, nil
	if _, err := b.Say(t.Context(), word, logged); err != nil || len(log) != 1 {
		t.Errorf("%v, %v", err, log)
	}
	is(t, w.book(), true, node)

	h.full = storage.ErrUnavailable
	if _, err := b.Say(t.Context(), Word{Subject: node, By: "uid:0"}, logged); !errors.Is(err, storage.ErrUnavailable) {
		t.Error(err)
	}
	is(t, b, true, node)
	is(t, w.book(log...), true, node) // who starts with that log
	h.full = nil
	again := w.book(log...)
	is(t, again, true, node)
	if got, err := again.Say(t.Context(), Word{Subject: node, By: "uid:0"}, logged); err != nil || got.Revoked {
		t.Errorf("%+v, %v", got, err)
	}
	is(t, again, false, node)
	is(t, w.book(log...), false, node)
}

// Two key services, of which one has not heard the other for a while: a revocation counts
// from the moment at which it is said, also against a lift that was said before.
func TestARevocationIsNotUndoneByWhatWasSaidBefore(t *testing.T) {
	w := newWorld(t)
	b := w.book()
	say(t, b, node, true)
	idle := w.book() // knows that, and hears nothing more
	say(t, b, node, false)
	if got := say(t, idle, node, true); !got.Revoked || got.Number != 3 {
		t.Errorf("%+v", got)
	}
	is(t, idle, true, node)
	is(t, w.book(), true, node)

	w = newWorld(t)
	b = w.book()
	say(t, b, node, true)
	say(t, b, node, false)
	idle = w.book()
	say(t, b, node, true)
	say(t, b, node, false)
	if got := say(t, idle, node, true); !got.Revoked || got.Number != 5 {
		t.Errorf("%+v", got)
	}
	is(t, w.book(), true, node)
}

// One that was said and logged while the storage was out of reach, as by a key service that
// ended right then, survives what others said meanwhile, once: who lifts it lifts it.
func TestARevocationThatWasNotStoredIsSaidAgain(t *testing.T) {
	w := newWorld(t)
	other := w.book()
	logged := Word{Subject: node, Number: 1, Revoked: true, ID: "of the log", By: "uid:0", At: w.at}
	say(t, other, node, true)
	say(t, other, node, false)
	here := w.book(logged)
	is(t, here, true, node)
	fresh := w.book()
	is(t, fresh, true, node)
	for range 2 { // each start reads the log again
		is(t, w.book(logged), true, node)
	}
	if names, err := w.storage.List(t.Context(), macstore.Revocation.Prefix, "", 10); err != nil || len(names) != 3 {
		t.Errorf("%v, %v", names, err)
	}
	say(t, fresh, node, false)
	is(t, w.book(logged), false, node)
	is(t, w.book(), false, node)
}

// What others lifted is heard of, and then the storage fails: the word counts here all the same.
func TestARevocationCountsWhenTheStorageFailsHalfWay(t *testing.T) {
	w := newWorld(t)
	b := w.book()
	say(t, b, node, true)
	h := &hiding{Storage: w.storage}
	w.over(h)
	idle := w.book()
	w.over(w.storage)
	say(t, b, node, false)
	h.read = storage.ErrThrottled // of an object behind the lift
	say(t, b, Subject{Volume, "z"}, true)
	if got, err := idle.Say(t.Context(), Word{Subject: node, Revoked: true, ID: "again", By: "uid:0"}, unlogged); !errors.Is(err, ErrNotStored) || !got.Revoked {
		t.Errorf("%+v, %v", got, err)
	}
	is(t, idle, true, node)
	h.read = nil
	must(t, idle.Load(t.Context()))
	is(t, w.book(), true, node)
}

// Who lifts lifts also what was not stored yet.
func TestALiftIsOfWhatWasNotStoredToo(t *testing.T) {
	w := newWorld(t)
	h := &hiding{Storage: w.storage, full: storage.ErrThrottled}
	w.over(h)
	b := w.book()
	if _, err := b.Say(t.Context(), Word{Subject: node, Revoked: true, ID: "x", By: "uid:0"}, unlogged); !errors.Is(err, ErrNotStored) {
		t.Error(err)
	}
	h.once = true // the word is tried again, in vain, and then the lift is stored
	if got, err := b.Say(t.Context(), Word{Subject: node, ID: "y", By: "uid:0"}, unlogged); err != nil || got.Revoked {
		t.Errorf("%+v, %v", got, err)
	}
	is(t, b, false, node)
	must(t, b.Load(t.Context()))
	is(t, b, false, node)
	is(t, w.book(), false, node)
}

// A storage that cannot be read leaves open what others know, and that is said.
func TestARevocationThatIsThereAndCannotBeRead(t *testing.T) {
	w := newWorld(t)
	h := &hiding{Storage: w.storage}
	w.over(h)
	b := w.book()
	say(t, b, node, true)
	h.fails = storage.ErrUnavailable
	if got, err := b.Say(t.Context(), Word{Subject: node, Revoked: true, ID: "x", By: "uid:0"}, unlogged); !errors.Is(err, ErrNotStored) || !got.Revoked {
		t.Errorf("%+v, %v", got, err)
	}
}

// A storage that hangs keeps nobody waiting for long, and nobody's haste stops the reading.
func TestAStorageThatHangsIsNotWaitedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		h := &hiding{Storage: w.storage, hang: make(chan struct{})}
		w.over(h)
		b := NewBook(w.records, time.Now, slog.New(slog.DiscardHandler), nil)
		hasty, cancel := context.WithCancel(t.Context())
		cancel()
		b.Revoked(hasty, node)
		began := time.Now()
		for range 3 {
			is(t, b, false, node)
		}
		if took := time.Since(began); took > 4*waitFor {
			t.Errorf("three requests took %v", took)
		}
		say(t, w.bookOver(w.storage), node, true)
		close(h.hang)
		synctest.Wait()
		time.Sleep(freshFor)
		is(t, b, true, node)
	})
}

func FuzzWord(f *testing.F) {
	good := Word{Subject: node, Number: 1, Revoked: true, By: "uid:0", At: time.Unix(0, 0).UTC()}
	body, err := json.Marshal(good)
	must(f, err)
	f.Add(good.id(), body)
	f.Add("x", []byte(`{"kind":"volume","name":"data-1","number":0}`))
	f.Fuzz(func(t *testing.T, id string, body []byte) {
		w, err := Parse(id, body)
		switch {
		case err != nil && !errors.Is(err, ErrWord):
			t.Fatal(err)
		case err == nil && (w.id() != id || w.Validate() != nil || w.Number == 0):
			t.Fatalf("%+v under %s", w, id)
		}
	})
}
