package tpm

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"strings"

	"github.com/google/go-eventlog/register"
	"github.com/google/go-eventlog/tcg"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/eventlog"
)

// EventLog is a parsed measured-boot log. Nothing in it is proved until
// [EventLog.Explain] replays it to a quoted value.
type EventLog struct {
	events []tcg.Event
}

// maxEvents bounds the work of a replay; firmware writes a few hundred.
const maxEvents = 8192

// ParseEventLog parses a crypto-agile UEFI event log of at most [MaxEventLog]
// bytes with SHA-256 digests.
func ParseEventLog(log []byte) (_ *EventLog, err error) {
	if len(log) > MaxEventLog {
		return nil, fmt.Errorf("%w: %d bytes, at most %d", ErrEventLogTooLarge, len(log), MaxEventLog)
	}
	parsed, err := tcg.ParseEventLog(log, tcg.ParseOpts{AllowPadding: true})
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrEventLog, err)
	}
	l := &EventLog{events: parsed.Events(register.HashSHA256)}
	if len(l.events) > maxEvents {
		return nil, fmt.Errorf("%w: %d events, at most %d", ErrEventLog, len(l.events), maxEvents)
	}
	for i, e := range l.events {
		if e.Type != tcg.NoAction && len(e.Digest) != sha256.Size {
			return nil, fmt.Errorf("%w: %s has no SHA-256 digest", ErrEventLog, l.label(i))
		}
	}
	return l, nil
}

// Explain returns the events of one PCR if they replay to value. A PCR without
// events gives none. Events that lead elsewhere, or whose data is not what
// their digest says, are an error that names them.
//
// Boot phases that systemd measures into PCR 11 after the firmware closed its
// log are tried in the order in which they happen, and added by name.
func (l *EventLog) Explain(pcr uint32, value []byte) ([]attestation.Event, error) {
	state, events, err := l.replay(pcr)
	if err != nil || len(events) == 0 {
		return nil, err
	}
	if bytes.Equal(state, value) {
		return events, nil
	}
	if pcr == phasePCR {
		if phases, ok := matchPhases(state, value); ok {
			return append(events, phases...), nil
		}
	}
	first, last := events[0], events[len(events)-1]
	return nil, fmt.Errorf("%w: pcr %d: its %d events, #%d %s (%s) to #%d %s (%s), replay to %x, the quote says %x",
		ErrEventLog, pcr, len(events), first.Seq, first.Type, first.Name, last.Seq, last.Type, last.Name, state, value)
}

// Replay returns the events of one PCR and the value that they lead to, for
// making reference values from a trusted machine's log.
func (l *EventLog) Replay(pcr uint32) ([]byte, []attestation.Event, error) {
	return l.replay(pcr)
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
		if e.Type == tcg.EFIHCRTMEvent {
			if len(events) > 0 {
				return nil, nil, fmt.Errorf("%w: %s is not the first of its PCR", ErrEventLog, l.label(i))
			}
			state[len(state)-1] = 4
		}
		if eventlog.DigestIsOfData(e.Type) {
			if sum := sha256.Sum256(e.Data); !bytes.Equal(sum[:], e.Digest) {
				return nil, nil, fmt.Errorf("%w: %s: its data has digest %x, it extended %x", ErrEventLog, l.label(i), sum, e.Digest)
			}
		}
		state = Extend(state, e.Digest)
		events = append(events, eventlog.Describe(i+1, e))
	}
	return state, events, nil
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

// The PCR into which systemd measures a unified kernel image and then the boot
// phases, see systemd-stub(7) and systemd-pcrphase.service(8).
const phasePCR = 11

var phases = [][]string{
	{"enter-initrd"},
	{"enter-initrd", "leave-initrd"},
	{"enter-initrd", "leave-initrd", "sysinit"},
	{"enter-initrd", "leave-initrd", "sysinit", "ready"},
	{"sysinit"},
	{"sysinit", "ready"},
}

func matchPhases(state, value []byte) ([]attestation.Event, bool) {
	for _, words := range phases {
		s := state
		var events []attestation.Event
		for _, w := range words {
			e := PhaseEvent(w)
			sum := sha256.Sum256([]byte(w))
			s = Extend(s, sum[:])
			events = append(events, e)
		}
		if bytes.Equal(s, value) {
			return events, true
		}
	}
	return nil, false
}

// PhaseEvent is the event of one systemd boot phase word.
func PhaseEvent(word string) attestation.Event {
	sum := sha256.Sum256([]byte(word))
	return attestation.Event{Type: "EV_IPL", Name: "boot phase " + word, Digest: hexOf(sum[:])}
}
