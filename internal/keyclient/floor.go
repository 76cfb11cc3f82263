package keyclient

import (
	"runtime/debug"
	"sync"
	"time"
)

// floor is the earliest that it can be: a machine's clock is its host's, which could
// set it back until a certificate that has ended, and whose key was stolen, is valid
// again. It is never before this program was written, nor before anything that a
// trusted authority signed was valid; it goes on with the time since boot, which
// nobody sets. It bounds certificates only.
type floor struct {
	wall func() time.Time
	boot func() time.Duration

	mu    sync.Mutex
	at    time.Time
	since time.Duration
}

// newFloor begins with the time of this program's source.
func newFloor() *floor {
	f := &floor{wall: time.Now, boot: bootTime}
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
	}
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
