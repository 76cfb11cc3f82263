package volume

import (
	"context"
	"encoding/hex"
	"strings"
	"testing"
	"time"

	"github.com/keyagent/keyagent/internal/proof"
	"github.com/keyagent/keyagent/kms"
)

// The life of a volume is a table; this is the whole of it.
func TestAVolumeLivesAsItsTableSays(t *testing.T) {
	want := map[State]string{
		Absent: "pending formatted active rotating retired", Pending: "formatted retired", Formatted: "active pending retired",
		Active: "rotating pending retired", Rotating: "active pending retired", Retired: "pending",
	}
	for state, next := range want {
		var got []string
		for _, s := range life[state].next {
			got = append(got, string(s))
		}
		if strings.Join(got, " ") != next {
			t.Errorf("after %q: %q", state, got)
		}
		if !state.allows(state) || state.allows("unknown") {
			t.Errorf("%q", state)
		}
	}
	if len(life) != len(want) {
		t.Errorf("there are %d states", len(life))
	}
	if !Pending.Before(Formatted) || !Formatted.Before(Active) || !Active.Before(Rotating) || !Rotating.Before(Retired) || Active.Before(Active) {
		t.Error("the order is another one")
	}
}

// A change that the table does not have is not written, whatever made it.
func TestAStoreWritesNoChangeThatTheTableDoesNotHave(t *testing.T) {
	w := newWorld(t)
	w.active(caller("node-1", "tpm:1"), one)
	for _, tt := range []struct {
		name string
		f    func(*Record) error
	}{
		{"active again formatted", func(r *Record) error { r.State = Formatted; return nil }},
		{"an unknown state", func(r *Record) error { r.State = "gone"; return nil }},
		{"no header", func(r *Record) error { r.HeaderMAC, r.CopyMACs = "", nil; return nil }},
		{"a volume of another name", func(r *Record) error { r.VolumeID = "../x"; return nil }},
	} {
		before, err := w.Get(context.Background(), "data-1")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Update(context.Background(), "data-1", tt.f); err == nil {
			t.Errorf("%s: it was written", tt.name)
		}
		if after, err := w.Get(context.Background(), "data-1"); err != nil || after.Revision != before.Revision {
			t.Errorf("%s: revision %d became %d, %v", tt.name, before.Revision, after.Revision, err)
		}
	}
}

// Case 47: two nodes on one blank disk. The record names one of them before anything
// is written.
func TestOneAttemptAtATimeHasTheVolume(t *testing.T) {
	w := newWorld(t)
	first, second := caller("node-1", "tpm:1"), caller("node-2", "tpm:2")
	if err := w.begin(first, 1, header(0x10)); err != nil {
		t.Fatal(err)
	}
	err := w.begin(second, 2, header(0x20))
	is(t, "the other node", err, ErrHeld)
	if err == nil || !strings.Contains(err.Error(), "is being created by node-1 until 2026-01-02T03:06:05Z") {
		t.Errorf("it is not told who, and until when: %v", err)
	}
	r, err := w.Get(context.Background(), "data-1")
	if err != nil {
		t.Fatal(err)
	}
	is(t, "the key for the other", r.Free(second, w.clock.now()), ErrHeld)
	is(t, "the key for the same", r.Free(caller("node-1", "tpm:1"), w.clock.now()), nil)
	// The same machine after a crash does not wait for itself.
	if err := w.begin(first, 3, header(0x30)); err != nil {
		t.Fatal(err)
	}
	_, err = w.stands(first, 1, one)
	is(t, "its attempt from before", err, ErrAttempt)
	_, err = w.stands(second, 2, one)
	is(t, "an attempt that never was", err, ErrAttempt)
	if _, err := w.stands(first, 3, one); err != nil {
		t.Fatal(err)
	}
	is(t, "an attempt at what stands", w.begin(second, 2, header(0x20)), ErrTransition)
	is(t, "the loser's word", w.confirm(fill(2, 16), 0x30, true), ErrAttempt)
	is(t, "another header", w.confirm(fill(3, 16), 0x20, true), ErrConfirm)
	is(t, "the winner's word", w.confirm(fill(3, 16), 0x30, true), nil)
	is(t, "repeated", w.confirm(fill(3, 16), 0x30, true), nil)
}

// Case 47: a VM that was frozen in the middle wakes up when another one has the
// volume.
func TestAnAttemptThatWasTakenOverFailsAtItsNextStep(t *testing.T) {
	for name, at := range map[string]string{"before its header stands": "begin", "before it is confirmed": "stands"} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			frozen, next := caller("node-1", ""), caller("node-2", "")
			if err := w.begin(frozen, 1, header(0x10)); err != nil {
				t.Fatal(err)
			}
			if at == "begin" {
				w.clock.move(AttemptTerm - time.Second)
				is(t, "too early", w.begin(next, 2, header(0x20)), ErrHeld)
				w.clock.move(time.Second)
				is(t, "when it has ended", w.begin(next, 2, header(0x20)), nil)
				_, err := w.stands(frozen, 1, one)
				is(t, "the frozen one", err, ErrAttempt)
				return
			}
			if _, err := w.stands(frozen, 1, one); err != nil {
				t.Fatal(err)
			}
			_, err := w.takes(next, one)
			is(t, "too early", err, ErrHeld)
			w.clock.move(one.Term)
			r, err := w.takes(next, one)
			if err != nil || r.State != Formatted {
				t.Fatalf("when it has ended: %+v, %v", r, err)
			}
			is(t, "the frozen one", w.confirm(fill(1, 16), 0x10, true), ErrAttempt)
			id, _ := hex.DecodeString(r.Attempt.ID)
			is(t, "the one in possession", w.confirm(id, 0x10, true), nil)
		})
	}
}

// Its time may be up: as long as nobody took its place, nobody else wrote.
func TestAnAttemptThatIsLateAndAloneGoesOn(t *testing.T) {
	w := newWorld(t)
	c := caller("node-1", "")
	if err := w.begin(c, 1, header(0x10)); err != nil {
		t.Fatal(err)
	}
	w.clock.move(time.Hour)
	if _, err := w.stands(c, 1, one); err != nil {
		t.Fatal(err)
	}
	w.clock.move(time.Hour)
	is(t, "confirm", w.confirm(fill(1, 16), 0x10, true), nil)
}

// Case 47: what an attempt says counts on the connection on which it began.
func TestAnAttemptIsBoundToItsConnection(t *testing.T) {
	w := newWorld(t)
	c := caller("node-1", "tpm:1")
	if err := w.begin(c, 1, header(0x10)); err != nil {
		t.Fatal(err)
	}
	elsewhere := *c
	elsewhere.Channel = strings.Repeat("ee", 32)
	_, err := w.stands(&elsewhere, 1, one)
	is(t, "another connection", err, ErrAttempt)
	// Who knows the attempt can begin again there, with the same header only.
	is(t, "another header", w.begin(&elsewhere, 1, header(0x20)), ErrAttempt)
	is(t, "the same header", w.begin(&elsewhere, 1, header(0x10)), nil)
	_, err = w.stands(c, 1, one)
	is(t, "the first connection", err, ErrAttempt)
	_, err = w.stands(&elsewhere, 1, one)
	is(t, "the connection that it began on", err, nil)
	_, err = w.stands(&elsewhere, 1, one)
	is(t, "repeated", err, nil)
}

// Case 47: zeros are no MAC, and nothing of another size is one.
func TestAHeaderWithoutItsMACsIsRefused(t *testing.T) {
	w := newWorld(t)
	c := caller("node-1", "tpm:1")
	for name, change := range map[string]func(*Header){
		"a MAC of zeros":        func(h *Header) { h.MAC = make([]byte, 32) },
		"no MAC":                func(h *Header) { h.MAC = nil },
		"a short MAC":           func(h *Header) { h.MAC = h.MAC[1:] },
		"a copy's MAC of zeros": func(h *Header) { h.CopyMACs[1] = make([]byte, 32) },
		"one copy":              func(h *Header) { h.CopyMACs = h.CopyMACs[:1] },
		"three copies":          func(h *Header) { h.CopyMACs = append(h.CopyMACs, fill(1, 32)) },
		"no copies":             func(h *Header) { h.CopyMACs = nil },
		"another generation":    func(h *Header) { h.Generation = 2 },
		"another key version":   func(h *Header) { h.KeyVersion = 2 },
	} {
		h := header(0x10)
		change(&h)
		is(t, name, w.begin(c, 1, h), ErrConfirm)
	}
	is(t, "an attempt of zeros", w.begin(c, 0, header(0x10)), ErrAttempt)
	is(t, "a pending volume that nobody began", w.confirm(fill(1, 16), 0x10, true), ErrConfirm)
	is(t, "by nobody", w.confirm(nil, 0x10, true), ErrConfirm)
	is(t, "zeros", w.confirm(fill(1, 16), 0, true), ErrConfirm)
}

func TestAnOperatorEndsAndBeginsALife(t *testing.T) {
	w := newWorld(t)
	first := caller("node-1", "tpm:1")
	before := *w.active(first, one)
	update := func(f func(*Record) error) (*Record, error) { return w.Update(context.Background(), "data-1", f) }
	r, err := update((*Record).Retire)
	if err != nil || r.State != Retired || len(r.Keys) != 0 || r.Lease != nil {
		t.Fatalf("%+v, %v", r, err)
	}
	if body, _ := r.Encode(); strings.Contains(string(body), "wrapped") {
		t.Errorf("a retired record holds a key: %s", body)
	}
	if r, err = update((*Record).Retire); err != nil || r.Revision != before.Revision+1 {
		t.Errorf("repeated: %+v, %v", r, err)
	}
	key, err := w.NewKey(context.Background(), r.NextKey())
	if err != nil {
		t.Fatal(err)
	}
	r, err = update(func(r *Record) error { return r.Reset(key) })
	if err != nil || r.State != Pending || r.Generation != 2 || r.KeyVersion != 2 || r.LUKSUUID == before.LUKSUUID || r.HeaderMAC != "" {
		t.Fatalf("%+v, %v", r, err)
	}
	b, _, err := r.Binding()
	if err != nil || b != (kms.Binding{VolumeID: "data-1", Purpose: kms.VolumeDEK, Version: 2, Length: 32, Salt: key.Salt}) || len(key.Salt) != 64 || key.Salt == before.Keys[0].Salt {
		t.Errorf("%+v, %v", b, err)
	}
	is(t, "the header of the life before", w.begin(first, 5, header(0x10)), ErrConfirm)
	h := header(0x50)
	h.Generation, h.KeyVersion = 2, 2
	is(t, "a new header", w.begin(first, 5, h), nil)
	if r, err = update(func(r *Record) error { r.End(); return nil }); err != nil || r.Attempt != nil {
		t.Errorf("%+v, %v", r, err)
	}
	if proof.AttemptSize != leaseSize {
		t.Error("an attempt's ID cannot stand for a lease's")
	}
	is(t, "no volume", func() error { _, err := w.Update(context.Background(), "none", (*Record).Retire); return err }(), ErrTransition)
}
