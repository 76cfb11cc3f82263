package agent

import (
	"context"
	"log/slog"
	"slices"
	"testing"
	"time"

	"github.com/keyagent/keyagent/internal/node"
)

// How far a wipe is stands in the status and in the events of an opening, once for each
// percent.
func TestAWipeTellsHowFarItIs(t *testing.T) {
	c := NewVolumes(Options{Log: slog.New(slog.DiscardHandler), StateDir: t.TempDir()})
	e := c.entryOf("data")
	e.spec = node.Volume{ID: "data"}
	var told []string
	progress := c.wiping(WithProgress(context.Background(), func(step string, took time.Duration) {
		if took != 0 {
			t.Errorf("%q took %v, and is not over", step, took)
		}
		told = append(told, step)
	}), e)
	for _, done := range []int64{1 << 20, 2 << 20, 2<<20 + 1, 100 << 20, 200 << 20} {
		progress(done, 200<<20)
	}
	want := []string{"wiping, 0 % of 200 MiB", "wiping, 1 % of 200 MiB", "wiping, 50 % of 200 MiB", "wiping, 100 % of 200 MiB"}
	if !slices.Equal(told, want) {
		t.Errorf("told were %q", told)
	}
	if got := Message(c.view(e)).GetProgress(); got != want[3] {
		t.Errorf("the status says %q", got)
	}
}
