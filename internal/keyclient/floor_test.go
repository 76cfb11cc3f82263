package keyclient

import (
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"testing"
	"time"
)

// Case 37: a host that sets its guest's clock back does not make a certificate valid
// again.
func TestTimeHasAFloor(t *testing.T) {
	day := func(n int) time.Time { return time.Date(2026, 1, n, 0, 0, 0, 0, time.UTC) }
	wall, boot := day(10), time.Hour
	f := &floor{wall: func() time.Time { return wall }, boot: func() time.Duration { return boot }}
	want := func(when string, at time.Time) {
		t.Helper()
		if got := f.Now(); !got.Equal(at) {
			t.Errorf("%s it is %s, want %s", when, got, at)
		}
	}
	want("with nothing seen", day(10))
	f.saw(day(5))
	want("with a clock that is ahead of the floor", day(10))
	wall = day(1)
	want("with a clock that was set back", day(5))
	boot += 48 * time.Hour
	want("two days later", day(7))
	f.saw(day(6))
	want("after something older", day(7))
	f.saw(day(9))
	want("after something newer", day(9))
	wall = day(20)
	want("with a clock that is right again", day(20))
}

// A process that starts again goes on from the floor of the one before; a machine that
// starts again does not.
func TestTheFloorOutlivesItsProcess(t *testing.T) {
	day := func(n int) time.Time { return time.Date(2100, 1, n, 0, 0, 0, 0, time.UTC) }
	file := filepath.Join(t.TempDir(), "state", "time-floor")
	boot := time.Hour
	start := func() *floor {
		f := &floor{wall: func() time.Time { return day(1) }, boot: func() time.Duration { return boot }, file: file}
		f.recall()
		return f
	}
	first := start()
	first.saw(day(5))
	boot += 24 * time.Hour
	if got := start().Now(); !got.Equal(day(6)) {
		t.Errorf("the next process says %s", got)
	}
	// Of two processes the one that saw less takes nothing back.
	second := start()
	first.saw(day(20))
	second.saw(day(10))
	if got := start().Now(); !got.Equal(day(20)) || !second.Now().Equal(day(20)) {
		t.Errorf("after a process that saw less it is %s", got)
	}
	for name, text := range map[string]string{
		"of an earlier start": `{"at":"2100-01-09T00:00:00Z","boot":99999999999999999}`,
		"without a start":     `{"at":"2100-01-09T00:00:00Z"}`,
		"cut off":             `{"at":"2100-01-09T`,
		"too long":            `{"at":"2100-01-09T00:00:00Z","boot":1}` + strings.Repeat(" ", 256),
	} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := start().Now(); !got.Equal(day(1)) {
			t.Errorf("a file %s: %s", name, got)
		}
	}
	// A folder that cannot be written costs the memory, not the session.
	f := start()
	f.file = filepath.Join(file, "not-a-folder", "x")
	f.saw(day(7))
	if got := f.Now(); !got.Equal(day(7)) {
		t.Error(got)
	}
}

func TestAProgramKnowsWhenItWasWritten(t *testing.T) {
	info := &debug.BuildInfo{Settings: []debug.BuildSetting{{Key: "vcs.time", Value: "2026-03-01T12:00:00Z"}}}
	if got := written(info); got.Year() != 2026 {
		t.Errorf("%s", got)
	}
	info.Settings[0].Value = "soon"
	if got := written(info); !got.IsZero() {
		t.Errorf("%s", got)
	}
}
