//go:build umlguest

package disks

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/keyagent/keyagent/test/sim/seed"
)

// openFiles is how many descriptors a process has.
func openFiles(t *testing.T, a *agent) int {
	t.Helper()
	return len(must[[]os.DirEntry](t)(os.ReadDir(fmt.Sprintf("/proc/%d/fd", a.cmd.Process.Pid))))
}

// goroutines ends a process with its word on what it was doing.
func goroutines(t *testing.T, a *agent) int {
	t.Helper()
	check(t, a.cmd.Process.Signal(syscall.SIGQUIT))
	<-a.end
	a.end <- nil
	return strings.Count(a.log.String(), "\ngoroutine ")
}

// Volumes go up and down in random order, four at a time, in test-full 256 of them for ten
// minutes: afterwards there is no mapping, loop or mount, and agent and proxy have no more
// files open and no more goroutines than a few.
func TestDiskNothingIsLeftOfManyStages(t *testing.T) {
	const workers = 4
	volumes, enough := 8, func(turn int) bool { return turn >= 4 }
	if rounds(t, 1) > 1 {
		end := time.Now().Add(10 * time.Minute)
		volumes, enough = 256, func(int) bool { return time.Now().After(end) }
	}
	r := seed.Rand(t)
	s := &storage{images: map[string]string{}}
	var handles []string
	for i := range volumes {
		handles = append(handles, fmt.Sprintf("leak-%d", i))
		s.images[handles[i]] = image(t, diskSize)
		removed(t, "v-csi-"+handles[i])
	}
	p := newPlugin(t, first(t), s, "filesystem: ext4")
	fs := func(i int) string {
		if i%8 == 0 {
			return "ext4"
		}
		return ""
	}
	p.up(handles[0], fs(0)) // what comes once is there from here on
	p.down(handles[0])
	before := map[string]int{"the agent's files": openFiles(t, p.agent), "the proxy's files": openFiles(t, p.proxy)}
	var all errgroup.Group
	turns := make([]int, workers)
	for w := range workers {
		mine := rand.New(rand.NewPCG(r.Uint64(), 0))
		all.Go(func() error {
			up := map[int]bool{}
			for done := false; !done || len(up) > 0; turns[w]++ {
				i := mine.IntN(volumes/workers)*workers + w
				if done = done || enough(turns[w]); done {
					for i = range up {
						break
					}
				}
				h := handles[i]
				do := []func() error{func() error { return p.stage(h, fs(i)) }, func() error { return p.publish(h, fs(i)) }}
				switch {
				case up[i]:
					delete(up, i)
					do = []func() error{func() error { return p.unpublish(h) }, func() error { return p.unstage(h) }}
				case done:
					continue
				default:
					up[i] = true
				}
				for _, f := range do {
					if err := f(); err != nil {
						return fmt.Errorf("%s: %w", h, err)
					}
				}
			}
			return nil
		})
	}
	p.says(all.Wait())
	for _, h := range handles {
		p.nothingIsLeft(h)
	}
	t.Logf("turns %v", turns)
	for what, now := range map[string]int{"the agent's files": openFiles(t, p.agent), "the proxy's files": openFiles(t, p.proxy)} {
		if now > before[what]+8 {
			t.Errorf("%s: %d, before %d", what, now, before[what])
		}
	}
	for what, a := range map[string]*agent{"agent": p.agent, "proxy": p.proxy} {
		if n := goroutines(t, a); n == 0 || n > 80 {
			t.Errorf("the %s has %d goroutines:\n%s", what, n, tail(a.log.String()))
		}
	}
	if left, _ := filepath.Glob(filepath.Join(p.kubelet, "raw", "*")); len(left) > 0 {
		t.Errorf("left are %v", left)
	}
}
