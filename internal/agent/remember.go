package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/keyagent/keyagent/internal/config"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/keyclient"
	"github.com/keyagent/keyagent/internal/node"
	"github.com/keyagent/keyagent/luks"
)

// remembered is kept in memory-backed storage while a volume is open: a restarted
// agent knows its own mappings by it without asking the key service, closes volumes
// that are not configured any more, and goes on with their leases.
type remembered struct {
	Spec       node.Volume    `json:"spec"`
	Dynamic    bool           `json:"dynamic,omitempty"`
	UUID       string         `json:"uuid"`
	Generation uint64         `json:"generation"`
	KeyVersion uint32         `json:"key_version,omitempty"`
	MACs       keyclient.MACs `json:"macs"`
	Device     luks.DevNum    `json:"device"` // below the mapping
	// Disk is the kernel's number of the disk that Device is, or is a part of. Zero: not
	// known.
	Disk uint64 `json:"disk,omitempty"`
	// Sequence is the kernel's number of the mapping, which is never used twice: a
	// mapping of the same name that somebody else made has another one.
	Sequence uint64 `json:"sequence,omitempty"`
	// Measured is the Sequence of the mapping that was measured, which is not to be
	// measured again.
	Measured uint64 `json:"measured,omitempty"`
	Mount    string `json:"mount,omitempty"` // canonical
	// Initrd says that it was opened there. The system that runs since then is another
	// one, and proves anew that it may have the volume.
	Initrd bool `json:"initrd,omitempty"`
	// FromInitrd says that the initrd opened it, even if the service has proved its right since:
	// the running system depends on it.
	FromInitrd bool `json:"from_initrd,omitempty"`
	// Withheld says that it was suspended because this machine may not have it, or its lease
	// was over: a good verdict lets it go on.
	Withheld bool `json:"withheld,omitempty"`
	// Failed is why the volume is mapped and no more: a filesystem that needs repair.
	Failed  string `json:"failed,omitempty"`
	LeaseID []byte `json:"lease_id,omitempty"`
	Bound   bool   `json:"bound,omitempty"`
	// LeaseTerm and LeaseUntil are in nanoseconds, the latter by
	// keyclient.Boottime, which goes on over a restart of this process.
	LeaseTerm  time.Duration `json:"lease_term,omitempty"`
	LeaseUntil time.Duration `json:"lease_until,omitempty"`
	// Changing says that the header that is remembered is the next one, and may not be in front
	// yet: the change of a key was cut off if nobody works on it.
	Changing bool `json:"changing,omitempty"`
	// KeptNext is when the leave to keep its key for an outage is asked for again, by
	// keyclient.Boottime.
	KeptNext time.Duration `json:"kept_next,omitempty"`
	// Offline says that it was opened without the key service, which does not know that yet.
	Offline *keptUse `json:"offline,omitempty"`
}

// maxRemembered bounds a file in bytes.
const maxRemembered = 64 << 10

func (c *Volumes) statePath(id string) string { return filepath.Join(c.StateDir, id+".json") }

// remember stores what is known. It is done before a mapping is made, too: a full
// file system must not leave a mapping that nobody knows.
func (c *Volumes) remember(r remembered) error {
	c.keeping.Lock()
	defer c.keeping.Unlock()
	return c.write(r)
}

// rememberKnown stores what is known of a volume at this moment: who has its turn may do
// so while its lease is renewed.
func (c *Volumes) rememberKnown(e *entry) error {
	c.keeping.Lock()
	defer c.keeping.Unlock()
	c.mu.Lock()
	r := e.known
	c.mu.Unlock()
	if there, ok := c.recall(r.Spec.ID); ok && there.is(r) && there.KeyVersion > r.KeyVersion {
		r.KeyVersion, r.MACs = there.KeyVersion, there.MACs // another process changed the key
	}
	return c.write(r)
}

// is reports whether both are of one mapping.
func (r remembered) is(o remembered) bool {
	return r.UUID == o.UUID && r.Sequence == o.Sequence && r.Sequence != 0
}

// refresh takes over what another process of this node did to the volume: it may have changed
// its key, and this one must not put the header from before back. Its caller has the volume's
// turn.
func (c *Volumes) refresh(id string, e *entry) {
	r, ok := c.recall(id)
	c.mu.Lock()
	known := e.known
	c.mu.Unlock()
	if !ok || !r.is(known) || r.MACs == known.MACs {
		return
	}
	h := c.keptHeader(r)
	c.set(func() { e.known.MACs, e.known.KeyVersion, e.header = r.MACs, r.KeyVersion, h })
}

func (c *Volumes) write(r remembered) error {
	data, err := json.Marshal(r)
	if err == nil {
		err = os.MkdirAll(c.StateDir, 0o700)
	}
	if err != nil {
		return err
	}
	if err := replaceFile(c.statePath(r.Spec.ID), data); err != nil {
		return fmt.Errorf("keep the state of the volume: %w", err)
	}
	return nil
}

// recall reads what was remembered. What cannot be read was never there.
func (c *Volumes) recall(id string) (r remembered, ok bool) {
	f, err := os.OpenFile(c.statePath(id), os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return r, false
	}
	defer f.Close()
	data := make([]byte, maxRemembered+1)
	n, _ := f.Read(data)
	if n > maxRemembered || json.Unmarshal(data[:n], &r) != nil {
		return remembered{}, false
	}
	// A file of an older release, which kept UUID and generation alone, says too
	// little: Open proves what is mapped.
	return r, r.Spec.ID == id
}

func (c *Volumes) forget(id string) error {
	for _, path := range []string{c.headerPath(id), c.statePath(id)} {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

func (c *Volumes) headerPath(id string) string { return filepath.Join(c.StateDir, id+".header") }

// keepHeader keeps the header of an open volume, which is not secret: a restarted
// agent goes on watching it, and can put it back. Without it the volume works.
func (c *Volumes) keepHeader(id string, h *luks.Header) {
	if err := c.writeHeader(id, h); err != nil {
		c.Log.Warn("could not keep a header for the next start", "volume", id, "error", err)
	}
}

func (c *Volumes) writeHeader(id string, h *luks.Header) error {
	return replaceFile(c.headerPath(id), h.Bytes())
}

// replaceFile writes a file so that there is the old one or the new one at each moment.
func replaceFile(path string, data []byte) error {
	tmp := path + ".tmp"
	if err := os.WriteFile(tmp, data, 0o600); err != nil {
		return errors.Join(err, os.Remove(tmp))
	}
	return os.Rename(tmp, path)
}

// keptHeader returns it, or nil.
func (c *Volumes) keptHeader(r remembered) *luks.Header {
	raw, err := config.ReadPublicFile(c.headerPath(r.Spec.ID), luks.HeaderSize)
	if err != nil {
		return nil
	}
	h, err := luks.KeptHeader(raw, r.UUID, luksMACs(r.MACs))
	if err != nil {
		c.Log.Warn("a header that was kept cannot be used", "volume", r.Spec.ID, "error", err)
		return nil
	}
	return h
}

// remembers returns the IDs of all volumes that were left open.
func (c *Volumes) remembers() []string {
	names, _ := filepath.Glob(filepath.Join(c.StateDir, "*.json"))
	for i, n := range names {
		names[i] = strings.TrimSuffix(filepath.Base(n), ".json")
	}
	return names
}

// lockFile takes the volume's turn among processes: keyagent unlock may run beside
// the agent.
func (c *Volumes) lockFile(ctx context.Context, id string) (unlock func(), err error) {
	if err := os.MkdirAll(c.StateDir, 0o700); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(c.StateDir, id+".lock"), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { _ = f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, errors.Join(err, f.Close())
		}
		if err := pause(ctx, 50*time.Millisecond); err != nil {
			return nil, errors.Join(failure.New(failure.DeviceBusy, err, "another keyagent works on this volume"), f.Close())
		}
	}
}

func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-t.C:
		return nil
	}
}

// sequence is the kernel's number of a block device, 0 if it has none. It counts
// from the start of the machine and is never used twice.
func sequence(n luks.DevNum) uint64 {
	return readSequence(fmt.Sprintf("/sys/dev/block/%d:%d/diskseq", n.Major, n.Minor))
}

func readSequence(path string) uint64 {
	data, err := os.ReadFile(path)
	var seq uint64
	if err == nil {
		_, err = fmt.Sscan(string(data), &seq)
	}
	if err != nil {
		return 0
	}
	return seq
}
