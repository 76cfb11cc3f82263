package agent

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/keyagent/keyagent/attestation/policy"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/keyclient"
	"github.com/keyagent/keyagent/internal/node"
	"github.com/keyagent/keyagent/internal/offline"
	"github.com/keyagent/keyagent/internal/secret"
)

// outage is a key service that answers with keys as it is told, and notes the order of what
// it is asked, with the keeper's work.
type outage struct {
	noKeys
	t       *testing.T
	err     error
	grant   *keyclient.Offline
	events  []string
	wanted  keyclient.OfflineLimits
	lease   []byte
	during  func() // the call
	reports []keyclient.OfflineReport
}

func (s *outage) note(what string) { s.events = append(s.events, what) }

func (s *outage) GetKey(_ context.Context, r keyclient.Request) (*keyclient.Key, error) {
	s.note("ask")
	s.wanted, s.lease = r.Offline, r.LeaseID
	if s.during != nil {
		s.during()
	}
	if s.err != nil {
		return nil, s.err
	}
	k := keptKey(s.t)
	k.Offline, k.OfflineWhy = s.grant, "because"
	return k, nil
}

func (s *outage) Renew(_ context.Context, _ string, id []byte) (*keyclient.Lease, error) {
	if s.err != nil {
		return nil, s.err
	}
	return &keyclient.Lease{ID: id, Term: 2 * time.Minute, Until: keyclient.Boottime() + 2*time.Minute}, nil
}

func (s *outage) Verdict(context.Context, string, bool) error { return s.err }

func (s *outage) Release(context.Context, string, []byte) error {
	s.note("release")
	return nil
}

func (s *outage) Report(_ string, r keyclient.OfflineReport) { s.reports = append(s.reports, r) }

func keptKey(t *testing.T) *keyclient.Key {
	t.Helper()
	dek, err := secret.From(bytes.Repeat([]byte{7}, 32))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dek.Close() })
	return &keyclient.Key{DEK: dek, Volume: "data", State: keyclient.Active, UUID: "0b5f6d0e-7c1a-4a52-9a86-3d0e6f1c2b4a",
		Lease: &keyclient.Lease{ID: make([]byte, 16), Term: 2 * time.Minute}}
}

// keeper keeps in memory what would be in a TPM.
type keeper struct {
	s      *outage
	has    bool
	hidden bool
	err    error // of everything
	use    offline.Use
}

func (k *keeper) Keep(context.Context, *keyclient.Key) error {
	k.s.note("keep")
	k.has = k.has || k.err == nil
	return k.err
}

func (k *keeper) Open(context.Context, string) (*keyclient.Key, offline.Use, error) {
	k.s.note("open kept")
	if k.err != nil || !k.has {
		return nil, offline.Use{}, errors.Join(k.err, offline.ErrNone)
	}
	k.use.Boots++
	return keptKey(k.s.t), k.use, nil
}

func (k *keeper) Forget(context.Context, string) (bool, error) {
	k.s.note("destroy")
	had := k.has
	if k.err == nil {
		k.has = false
	}
	return had, k.err
}

func (k *keeper) Has(string) bool { return k.has && !k.hidden }
func (k *keeper) Used(context.Context, string) (offline.Use, bool) {
	return k.use, k.use.Boots > 0
}

var granted = &keyclient.Offline{OfflineLimits: keyclient.OfflineLimits{For: time.Hour, Boots: 2}, PCRs: []uint32{4}}

// inOutage is a core with one volume that is kept, not open yet.
func inOutage(t *testing.T) (*outage, *keeper, *Volumes, *opening) {
	t.Helper()
	s := &outage{t: t, grant: granted}
	k := &keeper{s: s}
	c := NewVolumes(Options{Keys: s, Log: slog.New(slog.DiscardHandler), StateDir: t.TempDir(), Offline: k})
	v := node.Volume{ID: "data", Name: "ka-test-kept", Device: "/dev/null", Offline: &policy.Offline{For: "2h", Boots: 3}}
	c.Know(v)
	return s, k, c, &opening{Volumes: c, e: c.entryOf("data"), v: v, unheard: true}
}

func (s *outage) did(what string, want ...string) {
	s.t.Helper()
	if got, want := strings.Join(s.events, ", "), strings.Join(want, ", "); got != want {
		s.t.Errorf("%s: %s; want %s", what, got, want)
	}
	s.events = nil
}

func say(class failure.Class) error { return failure.New(class, errors.New("no"), "") }

func TestAKeyIsKeptWithLeaveAlone(t *testing.T) {
	s, k, c, o := inOutage(t)
	if _, err := o.key(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.did("with leave", "ask", "keep")
	if s.wanted != (keyclient.OfflineLimits{For: 2 * time.Hour, Boots: 3}) {
		t.Errorf("asked for %+v", s.wanted)
	}
	s.grant = nil
	if _, err := o.key(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.did("without leave", "ask", "destroy")
	if w := c.view(o.e).Warnings; len(w) != 1 || !strings.Contains(w[0], "no key is kept for an outage of the key service: because") {
		t.Errorf("%q", w)
	}
	s.grant, k.err, o.e.keptAt = granted, errors.New("a TPM that is busy"), 0
	if _, err := o.key(t.Context()); err != nil {
		t.Fatal(err) // the volume opens all the same
	}
	s.did("a TPM that fails", "ask", "keep", "destroy")
	if w := c.view(o.e).Warnings; len(w) != 1 || !strings.Contains(w[0], "busy") {
		t.Errorf("%q", w)
	}
	// A TPM's counter wears out: what is tried again and again is not kept each time.
	k.err = nil
	for range 10 {
		if _, err := o.key(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if got := strings.Join(s.events, " "); strings.Contains(got, "keep") {
		t.Errorf("ten more: %s", got)
	}
	s.events = nil
	// Nothing of it where the volume does not say so.
	k.err, o.v.Offline, o.e.spec.Offline = nil, nil, nil
	if _, err := o.key(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.did("a volume that is not kept", "ask")
	if s.wanted != (keyclient.OfflineLimits{}) {
		t.Errorf("asked for %+v", s.wanted)
	}
	k.has = true // of a configuration from before
	if _, err := o.key(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.did("a volume that is not kept any more", "ask", "destroy")
}

// Only silence is an outage. Whatever the key service says counts, and ends what is kept; so
// does nothing that another server says.
func TestAKeptKeyIsForAnOutageAlone(t *testing.T) {
	for class, want := range map[failure.Class]string{
		failure.Unreachable: "ask, open kept", failure.ServerUntrusted: "ask", failure.Internal: "ask", failure.NoDevice: "ask", failure.Configuration: "ask",
		failure.PolicyDenied: "ask, destroy", failure.EvidenceRefused: "ask, destroy", failure.Revoked: "ask, destroy",
		failure.State: "ask, destroy", failure.Held: "ask, destroy", failure.NotFound: "ask, destroy",
	} {
		s, k, c, o := inOutage(t)
		k.has, s.err = true, say(class)
		key, err := o.key(t.Context())
		s.did(string(class), want)
		if opened := class == failure.Unreachable; (err == nil) != opened || (key != nil) != opened || k.has != !strings.Contains(want, "destroy") {
			t.Errorf("%s: %v", class, err)
		} else if opened {
			if len(s.reports) != 1 || s.reports[0].Boots != 1 || !strings.Contains(strings.Join(c.view(o.e).Warnings, ""), "opened without the key service") {
				t.Errorf("%+v, %q", s.reports, c.view(o.e).Warnings)
			}
		} else if failure.Of(err).Class != class {
			t.Errorf("%s became %v", class, err)
		}
	}
	// What is suspended, or mapped by somebody, is not opened so.
	s, k, _, o := inOutage(t)
	k.has, s.err, o.unheard = true, say(failure.Unreachable), false
	if _, err := o.key(t.Context()); failure.Of(err).Class != failure.Unreachable {
		t.Error(err)
	}
	s.did("something is mapped", "ask")
	// And nothing is kept: it is the outage that counts, which is tried again.
	o.unheard, k.has = true, false
	if _, err := o.key(t.Context()); failure.Of(err).Class != failure.Unreachable || !errors.Is(err, offline.ErrNone) {
		t.Error(err)
	}
}

// Each question about an open volume may end it as well.
func TestARefusalDestroysWhatIsKept(t *testing.T) {
	s, k, c, o := inOutage(t)
	e := o.e
	for name, ask := range map[string]func(){
		"renewal": func() { e.lease.next = 0; c.renewNow(t, 1) },
		"verdict": func() {
			c.set(func() { e.lease, e.verdict.next = nil, 1 })
			for _, d := range c.dueVerdicts(keyclient.Boottime()) {
				c.askVerdict(t.Context(), d)
			}
		},
		"key": func() { _, _ = c.Keys.GetKey(t.Context(), keyclient.Request{Volume: "data"}) },
	} {
		k.has, s.err = true, say(failure.Unreachable)
		c.set(func() {
			e.known, e.condition.state, e.keptNothing = remembered{Spec: e.spec, UUID: "x"}, Open, false
			e.lease = &lease{id: make([]byte, 16), term: time.Minute}
		})
		if ask(); !k.has {
			t.Errorf("%s: silence destroyed it", name)
		}
		s.err = say(failure.Revoked)
		k.hidden = true // its file is away for a moment
		if ask(); k.has {
			t.Errorf("%s: it is kept", name)
		}
		k.hidden = false
		s.events = nil
		ask() // and the TPM is not asked each time
		if strings.Contains(strings.Join(s.events, ""), "destroy") {
			t.Errorf("%s: destroyed twice", name)
		}
	}
	k.has = true
	c.set(func() { c.entries["data"].keptNothing = false })
	for _, r := range []keyclient.Request{{Clone: true}, {Next: true}, {Rotate: true}, {Format: true}, {Diskless: true}} {
		r.Volume = "data"
		if _, _ = c.Keys.GetKey(t.Context(), r); !k.has {
			t.Errorf("%+v says nothing of opening the volume", r)
		}
	}
}

// A refusal that comes while a key is being kept is not lost.
func TestARefusalMeanwhileCounts(t *testing.T) {
	s, k, c, o := inOutage(t)
	s.during = func() { c.heard(t.Context(), "data", say(failure.Revoked)) }
	if _, err := o.key(t.Context()); err != nil {
		t.Fatal(err)
	}
	if k.has {
		t.Error("it is kept")
	}
}

// Who has a kept key has the lease: it is destroyed first, or the lease stays.
func TestALeaseNeverGoesWithoutItsKey(t *testing.T) {
	s, k, c, o := inOutage(t)
	k.has, k.hidden = true, true
	c.release(t.Context(), "data", make([]byte, 16))
	s.did("a lease that goes back", "destroy", "release")
	if k.has {
		t.Error("it is kept")
	}
	// Also where nothing says that it was ever kept: by a configuration of before, whose file the
	// host hides.
	k.has = true
	c.set(func() { o.e.keptNothing, o.e.spec.Offline = true, nil })
	c.release(t.Context(), "data", make([]byte, 16))
	s.did("a lease of a volume that is not kept", "destroy", "release")
	c.set(func() { o.e.spec.Offline = o.v.Offline })
	k.has, k.err = true, errors.New("a TPM that fails")
	c.set(func() { o.e.keptNothing = false })
	c.release(t.Context(), "data", make([]byte, 16))
	s.did("what cannot be destroyed", "destroy")
	// But a machine that has no TPM never kept anything.
	k.has, k.err, o.e.keptAt = false, fs.ErrNotExist, 0
	c.release(t.Context(), "data", make([]byte, 16))
	s.did("a machine without a TPM", "destroy", "release")
	c.set(func() { o.e.keptNothing = false })
	o.e.keptAt = 1
	c.release(t.Context(), "data", make([]byte, 16))
	s.did("a TPM that is gone", "destroy")
	k.has, k.err, k.hidden = true, nil, false
	if !c.keepsLease("data", o.e) {
		t.Error("a volume that is closed gives its lease back")
	}
	// Of a closed volume the machine asks for a lease again, to give it back.
	if _, err := c.GiveBack(t.Context(), "data"); err != nil {
		t.Fatal(err)
	}
	s.did("for another machine", "destroy", "ask", "release")
	if s.wanted != (keyclient.OfflineLimits{}) || c.keepsLease("data", o.e) {
		t.Errorf("asked for %+v", s.wanted)
	}
}

// An opening that fails after all, as for a disk that hangs, leaves what is kept.
func TestAFailedOpeningLeavesWhatIsKept(t *testing.T) {
	s, k, _, o := inOutage(t)
	k.has, s.err = true, say(failure.Unreachable)
	key, err := o.key(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	s.events = nil
	o.giveBack(t.Context(), key, errors.New("the disk hangs"))
	s.did("it failed")
	if !k.has {
		t.Error("it is gone")
	}
}

// grace.unreachable counts from the start of the machine for a volume that was opened so, also
// for an agent that starts later, and nothing is opened behind it.
func TestTheGraceOfAnOutageBeginsWithTheBoot(t *testing.T) {
	s, k, c, o := inOutage(t)
	k.has, s.err = true, say(failure.Unreachable)
	o.v.Grace.Unreachable = "1s" // this machine runs for longer
	if _, err := o.key(t.Context()); !errors.Is(err, errGraceOver) || failure.Of(err).Class != failure.Unreachable {
		t.Errorf("behind the grace: %v", err)
	}
	s.did("behind the grace", "ask")
	o.e.verdict.heard = keyclient.Boottime() // the key service answered a moment ago
	if _, err := o.key(t.Context()); err != nil {
		t.Errorf("within it: %v", err)
	}
	if o.before == 0 || o.kept == nil {
		t.Errorf("%v, %+v", o.before, o.kept)
	}

	r := remembered{Spec: o.v, UUID: "x", LeaseID: make([]byte, 16), LeaseTerm: time.Minute, Offline: &keptUse{Boots: 2, Since: time.Hour}}
	s.reports = nil
	c.set(func() { o.e.lease, o.e.known, o.e.condition.state, o.e.spec.Grace = nil, r, Open, o.v.Grace })
	o.e.verdict = verdict{}
	c.resumeLease(o.e, r)
	if len(s.reports) != 1 || s.reports[0] != (keyclient.OfflineReport{Boots: 2, Since: time.Hour}) || o.e.verdict.heard != 1 {
		t.Errorf("an agent that starts again: %+v, %v", s.reports, o.e.verdict.heard)
	}
	c.renewNow(t, keyclient.Boottime()+time.Hour)
	if o.e.condition.state != Suspended || !o.e.known.Withheld {
		t.Errorf("it is %s", o.e.condition.state)
	}
}

// With the first answer all is as if the key service had opened it, and the limits begin anew.
func TestAnAnswerEndsAnOutage(t *testing.T) {
	s, k, c, o := inOutage(t)
	k.has = true
	r := remembered{Spec: o.v, UUID: "x", LeaseID: make([]byte, 16), LeaseTerm: time.Minute, Offline: &keptUse{Boots: 2}}
	c.set(func() { o.e.known, o.e.condition.state = r, Open })
	c.resumeLease(o.e, r)
	now := keyclient.Boottime()
	if due := c.dueKept(now); len(due) != 0 {
		t.Error("the key service is asked twice for what it does not answer")
	}
	s.err = say(failure.Unreachable)
	c.renewNow(t, now+time.Hour)
	if o.e.known.Offline == nil || o.e.warnings["offline"] == "" {
		t.Error("silence is taken for an answer")
	}
	s.err = nil
	c.renewNow(t, now+2*time.Hour)
	if o.e.known.Offline != nil || o.e.warnings["offline"] != "" {
		t.Errorf("%+v, %q", o.e.known.Offline, o.e.warnings)
	}
	if again, ok := c.recall("data"); !ok || again.Offline != nil {
		t.Error("the next agent would say it again")
	}
	s.events = nil
	for _, d := range c.dueKept(now) {
		c.renewKept(t.Context(), d)
	}
	s.did("after the answer", "ask", "keep")
	if len(s.lease) != 16 {
		t.Error("it asks for another lease")
	}
	if next := o.e.keptNext - keyclient.Boottime(); next < 10*time.Minute || next > 15*time.Minute {
		t.Errorf("the next grant is asked for in %s", next)
	}
	if due := c.dueKept(keyclient.Boottime() + 5*time.Minute); len(due) != 0 {
		t.Error("it is asked for too early")
	}
	c.warn(o.e, "lease", "the lease could not be renewed")
	if due := c.dueKept(keyclient.Boottime() + time.Hour); len(due) != 0 {
		t.Error("it is asked for while no key service answers")
	}
}
