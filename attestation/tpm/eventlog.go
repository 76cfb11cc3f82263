package tpm

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"

	"github.com/google/go-eventlog/tcg"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/eventlog"
	"github.com/keyagent/keyagent/attestation/facts"
)

// EventLog is a parsed measured-boot log. Nothing in it is proved until
// [EventLog.Explain] replays it to a quoted value.
type EventLog struct {
	events []tcg.Event
	user   []userEvent
}

// maxEvents bounds the work of a replay; firmware writes a few hundred.
const maxEvents = 8192

// ParseEventLog parses a crypto-agile UEFI event log of at most [MaxEventLog]
// bytes with SHA-256 digests.
func ParseEventLog(log []byte) (*EventLog, error) {
	if len(log) > MaxEventLog {
		return nil, fmt.Errorf("%w: %d bytes, at most %d", ErrEventLogTooLarge, len(log), MaxEventLog)
	}
	events, err := eventlog.Parse(log, eventlog.SHA256, maxEvents)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrEventLog, err)
	}
	return &EventLog{events: events}, nil
}

// Explain returns the events of one PCR if they replay to value. A PCR that
// nothing was measured into, or only later software that keeps no log, gives none.
// Events that lead elsewhere are an error that names them.
//
// A log of the firmware ends when the kernel starts. What user space measures
// afterwards is taken from systemd's own log, as far as the value follows it, or
// else tried by the words that systemd is known to measure, and added by name.
func (l *EventLog) Explain(pcr uint32, value []byte) ([]attestation.Event, error) {
	state, events, err := l.replay(pcr)
	if err != nil {
		return nil, err
	}
	if bytes.Equal(state, value) {
		return events, nil
	}
	if tail, ok := l.userspace(pcr, state, value); ok {
		return append(events, tail...), nil
	}
	switch {
	case len(events) > 0:
		first, last := events[0], events[len(events)-1]
		return nil, fmt.Errorf("%w: pcr %d: its %d events, #%d %s (%s) to #%d %s (%s), replay to %x, the quote says %x",
			ErrEventLog, pcr, len(events), first.Seq, first.Type, first.Name, last.Seq, last.Type, last.Name, state, value)
	case pcr <= lastFirmwarePCR && !unextended(value):
		// Into these the firmware measures, and the firmware writes the log.
		return nil, fmt.Errorf("%w: pcr %d: the quote says %x, the log has no event of it", ErrEventLog, pcr, value)
	}
	return nil, nil
}

const lastFirmwarePCR = 7

// Replay returns the events of one PCR and the value that they lead to, for
// making reference values from a trusted machine's log. What systemd's own log
// has, if [EventLog.AddUserspace] added one, is among them.
func (l *EventLog) Replay(pcr uint32) ([]byte, []attestation.Event, error) {
	state, events, err := l.replay(pcr)
	if err != nil {
		return nil, nil, err
	}
	for _, e := range l.Userspace(pcr) {
		digest, _ := hex.DecodeString(e.Digest)
		state = Extend(state, digest)
		events = append(events, e)
	}
	return state, events, nil
}

// Userspace returns the entries of systemd's own log for a PCR.
func (l *EventLog) Userspace(pcr uint32) []attestation.Event {
	var out []attestation.Event
	for _, u := range l.user {
		if u.pcr == pcr {
			out = append(out, u.event())
		}
	}
	return out
}

func (l *EventLog) replay(pcr uint32) ([]byte, []attestation.Event, error) {
	state := make([]byte, sha256.Size)
	var events []attestation.Event
	for i, e := range l.events {
		if e.Index != int(pcr) {
			continue
		}
		if e.Type == tcg.NoAction {
			// The locality that started the TPM is PCR 0's first value.
			if pcr == 0 && len(events) == 0 && len(e.Data) == 17 && strings.HasPrefix(string(e.Data), "StartupLocality") {
				state[len(state)-1] = e.Data[16]
			}
			continue
		}
		if len(e.Digest) != sha256.Size {
			return nil, nil, fmt.Errorf("%w: %s has no SHA-256 digest", ErrEventLog, l.label(i))
		}
		if e.Type == tcg.EFIHCRTMEvent {
			if len(events) > 0 {
				return nil, nil, fmt.Errorf("%w: %s is not the first of its PCR", ErrEventLog, l.label(i))
			}
			state[len(state)-1] = 4
		}
		state = Extend(state, e.Digest)
		events = append(events, eventlog.Describe(i+1, e))
	}
	return state, events, nil
}

// SecureBoot returns whether the log says that Secure Boot is on, and whether it
// says so at all.
func (l *EventLog) SecureBoot() (on, said bool) {
	for _, e := range l.events {
		d := eventlog.Describe(0, e)
		if e.Index == 7 && e.Type == tcg.EFIVariableDriverConfig && strings.HasPrefix(d.Name, "Secure Boot state") {
			return d.Detail == "value 1", true
		}
	}
	return false, false
}

// Extend is the TPM's operation on a SHA-256 PCR.
func Extend(value, digest []byte) []byte {
	h := sha256.New()
	h.Write(value)
	h.Write(digest)
	return h.Sum(nil)
}

func (l *EventLog) label(i int) string {
	e := eventlog.Describe(i+1, l.events[i])
	return fmt.Sprintf("event #%d (pcr %d, %s, %s)", e.Seq, l.events[i].Index, e.Type, e.Name)
}

// explain attaches to each covered value the events that replay to it, or why
// there are none. A log that explains nothing changes no value, and what must be
// explained is the policy's to say.
func explain(values map[uint32][]byte, log, user []byte) (map[string]attestation.Measurement, error) {
	out := make(map[string]attestation.Measurement, len(values))
	for pcr, v := range values {
		out[register(pcr)] = attestation.Measurement{Value: v}
	}
	if len(log) == 0 {
		return out, nil
	}
	parsed, err := ParseEventLog(log)
	if errors.Is(err, ErrEventLogTooLarge) {
		return nil, err
	}
	if err == nil {
		err = parsed.AddUserspace(user)
	}
	for pcr, v := range values {
		m := attestation.Measurement{Value: v}
		why := err
		if why == nil {
			m.Events, why = parsed.Explain(pcr, v)
		}
		if why != nil {
			m.Unexplained = reason(why)
		}
		out[register(pcr)] = m
	}
	return out, nil
}

// reason is an error of a log without the words that evidence is refused for it.
func reason(err error) string { return strings.TrimPrefix(err.Error(), ErrEventLog.Error()+": ") }

// logFacts say of a log whether there is one, and whether it can be read.
func logFacts(log []byte, set map[string]any) {
	facts.EventLog.Put(set, len(log) > 0)
	if len(log) > 0 {
		if _, err := ParseEventLog(log); err != nil {
			facts.EventLog.Put(set, false)
			facts.EventLogError.Put(set, reason(err))
		}
	}
}

func unextended(value []byte) bool { return len(bytes.Trim(value, "\x00")) == 0 }

// words are what systemd is known to measure into a PCR behind the firmware's log
// where it left no log of its own, in the ways in which a boot may have got on.
// Sources: systemd-pcrphase.service(8) for the phases in PCR 11; the units
// systemd-pcrosseparator.service, since systemd 261, and systemd-pcrnvdone.service,
// since 259.
func words(pcr uint32) [][]string {
	const os, nv = OSSeparator, nvSeparator
	switch {
	case pcr == PhasePCR:
		var out [][]string
		for _, p := range phases {
			// Of the separator, which the unit has PCR 9 for, no place in PCR 11 is
			// fixed: at the start of the initrd or behind its first phase.
			out = append(out, p, append([]string{nv}, p...), append([]string{p[0], nv}, p[1:]...))
		}
		return append(out, []string{nv})
	case pcr == 9:
		return [][]string{{os}, {os, nv}, {nv}}
	case OSSeparated(pcr):
		return [][]string{{os}}
	}
	return nil
}

// OSSeparator is what the initrd of systemd 261 and later extends into the
// registers that [OSSeparated] names.
const OSSeparator = "os-separator"

// nvSeparator ends the registers that systemd keeps in the TPM's NV memory.
const nvSeparator = "nvpcr-separator"

// OSSeparated reports whether systemd separates this register.
func OSSeparated(pcr uint32) bool {
	return pcr <= 7 || pcr == 9 || pcr >= 12 && pcr <= 14
}

// PhasePCR is the register into which systemd measures a unified kernel image and
// then the boot phases, see systemd-stub(7) and systemd-pcrphase.service(8).
const PhasePCR = 11

var phases = [][]string{
	{"enter-initrd"},
	{"enter-initrd", "leave-initrd"},
	{"enter-initrd", "leave-initrd", "sysinit"},
	{"enter-initrd", "leave-initrd", "sysinit", "ready"},
	{"sysinit"},
	{"sysinit", "ready"},
}

// userspace finds what leads from state to value.
func (l *EventLog) userspace(pcr uint32, state, value []byte) ([]attestation.Event, bool) {
	var tail []attestation.Event
	s := state
	for _, u := range l.user {
		if u.pcr != pcr {
			continue
		}
		s = Extend(s, u.digest)
		tail = append(tail, u.event())
		// What was measured between the quote and the reading of the log is behind.
		if bytes.Equal(s, value) {
			return tail, true
		}
	}
	for _, list := range words(pcr) {
		s, tail := state, []attestation.Event(nil)
		for _, w := range list {
			sum := sha256.Sum256([]byte(w))
			s = Extend(s, sum[:])
			tail = append(tail, WordEvent(w))
		}
		if bytes.Equal(s, value) {
			return tail, true
		}
	}
	return nil, false
}

// WordEvent is the event of one word that systemd measures.
func WordEvent(word string) attestation.Event {
	sum := sha256.Sum256([]byte(word))
	name := "boot phase " + word
	if word == OSSeparator || word == nvSeparator {
		name = "systemd's separator " + word
	}
	return attestation.Event{Type: "EV_IPL", Name: name, Digest: hexOf(sum[:])}
}
