package agent

import (
	"errors"
	"slices"
	"testing"

	"github.com/keyagent/keyagent/test/sim/seed"
)

// model is what a volume is, in other terms than the table's: whether there is a
// mapping, whether it is mounted, and what is being done to it.
type model struct {
	mapped, mounted, stopped bool
	doing                    string // "", open, create, close
	broken                   bool   // the last attempt failed
}

func (m model) state() State {
	switch {
	case m.doing == "close":
		return Closing
	case m.broken:
		return Failed
	case m.stopped:
		return Suspended
	case m.doing == "open":
		return Opening
	case m.doing == "create":
		return Provisioning
	case m.mounted:
		return Mounted
	case m.mapped:
		return Open
	}
	return Absent
}

// possible are the events that can happen to such a volume, and what comes of them.
// It is written from what the core does, not from the table.
func (m model) possible() map[Event]model {
	out := map[Event]model{}
	with := func(e Event, f func(*model)) {
		n := m
		f(&n)
		out[e] = n
	}
	idle := m.doing == ""
	if idle {
		with(EventOpen, func(n *model) { n.doing, n.broken, n.stopped = "open", false, false })
		with(EventClose, func(n *model) { n.doing = "close" })
	}
	switch m.doing {
	case "open", "create":
		with(EventFail, func(n *model) { n.doing, n.broken, n.stopped = "", true, false })
		if m.doing == "open" {
			with(EventCreate, func(n *model) { n.doing = "create" })
		}
		with(EventMapped, func(n *model) { n.doing, n.mapped, n.mounted, n.stopped = "", true, false, false })
		with(EventSuspend, func(*model) {}) // seen when the work is done
	case "close":
		with(EventClosed, func(n *model) { *n = model{} })
		with(EventKept, func(n *model) { n.doing = "" })
		// A lease that ends meanwhile changes nothing that closing shows.
		with(EventSuspend, func(*model) {})
		with(EventFail, func(*model) {})
	}
	if idle && !m.broken && m.mapped {
		if !m.mounted && !m.stopped {
			with(EventMounted, func(n *model) { n.mounted = true })
		}
		with(EventFail, func(n *model) { n.broken, n.stopped = true, false })
		with(EventSuspend, func(n *model) { n.stopped = true })
		if m.stopped {
			with(EventResume, func(n *model) { n.stopped = false })
		}
		with(EventGone, func(n *model) { *n = model{} })
	}
	if idle && m.broken {
		with(EventFail, func(*model) {})
	}
	return out
}

var allEvents = []Event{EventOpen, EventCreate, EventMapped, EventMounted, EventFail, EventClose, EventClosed, EventKept, EventSuspend, EventResume, EventGone}

// TestTheLifeOfAVolumeIsThatOfTheModel takes 100 000 random steps, one in ten of
// them impossible.
func TestTheLifeOfAVolumeIsThatOfTheModel(t *testing.T) {
	r := seed.Rand(t)
	m, c := model{}, condition{state: Absent}
	visited := map[State]int{}
	for step := range 100_000 {
		next := m.possible()
		possible := slices.Sorted(func(yield func(Event) bool) {
			for e := range next {
				if !yield(e) {
					return
				}
			}
		})
		e := possible[r.IntN(len(possible))]
		if r.IntN(10) == 0 {
			e = allEvents[r.IntN(len(allEvents))]
		}
		before := c
		err := c.on(e, errSome)
		n, can := next[e]
		switch {
		case can && err != nil:
			t.Fatalf("step %d: %s of %+v: %v", step, e, m, err)
		case !can && err == nil:
			t.Fatalf("step %d: %s of %+v was possible: %s", step, e, m, c.state)
		case err != nil:
			if !errors.Is(err, ErrTransition) || c != before {
				t.Fatalf("step %d: %v, changed %v", step, err, c != before)
			}
		default:
			m = n
		}
		if c.state != m.state() {
			t.Fatalf("step %d: after %s the table says %s, the model %s (%+v)", step, e, c.state, m.state(), m)
		}
		if (c.state == Failed) != (c.reason != nil) && c.state != Closing {
			t.Fatalf("step %d: %s with the reason %v", step, c.state, c.reason)
		}
		visited[c.state]++
	}
	for _, s := range States() {
		if visited[s] < 100 {
			t.Errorf("%s was visited %d times", s, visited[s])
		}
	}
}

var errSome = errors.New("some error")

func TestEveryStateCanBeLeftForAbsent(t *testing.T) {
	for _, s := range States() {
		seen, todo := map[State]bool{}, []State{s}
		for len(todo) > 0 {
			at := todo[0]
			todo = todo[1:]
			if seen[at] {
				continue
			}
			seen[at] = true
			for _, next := range life[at] {
				todo = append(todo, next)
			}
		}
		if !seen[Absent] {
			t.Errorf("%s is for ever", s)
		}
	}
}
