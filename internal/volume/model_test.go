package volume

import (
	"context"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/keyagent/keyagent/storage"
	"github.com/keyagent/keyagent/storage/memfs"
)

var seedFlag = flag.Uint64("seed", 0, "of the random walk through a volume's life; 0 takes one by the clock")

// faulty is a storage that loses answers, fails and conflicts as the walk wants.
type faulty struct {
	storage.Storage
	next    string // of the next Put: "", "lost", "fails", "conflict", "unread"
	applied bool   // the last Put that was asked for was carried out
	unread  bool
}

func (f *faulty) Put(ctx context.Context, name string, data []byte, expect storage.Version) (storage.Version, error) {
	fault := f.next
	f.next = ""
	switch fault {
	case "fails":
		return "", storage.ErrUnavailable
	case "conflict":
		return "", storage.ErrConflict
	}
	v, err := f.Storage.Put(ctx, name, data, expect)
	if err != nil {
		return v, err
	}
	f.applied = true
	switch fault {
	case "lost":
		return "", storage.ErrUnavailable
	case "unread":
		f.unread = true
	}
	return v, nil
}

func (f *faulty) Get(ctx context.Context, name string) ([]byte, storage.Version, error) {
	if f.unread {
		f.unread = false
		return nil, "", storage.ErrUnavailable
	}
	return f.Storage.Get(ctx, name)
}

// modelNode is a node as the model knows it: what it holds, and what it believes.
type modelNode struct {
	*Caller
	attempt []byte // that it began with
	mac     byte   // of the header that it would write
	lease   string // ID that it was answered with
	until   time.Time
	bound   bool
}

func (n *modelNode) writes(now time.Time) bool {
	return n.lease != "" && (!n.bound || now.Before(n.until))
}

// model is the life of a volume in as few words as possible. It knows nothing of
// records.
type model struct {
	state      State
	generation uint64
	mac        byte
	attempt    string // ID; "" for none
	attempter  *modelNode
	channel    string
	deadline   time.Time // of a pending attempt
	lease      string
	holder     *modelNode
	machine    string
	ends       time.Time // the earliest moment at which the lease has surely not been extended
	bound      bool
}

// walk is one random walk.
type walk struct {
	t      *testing.T
	rng    *rand.Rand
	clock  *clock
	disk   *faulty
	stores []*Store
	alone  bool
	began  time.Time // of the youngest store
	nodes  []*modelNode
	m      model
	steps  map[string]int
	now    time.Time
}

func newWalk(t *testing.T, seed uint64, alone bool) *walk {
	w := &walk{t: t, rng: rand.New(rand.NewPCG(seed, 1)), clock: newClock(), disk: &faulty{Storage: memfs.New()}, alone: alone, steps: map[string]int{}}
	w.stores = []*Store{newStore(t, w.disk, w.clock.now, alone)}
	if !alone {
		w.stores = append(w.stores, newStore(t, w.disk, w.clock.now, false))
	}
	w.began = w.clock.now()
	for i, machine := range []string{"tpm:1", "tpm:1", "tpm:2", "", ""} {
		w.nodes = append(w.nodes, &modelNode{Caller: caller(fmt.Sprint("node-", i), machine)})
	}
	if _, err := w.stores[0].Obtain(t.Context(), "data-1", "grant", 0); err != nil {
		t.Fatal(err)
	}
	w.m = model{state: Pending, generation: 1}
	return w
}

func (w *walk) store() *Store { return w.stores[w.rng.IntN(len(w.stores))] }

func (w *walk) terms() Terms {
	if w.m.lease != "" && w.rng.IntN(8) > 0 {
		return map[bool]Terms{true: expiring, false: one}[w.m.bound] // grants change rarely
	}
	t := []Terms{one, expiring}[w.rng.IntN(2)]
	t.Term = []time.Duration{30 * time.Second, 2 * time.Minute}[w.rng.IntN(2)]
	return t
}

// change runs an event, and returns whether it happened, whatever the node was told.
// may says what the model allows: "yes", "no", or "either".
func (w *walk) change(what, may string, f func(*Record) error) (happened, told bool) {
	w.t.Helper()
	faults := []string{"", "", "", "", "lost", "fails", "conflict", "unread"}
	w.disk.next, w.disk.applied, w.disk.unread = faults[w.rng.IntN(len(faults))], false, false
	fault := w.disk.next
	r, err := w.store().Update(w.t.Context(), "data-1", f)
	w.disk.next, w.disk.unread = "", false
	w.steps[what]++
	broken := errors.Is(err, storage.ErrUnavailable) || errors.Is(err, storage.ErrConflict)
	switch {
	case err == nil:
		happened, told = true, true
		if may == "no" {
			w.t.Fatalf("%s: allowed, and must not be: %+v\nmodel %+v", what, r, w.m)
		}
	case broken && fault != "":
		happened = w.disk.applied
		if happened && may == "no" {
			w.t.Fatalf("%s: written, and must not be", what)
		}
	case may == "yes":
		w.t.Fatalf("%s: refused, and must not be: %v\nmodel %+v", what, err, w.m)
	}
	return happened, told
}

func yes(ok bool) string { return map[bool]string{true: "yes", false: "no"}[ok] }

func (w *walk) begin(n *modelNode) {
	if n.attempt == nil || w.rng.IntN(3) > 0 {
		n.attempt = []byte(fmt.Sprintf("%016x", w.rng.Uint64()|1))
		n.mac = byte(1 + w.rng.IntN(100))
	}
	id := hex.EncodeToString(n.attempt)
	same := w.m.attempt == id
	free := w.m.attempt == "" || same || (n.Machine != "" && n.Machine == w.m.attempter.Machine) || !w.m.deadline.After(w.now)
	h := header(n.mac)
	h.Generation, h.KeyVersion = w.m.generation, uint32(w.m.generation)
	if happened, _ := w.change("begin", yes(w.m.state == Pending && free), func(r *Record) error { return r.Begin(n.Caller, n.attempt, h, w.now) }); happened {
		w.m.attempt, w.m.attempter, w.m.channel, w.m.deadline = id, n, n.Channel, w.now.Add(2*time.Minute)
	}
}

func (w *walk) stand(n *modelNode) {
	id, lease, t := hex.EncodeToString(n.attempt), NewID(), w.terms()
	ok := n.attempt != nil && (w.m.state == Pending || w.m.state == Formatted) && w.m.attempt == id && w.m.channel == n.Channel
	already := w.m.state == Formatted
	happened, told := w.change("stands", yes(ok), func(r *Record) error { return r.Stands(n.Caller, n.attempt, t, lease, w.now) })
	switch {
	case happened && ok && !already:
		w.m.state, w.m.mac = Formatted, n.mac
		w.hold(n, lease, t, told)
	case happened && ok && w.m.lease != "":
		// The first answer was lost: it is the holder from now on, as far as it knows.
		w.hold(w.m.holder, w.m.lease, t, told)
	}
}

// hold gives the lease to n.
func (w *walk) hold(n *modelNode, lease string, t Terms, told bool) {
	ends := w.now.Add(t.Term)
	if lease != w.m.lease {
		w.m.bound = t.Expiry || n.Machine == ""
	} else if w.m.ends.After(ends) {
		ends = w.m.ends // a holder that was told more goes by that
	}
	w.m.lease, w.m.holder, w.m.machine, w.m.ends = lease, n, n.Machine, ends
	if told {
		n.lease, n.until, n.bound = lease, w.now.Add(t.Term), w.m.bound
	}
}

func (w *walk) confirm(n *modelNode) {
	id := hex.EncodeToString(n.attempt)
	ok := n.mac == w.m.mac && n.mac != 0 && (w.m.state == Active || (w.m.state == Formatted && w.m.attempt == id))
	g, mac := w.m.generation, fill(n.mac, 32)
	if happened, _ := w.change("confirm", yes(ok), func(r *Record) error { return r.Confirm(n.attempt, g, uint32(g), mac, true) }); happened {
		w.m.state, w.m.attempt, w.m.attempter = Active, "", nil
	}
}

func (w *walk) take(n *modelNode) {
	if w.m.state != Active && w.m.state != Formatted {
		return
	}
	t, id := w.terms(), NewID()
	c := n.with(n.lease)
	may, alien := "yes", w.m.lease != "" && w.m.lease != n.lease && (n.Machine == "" || n.Machine != w.m.machine)
	if alien {
		// Clocks may be apart, and a restart forgets: it may be refused for longer.
		surely := w.m.ends.Add(Skew)
		if w.alone {
			if surely = w.m.ends; surely.Before(w.began.Add(2 * time.Minute)) {
				surely = w.began.Add(2 * time.Minute)
			}
		}
		switch {
		case !w.m.bound || w.now.Before(w.m.ends):
			may = "no"
		case w.now.Before(surely):
			may = "either"
		}
	}
	store := w.store()
	happened, told := w.change("take", may, func(r *Record) error { return r.Take(c, t, id, store.Ends(r), w.now) })
	if !happened {
		return
	}
	// What a node believes of a lease that its own machine's other node ended is that
	// machine's matter: it was restarted, or is a copy.
	if h := w.m.holder; alien && h.lease == w.m.lease && h.writes(w.now) {
		w.t.Fatalf("%s takes the volume while %s writes: %+v", n.Node, w.m.holder.Node, w.m)
	}
	lease := id
	if w.m.lease != "" && w.m.lease == n.lease {
		lease = w.m.lease
	}
	if w.m.state == Formatted && lease != w.m.lease {
		w.m.attempt, w.m.channel = id, n.Channel
		n.attempt, _ = hex.DecodeString(id)
		n.mac = w.m.mac
	}
	w.hold(n, lease, t, told)
}

func (w *walk) renew(n *modelNode) {
	if n.lease == "" {
		return
	}
	t := w.terms()
	w.disk.next, w.disk.applied = []string{"", "", "", "lost", "fails"}[w.rng.IntN(5)], false
	r, _, err := w.store().Renew(w.t.Context(), "data-1", n.with(n.lease), t)
	w.disk.next = ""
	w.steps["renew"]++
	ok := w.m.lease == n.lease
	switch {
	case err == nil && !ok:
		w.t.Fatalf("%s renewed a lease that is not its own: %+v", n.Node, r.Lease)
	case ok && (err == nil || w.disk.applied):
		w.hold(n, n.lease, t, err == nil)
	case errors.Is(err, storage.ErrUnavailable):
	case ok:
		w.t.Fatalf("%s could not renew: %v", n.Node, err)
	default:
		n.lease = "" // it was told
	}
}

func (w *walk) release(n *modelNode) {
	if n.lease == "" {
		return
	}
	happened, _ := w.change("release", yes(w.m.lease == "" || w.m.lease == n.lease), func(r *Record) error { return r.Release(n.with(n.lease)) })
	if happened {
		w.m.lease, w.m.holder = "", nil
	}
	n.lease = "" // it closed the volume before
}

// operator ends a lease or a life. What nodes believe after that is not the service's.
func (w *walk) operator() {
	ended := func() {
		for _, n := range w.nodes {
			n.lease = ""
		}
		w.m.lease, w.m.holder = "", nil
	}
	switch w.rng.IntN(3) {
	case 0:
		if happened, _ := w.change("end", "yes", func(r *Record) error { r.End(); return nil }); happened {
			if w.m.lease != "" || w.m.state == Pending {
				w.m.attempt = ""
			}
			ended()
		}
	case 1:
		if happened, _ := w.change("retire", "yes", (*Record).Retire); happened {
			w.m.state, w.m.attempt = Retired, ""
			ended()
		}
	case 2:
		key, err := w.store().NewKey(w.t.Context(), (&Record{VolumeID: "data-1", KeyVersion: uint32(w.m.generation)}).NextKey())
		if err != nil {
			w.t.Fatal(err)
		}
		if happened, _ := w.change("reset", "yes", func(r *Record) error { return r.Reset(key) }); happened {
			w.m.state, w.m.generation, w.m.attempt, w.m.mac = Pending, w.m.generation+1, "", 0
			ended()
		}
	}
}

func (w *walk) restart() {
	old := w.rng.IntN(len(w.stores))
	s := newStore(w.t, w.disk, w.clock.now, w.alone)
	s.NoteRevision("data-1", w.stores[old].Seen("data-1")) // its audit log
	w.stores[old], w.began = s, w.now
	w.steps["restart"]++
}

func (w *walk) step() {
	w.now = w.clock.now()
	n := w.nodes[w.rng.IntN(len(w.nodes))]
	switch i := w.rng.IntN(1000); {
	case i < 150:
		w.begin(n)
	case i < 350:
		w.stand(n)
	case i < 500:
		w.confirm(n)
	case i < 650:
		w.take(n)
	case i < 850:
		w.renew(n)
	case i < 890:
		w.release(n)
	case i < 893:
		w.operator()
	case i < 898:
		w.restart()
	default:
		w.clock.move(time.Duration(w.rng.Int64N(int64(50 * time.Second))))
	}
}

// compare demands that the record says what the model does.
func (w *walk) compare() {
	w.t.Helper()
	r, err := w.stores[0].Get(w.t.Context(), "data-1")
	if err != nil {
		w.t.Fatal(err)
	}
	attempt, lease, mac := "", "", ""
	if r.Attempt != nil {
		attempt = r.Attempt.ID
	}
	if r.Lease != nil {
		lease = r.Lease.ID
	}
	if w.m.mac != 0 {
		mac = strings.Repeat(fmt.Sprintf("%02x", w.m.mac), 32)
	}
	wantAttempt := w.m.attempt
	if r.State == Formatted && lease == "" && wantAttempt == "" {
		wantAttempt = attempt // ended by an operator: nobody knows the new one
	}
	if r.State != w.m.state || r.Generation != w.m.generation || r.HeaderMAC != mac || attempt != wantAttempt || lease != w.m.lease {
		w.t.Fatalf("the record says %s, generation %d, attempt %q, lease %q, MAC %.4s; the model %+v", r.State, r.Generation, attempt, lease, r.HeaderMAC, w.m)
	}
}

// Cases 47 and 64: the record's table against a model, with lost answers, failures,
// conflicts, restarts, several key services and time that passes.
func TestTheRecordLivesAsTheModelDoes(t *testing.T) {
	seed := *seedFlag
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	t.Logf("seed %d (again with -seed %d)", seed, seed)
	for _, alone := range []bool{true, false} {
		w := newWalk(t, seed, alone)
		for range 50_000 {
			w.step()
			w.compare()
		}
		t.Logf("alone %v: %v, generation %d", alone, w.steps, w.m.generation)
	}
}
