package tdx

import (
	"bytes"
	"crypto/sha512"
	"encoding/binary"
	"fmt"
	"strings"

	"github.com/google/go-eventlog/tcg"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/eventlog"
	"github.com/keyagent/keyagent/attestation/facts"
)

// ccel is a parsed confidential-computing event log (CCEL): the events of a
// TPM's log with SHA-384 digests, over the registers of a TD. Nothing in it is
// proved until explain replays it to a quoted value.
type ccel struct {
	events []tcg.Event
}

const (
	// maxEvents bounds the work of a replay; firmware writes a few hundred.
	maxEvents = 4096
	// An event's index is that of the firmware's protocol (UEFI specification,
	// EFI_CC_MEASUREMENT_PROTOCOL): 0 is MRTD, which nothing extends after the
	// TD was built, 1 to 4 are RTMR0 to RTMR3.
	firstIndex, lastIndex = 1, 4
	// RTMR3 belongs to later software, which may keep no log.
	lastFirmwareRTMR = 2
)

// parseCCEL parses a log of at most maxEventLog bytes. Padding of 0xff may
// follow it.
func parseCCEL(log []byte) (*ccel, error) {
	if len(log) > maxEventLog {
		return nil, fmt.Errorf("%w: %d bytes, at most %d", ErrEventLog, len(log), maxEventLog)
	}
	events, err := eventlog.Parse(log, eventlog.SHA384, maxEvents)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrEventLog, err)
	}
	l := &ccel{events: events}
	for i, e := range l.events {
		if e.Type == tcg.NoAction {
			continue
		}
		if len(e.Digest) != sha512.Size384 {
			return nil, fmt.Errorf("%w: %s has no SHA-384 digest", ErrEventLog, l.label(i))
		}
		if e.Index < firstIndex || e.Index > lastIndex {
			return nil, fmt.Errorf("%w: %s is of a register that cannot be extended", ErrEventLog, l.label(i))
		}
	}
	return l, nil
}

// explain returns the events of one RTMR if they replay to value. An RTMR without
// events gives none. Events that lead elsewhere are an error that names them.
func (l *ccel) explain(rtmr int, value []byte) ([]attestation.Event, error) {
	state, events, err := l.replay(rtmr)
	if err != nil || len(events) == 0 {
		return nil, err
	}
	if !bytes.Equal(state, value) {
		first, last := events[0], events[len(events)-1]
		return nil, fmt.Errorf("%w: its %d events, #%d %s (%s) to #%d %s (%s), replay to %x, the quote says %x", ErrEventLog,
			len(events), first.Seq, first.Type, first.Name, last.Seq, last.Type, last.Name, state, value)
	}
	return events, nil
}

// replay returns the events of one RTMR and the value that they lead to, for
// making reference values from a trusted machine's log.
func (l *ccel) replay(rtmr int) ([]byte, []attestation.Event, error) {
	state := make([]byte, sha512.Size384)
	var events []attestation.Event
	for i, e := range l.events {
		if e.Index != rtmr+firstIndex || e.Type == tcg.NoAction {
			continue
		}
		state = extend(state, e.Digest)
		events = append(events, eventlog.Describe(i+1, e))
	}
	return state, events, nil
}

// extend is the TDX module's operation on an RTMR.
func extend(value, digest []byte) []byte {
	h := sha512.New384()
	h.Write(value)
	h.Write(digest)
	return h.Sum(nil)
}

func (l *ccel) label(i int) string {
	e := eventlog.Describe(i+1, l.events[i])
	return fmt.Sprintf("event #%d (register %d, %s, %s)", e.Seq, l.events[i].Index, e.Type, e.Name)
}

// explain attaches to each RTMR the events that replay to it, or why there are none. A
// log that explains nothing changes no value, and what must be explained is the
// policy's to say.
func explain(q *Quote, log []byte) (map[string]attestation.Measurement, error) {
	out := q.Claims().Measurements
	switch {
	case len(log) == 0:
		return out, nil
	case len(log) > maxEventLog:
		return nil, fmt.Errorf("%w: %d bytes, at most %d", ErrEventLog, len(log), maxEventLog)
	}
	parsed, err := parseCCEL(log)
	for i, v := range q.body.rtmr {
		m := attestation.Measurement{Value: v}
		why := err
		if why == nil {
			m.Events, why = parsed.explain(i, v)
		}
		if why == nil && i <= lastFirmwareRTMR && len(m.Events) == 0 && !zero(v) {
			why = fmt.Errorf("the quote says %x, the log has no event of it", v)
		}
		if why != nil {
			m.Unexplained = reason(why)
		}
		out[register(i)] = m
	}
	return out, nil
}

// reason is an error of a log without the words that evidence is refused for it.
func reason(err error) string { return strings.TrimPrefix(err.Error(), ErrEventLog.Error()+": ") }

// logFacts say of a log whether there is one, and whether it can be read.
func logFacts(log []byte, set map[string]any) {
	facts.EventLog.Put(set, len(log) > 0)
	if len(log) > 0 {
		if _, err := parseCCEL(log); err != nil {
			facts.EventLog.Put(set, false)
			facts.EventLogError.Put(set, reason(err))
		}
	}
}

// trimEventLog cuts the firmware's buffer of a fixed size behind its last event.
// The rest may be 0xff or 0, and an event's data may end with either, so that the
// events must be walked. A log that cannot be walked is left as it is.
func trimEventLog(log []byte) []byte {
	c := &cursor{rest: log}
	// The first event has the old form: index, type, SHA-1, data.
	c.take(4 + 4 + 20)
	spec := &cursor{rest: c.take(int(c.u32()))}
	spec.take(16 + 4 + 4)
	sizes := map[uint16]int{}
	for range min(spec.u32(), 16) {
		id := spec.u16()
		sizes[id] = int(spec.u16())
	}
	for {
		end := len(log) - len(c.rest)
		if len(c.rest) == 0 || len(c.rest) >= 8 && isPadding(c.rest[:8]) {
			return log[:end]
		}
		c.take(4 + 4)
		for range min(c.u32(), 16) {
			size, ok := sizes[c.u16()]
			if !ok {
				return log
			}
			c.take(size)
		}
		c.take(int(c.u32()))
		if c.short {
			return log
		}
	}
}

func isPadding(head []byte) bool {
	return binary.LittleEndian.Uint32(head) == 0xffffffff || zero(head)
}
