package agent

import (
	"errors"
	"fmt"
	"maps"
	"slices"
)

// State is where a volume is in its life on this node.
type State string

// The states. docs/volumes.md shows them with their events.
const (
	Absent       State = "absent"       // nothing is mapped
	Opening      State = "opening"      // its key is fetched, or it is being mapped, checked and mounted
	Provisioning State = "provisioning" // it is being created
	Open         State = "open"         // it is mapped
	Mounted      State = "mounted"      // it is mapped and mounted, or swapped to
	Suspended    State = "suspended"    // it is mapped; its I/O waits, and the kernel has no key
	Closing      State = "closing"
	Failed       State = "failed" // the last attempt to open it ended in an error
)

// Event is what happens to a volume.
type Event string

// The events.
const (
	EventOpen    Event = "open"    // somebody wants it open
	EventCreate  Event = "create"  // the key service says that it does not exist yet
	EventMapped  Event = "mapped"  // the kernel has the mapping
	EventMounted Event = "mounted" // it is where it should be
	EventFail    Event = "fail"    // opening ended in an error
	EventClose   Event = "close"   // somebody wants it closed
	EventClosed  Event = "closed"  // the mapping is gone
	EventKept    Event = "kept"    // closing was refused, and all is as it was
	EventSuspend Event = "suspend"
	EventResume  Event = "resume"
	EventGone    Event = "gone" // the mapping vanished by itself
)

// Where an event leads back to what was.
const (
	asRunning State = "as it was before it was suspended"
	asKept    State = "as it was before it was to be closed"
)

// life is the one table of what may happen when.
var life = map[State]map[Event]State{
	Absent:       {EventOpen: Opening, EventClose: Closing},
	Failed:       {EventOpen: Opening, EventFail: Failed, EventClose: Closing},
	Opening:      {EventCreate: Provisioning, EventMapped: Open, EventFail: Failed, EventSuspend: Opening},
	Provisioning: {EventMapped: Open, EventFail: Failed, EventSuspend: Provisioning},
	Open:         {EventOpen: Opening, EventMounted: Mounted, EventFail: Failed, EventClose: Closing, EventSuspend: Suspended, EventGone: Absent},
	Mounted:      {EventOpen: Opening, EventFail: Failed, EventClose: Closing, EventSuspend: Suspended, EventGone: Absent},
	Suspended:    {EventOpen: Opening, EventResume: asRunning, EventSuspend: Suspended, EventFail: Failed, EventClose: Closing, EventGone: Absent},
	Closing:      {EventClosed: Absent, EventKept: asKept, EventSuspend: Closing, EventFail: Closing},
}

// States are all of them, in byte order.
func States() []State { return slices.Sorted(maps.Keys(life)) }

// ErrTransition means that an event does not fit the state of a volume.
var ErrTransition = errors.New("not possible in this state")

// condition is the state of one volume, and why.
type condition struct {
	state   State
	running State // before it was suspended
	kept    State // before it was to be closed
	reason  error // of Failed
}

// on applies an event. An event that does not fit changes nothing.
func (c *condition) on(e Event, reason error) error {
	next, ok := life[c.state][e]
	if !ok {
		return fmt.Errorf("%w: %s, and the volume is %s", ErrTransition, e, c.state)
	}
	switch next {
	case asRunning:
		next = c.running
	case asKept:
		next = c.kept
	case Suspended:
		if c.state != Suspended {
			c.running = c.state
		}
	case Closing:
		if c.state != Closing {
			c.kept = c.state
		}
	case Failed:
		if reason != nil {
			c.reason = reason
		}
	case Opening, Absent:
		c.reason = nil
	}
	c.state = next
	return nil
}
