package measured

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/go-tpm/tpm2"
	"golang.org/x/sys/unix"
)

// userspaceLog is systemd's log of what user space measures, ready for one more record.
// Its rules are those of tpm2_userspace_log_open in systemd's tpm2-util.c: who holds
// the file's lock writes, and the sticky bit is set meanwhile. A file that has it and
// no lock was left half-written.
type userspaceLog struct{ f *os.File }

// errTorn is of a log whose last writer did not finish.
var errTorn = errors.New("another program ended while it wrote to it: only a restart of the machine mends that")

// openLog waits for the log. The result is nil on an error.
func openLog(ctx context.Context, path string) (*userspaceLog, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND|unix.O_NOFOLLOW|unix.O_NOCTTY, 0o600)
	if err != nil {
		return nil, err
	}
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			break
		}
		if err == unix.EWOULDBLOCK {
			err = pause(ctx)
		}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("lock: %w", err), f.Close())
		}
	}
	st, err := f.Stat()
	switch {
	case err != nil:
	case !st.Mode().IsRegular():
		err = errors.New("not a regular file")
	case st.Mode()&os.ModeSticky != 0:
		err = errTorn
	default:
		err = f.Chmod(0o600 | os.ModeSticky)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &userspaceLog{f}, nil
}

// add writes the record of an event, and ends the use of the log.
func (l *userspaceLog) add(e Event, banks []tpm2.TPMTHA) error {
	defer l.f.Close()
	record, err := record(e, banks)
	if err != nil {
		return err
	}
	if _, err := l.f.Write(record); err != nil {
		return err
	}
	if err := l.f.Sync(); err != nil {
		return err
	}
	return l.f.Chmod(0o600)
}

// abandon ends the use of the log without a record. A nil log has nothing to end.
func (l *userspaceLog) abandon() error {
	if l == nil {
		return nil
	}
	return errors.Join(l.f.Chmod(0o600), l.f.Close())
}

// record is one of RFC 7464 in systemd's form of the TCG's canonical event log.
func record(e Event, banks []tpm2.TPMTHA) ([]byte, error) {
	type digest struct {
		HashAlg string `json:"hashAlg"`
		Digest  string `json:"digest"`
	}
	type content struct {
		String    string `json:"string"`
		BootID    string `json:"bootId,omitempty"`
		Timestamp int64  `json:"timestamp"` // µs of CLOCK_BOOTTIME
		EventType string `json:"eventType"`
	}
	names := map[tpm2.TPMAlgID]string{tpm2.TPMAlgSHA256: "sha256", tpm2.TPMAlgSHA384: "sha384"}
	digests := make([]digest, len(banks))
	for i, b := range banks {
		digests[i] = digest{names[b.HashAlg], hex.EncodeToString(b.Digest)}
	}
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now); err != nil {
		return nil, err
	}
	boot, _ := os.ReadFile("/proc/sys/kernel/random/boot_id") // explains, and no more
	text, err := json.Marshal(struct {
		PCR         int      `json:"pcr"`
		Digests     []digest `json:"digests"`
		ContentType string   `json:"content_type"`
		Content     content  `json:"content"`
	}{PCR, digests, "systemd", content{
		e.Text, strings.ReplaceAll(strings.TrimSpace(string(boot)), "-", ""), now.Nano() / 1000, "volume-key",
	}})
	const start = "\x1e"
	return []byte(start + string(text) + "\n"), err
}
