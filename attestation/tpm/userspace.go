package tpm

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/eventlog"
)

// DefaultUserspaceLog is where systemd logs what it measures itself, since
// version 252, see systemd-pcrphase.service(8).
const DefaultUserspaceLog = "/run/log/systemd/tpm2-measure.log"

// MaxUserspaceLog is the most bytes of systemd's own log that are sent or read. A
// boot has some ten records of 300 bytes.
const MaxUserspaceLog = 64 << 10

// maxUserEvents bounds the records of that log.
const maxUserEvents = 1024

// recordStart stands before each record of an RFC 7464 sequence.
const recordStart = 0x1e

// userEvent is one measurement of systemd's into a PCR.
type userEvent struct {
	pcr    uint32
	digest []byte
	kind   string // "phase", "os-separator", "machine-id", …
	text   string
}

func (u userEvent) event() attestation.Event {
	sum := sha256.Sum256([]byte(u.text))
	known := u.kind == "phase" || u.text == OSSeparator || u.text == nvSeparator
	if known && bytes.Equal(sum[:], u.digest) {
		return WordEvent(u.text) // as the words are called that no log has
	}
	name := "systemd: " + u.kind
	if u.kind == "" {
		name = "systemd's measurement"
	}
	return attestation.Event{Type: "systemd", Name: name, Digest: hexOf(u.digest), Detail: u.text}
}

// AddUserspace adds systemd's own log of what it measures, an RFC 7464 sequence of
// records in the form of the TCG's canonical event log. An empty log adds nothing.
// Measurements into registers that are no PCRs, and into other banks, are left out.
func (l *EventLog) AddUserspace(log []byte) error {
	if len(log) > MaxUserspaceLog {
		return fmt.Errorf("%w: systemd's own: %d bytes, at most %d", ErrEventLogTooLarge, len(log), MaxUserspaceLog)
	}
	for n, record := range bytes.Split(log, []byte{recordStart}) {
		if record = bytes.TrimSpace(record); len(record) == 0 {
			continue
		}
		if n > maxUserEvents {
			return fmt.Errorf("%w: systemd's own has more than %d records", ErrEventLog, maxUserEvents)
		}
		u, ok, err := parseUserEvent(record)
		if err != nil {
			return fmt.Errorf("%w: systemd's own, record %d: %w", ErrEventLog, n, err)
		}
		if ok {
			l.user = append(l.user, u)
		}
	}
	return nil
}

func parseUserEvent(record []byte) (userEvent, bool, error) {
	var r struct {
		PCR     *uint32 `json:"pcr"`
		Digests []struct {
			HashAlg string `json:"hashAlg"`
			Digest  string `json:"digest"`
		} `json:"digests"`
		Content struct {
			EventType string `json:"eventType"`
			String    string `json:"string"`
		} `json:"content"`
	}
	if err := json.Unmarshal(record, &r); err != nil {
		return userEvent{}, false, errors.New("not JSON of a measurement")
	}
	if r.PCR == nil {
		return userEvent{}, false, nil // of an NV index
	}
	if *r.PCR > 23 {
		return userEvent{}, false, fmt.Errorf("register %d", *r.PCR)
	}
	for _, d := range r.Digests {
		if d.HashAlg != "sha256" {
			continue
		}
		digest, err := hex.DecodeString(d.Digest)
		if err != nil || len(digest) != sha256.Size {
			return userEvent{}, false, errors.New("a SHA-256 digest of another length")
		}
		return userEvent{pcr: *r.PCR, digest: digest, kind: eventlog.Text([]byte(r.Content.EventType)), text: eventlog.Text([]byte(r.Content.String))}, true, nil
	}
	return userEvent{}, false, nil
}

// readUserspaceLog returns as many records as may be sent, from the start of the
// boot, or nil for a log that is not there.
func readUserspaceLog(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, os.ErrPermission) {
			return nil, nil // it only explains
		}
		return nil, fmt.Errorf("systemd's own log: %w", err)
	}
	defer f.Close()
	log, err := io.ReadAll(io.LimitReader(f, MaxUserspaceLog+1))
	if err != nil {
		return nil, fmt.Errorf("systemd's own log: %w", err)
	}
	if len(log) > MaxUserspaceLog {
		log = log[:bytes.LastIndexByte(log[:MaxUserspaceLog], recordStart)+1]
	}
	return log, nil
}
