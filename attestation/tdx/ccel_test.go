package tdx

import (
	"bytes"
	"encoding/binary"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/keyagent/keyagent/test/sim/intel"
)

// What no digest covers is not shown.
func TestDataThatWasNotMeasuredIsNotShown(t *testing.T) {
	log := bytes.Replace(logOf(intel.DefaultEvents()), []byte("Exit Boot Services Invocation"), []byte("Exit Boot Services invocation"), 1)
	parsed, err := parseCCEL(log)
	if err != nil {
		t.Fatal(err)
	}
	_, events, err := parsed.replay(1)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range events {
		if strings.Contains(e.Name, "invocation") || strings.Contains(e.Detail, "invocation") {
			t.Errorf("%+v", e)
		}
	}
}

// TestAForgedEventLogExplainsNothing: attack 27. Events are shown only where they replay
// to the quoted value, which no log changes, and what does not says why.
func TestAForgedEventLogExplainsNothing(t *testing.T) {
	events := intel.DefaultEvents()
	genuine := newScene(t).accepted()
	for name, c := range map[string]struct {
		log  func() []byte
		says string // with the register in front, if it is one's
	}{
		"a digest that was changed": {func() []byte {
			e := slices.Clone(events)
			e[4].Digest = bytes.Repeat([]byte{1}, 48)
			return logOf(e)
		}, "rtmr2: its 2 events, #5 EV_IPL (kernel (.linux)) to #6"},
		"two events in another order": {func() []byte {
			e := slices.Clone(events)
			e[0], e[1] = e[1], e[0]
			return logOf(e)
		}, "rtmr0: its 2 events"},
		"an event too many":             {func() []byte { return logOf(append(slices.Clone(events), events[4])) }, "rtmr2: its 3 events"},
		"an event too few":              {func() []byte { return logOf(events[:5]) }, "rtmr2: its 1 events"},
		"a register without its events": {func() []byte { return logOf(events[:4]) }, "rtmr2: the quote says"},
		"an event of a later register": {func() []byte {
			return logOf(append(slices.Clone(events), intel.Event{Register: 4, Type: intel.EventIPL, Data: []byte{1}}))
		}, "rtmr3: its 1 events"},
		"an event of MRTD": {func() []byte {
			return logOf(append(slices.Clone(events), intel.Event{Register: 0, Type: intel.EventIPL, Data: []byte{1}}))
		}, "event #7 (register 0"},
		"an event of no register": {func() []byte {
			return logOf(append(slices.Clone(events), intel.Event{Register: 5, Type: intel.EventIPL, Data: []byte{1}}))
		}, "event #7 (register 5"},
		"cut in the middle of an event": {func() []byte { l := logOf(events); return l[:len(l)-3] }, ""},
		"a log of the TPM's": {func() []byte {
			l := logOf(events)
			binary.LittleEndian.PutUint16(l[32+28:], 0x0b)
			return l
		}, ""},
		"bytes": {func() []byte { return []byte("event log") }, ""},
		"more events than there can be": {func() []byte {
			return logOf(slices.Repeat([]intel.Event{{Register: 1, Type: intel.EventIPL}}, maxEvents+1))
		}, "more than 4096 events"},
		"an event that says it is 4 GB": {func() []byte {
			l := logOf(events[:1])
			binary.LittleEndian.PutUint32(l[len(l)-len(events[0].Data)-4:], 0xfffffff0)
			return l
		}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t)
			s.ev.EventLog = c.log()
			got := s.accepted()
			why, _ := got.Facts["event_log_error"].(string)
			if readable := got.Facts["event_log"] == true; readable != (why == "") {
				t.Errorf("readable %v: %q", readable, why)
			}
			for register, m := range got.Measurements {
				if !bytes.Equal(m.Value, genuine.Measurements[register].Value) {
					t.Errorf("%s has another value", register)
				}
				if m.Unexplained != "" && len(m.Events) > 0 {
					t.Errorf("%s is explained, and is not: %s", register, m.Unexplained)
				}
				if m.Unexplained != "" && why == "" {
					why = register + ": " + m.Unexplained
				}
			}
			if why == "" || !strings.Contains(why, c.says) {
				t.Errorf("it says %q", why)
			}
		})
	}
	s := newScene(t)
	s.ev.EventLog = make([]byte, maxEventLog+1)
	if _, err := s.verify(); !errors.Is(err, ErrEventLog) || !strings.Contains(err.Error(), "at most") {
		t.Errorf("more than there can be: %v", err)
	}
}

func logOf(events []intel.Event) []byte {
	log, _ := intel.EventLog(events)
	return log
}

func TestWithoutALogRegistersHaveNoEvents(t *testing.T) {
	s := newScene(t)
	s.ev.EventLog = nil
	c := s.accepted()
	for name, m := range c.Measurements {
		if len(m.Events) > 0 || len(m.Value) != 48 {
			t.Errorf("%s: %+v", name, m)
		}
	}
	if c.Facts["event_log"] != false {
		t.Error("there is a log")
	}
}

func TestRTMR3BelongsToLaterSoftware(t *testing.T) {
	s := newScene(t, func(_ *intel.Platform, f *intel.Fields) { f.RTMR[3][0] = 1 })
	if c := s.accepted(); len(c.Measurements["rtmr3"].Events) != 0 {
		t.Error("events without a log of them")
	}
}

// TestPaddingIsCutBehindTheLastEvent: an event's own zeros stay.
func TestPaddingIsCutBehindTheLastEvent(t *testing.T) {
	// It ends with a separator, whose data is zeros.
	log := logOf(append(intel.DefaultEvents(), intel.Event{Register: 1, Type: intel.EventSeparator, Data: make([]byte, 4)}))
	for name, padding := range map[string][]byte{
		"none": nil, "ones": bytes.Repeat([]byte{0xff}, 9000), "zeros": make([]byte, 9000), "few": {0xff, 0xff},
	} {
		got := trimEventLog(append(bytes.Clone(log), padding...))
		if name == "few" {
			// Too little for an event, and left to the verifier.
			if !bytes.HasPrefix(got, log) {
				t.Error("the log was cut")
			}
			continue
		}
		if !bytes.Equal(got, log) {
			t.Errorf("%s: %d bytes, not %d", name, len(got), len(log))
		}
	}
	for _, junk := range [][]byte{nil, {1}, make([]byte, 100), bytes.Repeat([]byte{0xff}, 100), []byte(strings.Repeat("junk", 100))} {
		if got := trimEventLog(junk); len(got) > len(junk) {
			t.Errorf("%q became %d bytes", junk, len(got))
		}
	}
}
