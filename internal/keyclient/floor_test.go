package keyclient

import (
	"runtime/debug"
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
