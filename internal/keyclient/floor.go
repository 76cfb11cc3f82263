package keyclient

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"sync"
	"time"

	"github.com/keyagent/keyagent/internal/config"
)

// floor is the earliest that it can be: a machine's clock is its host's, which could
// set it back until a certificate that has ended, and whose key was stolen, is valid
// again. It is never before this program was written, nor before anything that a
// trusted authority signed was valid; it goes on with the time since boot, which
// nobody sets. It bounds certificates only.
type floor struct {
	wall func() time.Time
	boot func() time.Duration
	file string // keeps it over a restart of this process; may be empty
	log  *slog.Logger

	mu    sync.Mutex
	at    time.Time
	since time.Duration
}

// newFloor begins with the time of this program's source, or what the file keeps.
func newFloor(file string, log *slog.Logger) *floor {
	f := &floor{wall: time.Now, boot: bootTime, file: file, log: log}
	f.recall()
	if info, ok := debug.ReadBuildInfo(); ok {
		f.saw(written(info))
	}
	return f
}

// written is when the source of this program was committed, or zero.
func written(info *debug.BuildInfo) time.Time {
	for _, s := range info.Settings {
		if s.Key == "vcs.time" {
			t, _ := time.Parse(time.RFC3339, s.Value)
			return t
		}
	}
	return time.Time{}
}

// saw raises the floor to t.
func (f *floor) saw(t time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if t.After(f.now()) {
		f.at, f.since = t, f.boot()
		if err := f.remember(); err != nil && f.log != nil {
			f.log.Warn("could not keep the floor under time", "error", err)
		}
	}
}

// kept is the file: a time, and for how long this machine had been up at that time.
type kept struct {
	At   time.Time     `json:"at"`
	Boot time.Duration `json:"boot"` // in nanoseconds
}

// remember keeps the floor for the next process. The lock is held.
func (f *floor) remember() error {
	if f.file == "" || f.at.IsZero() {
		return nil
	}
	// Another process may have seen more.
	if k, ok := f.read(); ok && k.At.Add(f.boot()-k.Boot).After(f.now()) {
		f.at, f.since = k.At, k.Boot
		return nil
	}
	data, err := json.Marshal(kept{f.at.UTC(), f.since})
	if err == nil {
		err = os.MkdirAll(filepath.Dir(f.file), 0o700)
	}
	if err != nil {
		return err
	}
	// Two processes may write at once.
	tmp := fmt.Sprintf("%s.%d.tmp", f.file, os.Getpid())
	if err := os.WriteFile(tmp, data, 0o600); err != nil {
		return errors.Join(err, os.Remove(tmp))
	}
	return os.Rename(tmp, f.file)
}

// recall takes up what a process before this one kept, since this machine's start. A
// file that cannot be read, or is of another start, was never there.
func (f *floor) recall() {
	if k, ok := f.read(); ok {
		f.at, f.since = k.At, k.Boot
	}
}

func (f *floor) read() (k kept, ok bool) {
	if f.file == "" {
		return k, false
	}
	data, err := config.ReadPublicFile(f.file, 256)
	ok = err == nil && json.Unmarshal(data, &k) == nil && k.Boot > 0 && k.Boot <= f.boot()
	return k, ok
}

// now is the floor. The lock is held.
func (f *floor) now() time.Time {
	if f.at.IsZero() {
		return f.at
	}
	return f.at.Add(f.boot() - f.since)
}

// Now is this machine's clock, or the floor if that is later.
func (f *floor) Now() time.Time {
	f.mu.Lock()
	defer f.mu.Unlock()
	now, wall := f.now(), f.wall()
	if now.After(wall) {
		return now
	}
	return wall
}
