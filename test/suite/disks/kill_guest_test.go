//go:build umlguest

package disks

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/keyagent/keyagent/test/sim/seed"
)

// changing are the system calls by which a volume, its folders and its mounts change.
const changing = "mount,umount2,move_mount,open_tree,ioctl,pwrite64,fsync,fdatasync,mkdirat,unlinkat,renameat,renameat2,symlinkat,mknodat"

// traced runs a call while strace counts what one of the parts does, and kills that part
// when it comes to the call of the system with the number at, counted from 1. With at 0 it
// lives. The number of calls is returned.
func traced(t *testing.T, victim *exec.Cmd, kill func(), at int, call func() error) (int, error) {
	t.Helper()
	cmd := exec.Command("strace", "-f", "-p", fmt.Sprint(victim.Process.Pid), "-e", "trace="+changing, "-e", "signal=none")
	lines := must[io.ReadCloser](t)(cmd.StderrPipe())
	check(t, cmd.Start())
	attached, done := make(chan struct{}), make(chan int)
	go func() {
		n, once := 0, sync.OnceFunc(func() { close(attached) })
		defer once()
		for s := bufio.NewScanner(lines); s.Scan(); {
			line := s.Text()
			switch {
			case strings.Contains(line, "attached"):
				once()
			case strings.Contains(line, "resumed>") || strings.Contains(line, "strace:") || !strings.Contains(line, "("):
			default:
				if n++; n == at {
					t.Logf("killed at %d: %.100s", n, line)
					kill()
					_ = cmd.Process.Kill()
				}
			}
		}
		done <- n
	}()
	<-attached
	err := call()
	_ = cmd.Process.Kill() // those that live go on; asked nicely, it may wait for those that do not
	n := <-done
	_ = cmd.Wait()
	return n, err
}

// TestKillACSICallIsCutOffAtEachSystemCall: the agent, or the proxy, is killed at one of
// the calls of the system by which a call of kubelet's changes something. The call is
// repeated, and all is as if nothing had been.
func TestKillACSICallIsCutOffAtEachSystemCall(t *testing.T) {
	s := &storage{images: map[string]string{}}
	p := newPlugin(t, first(t), s)
	r := seed.Rand(t)
	again := func(call func() error, err error) {
		t.Helper()
		for tries := 0; err != nil; tries++ {
			if tries == 50 {
				p.says(err)
			}
			time.Sleep(200 * time.Millisecond)
			err = call()
		}
	}
	volumes := 0
	// life cuts one call of a volume's life off, and returns how many calls of the system it has.
	life := func(cut, part, fs string, at int) (n int) {
		volumes++
		handle := fmt.Sprintf("cut%d", volumes)
		s.mu.Lock()
		size := int64(64 * mib)
		if fs == "xfs" {
			size = 400 * mib
		}
		s.images[handle] = image(t, size)
		s.mu.Unlock()
		removed(t, "v-csi-"+handle)
		run := func(name string, call func() error) {
			t.Helper()
			if name != cut {
				p.says(call())
				return
			}
			victim := p.agent
			if part == "proxy" {
				victim = p.proxy
			}
			var err error
			n, err = traced(t, victim.cmd, victim.kill, at, call)
			if at == 0 {
				p.says(err)
				return
			}
			if victim.kill(); part == "proxy" { // it may have had fewer calls this time
				p.startProxy()
			} else {
				p.startAgent()
			}
			again(call, err)
			p.says(call()) // once more, as kubelet does
		}
		stage := func() error { return p.stage(handle, fs) }
		run("first stage", stage)
		p.says(p.publish(handle, fs))
		p.write(handle, fs, "kept")
		p.down(handle)
		run("stage", stage)
		run("publish", func() error { return p.publish(handle, fs) })
		p.holds(handle, fs, "kept")
		run("expand", func() error { return p.expand(handle, fs, size+32*mib) })
		p.holds(handle, fs, "kept")
		run("unpublish", func() error { return p.unpublish(handle) })
		run("unstage", func() error { return p.unstage(handle) })
		p.nothingIsLeft(handle)
		p.up(handle, fs)
		p.holds(handle, fs, "kept")
		p.down(handle)
		check(t, os.Remove(s.image(handle))) // the guest's memory holds it
		return n
	}
	for _, what := range some(t, 2, []string{
		"first stage of agent", "stage of agent", "expand of agent", "unstage of agent",
		"first stage of proxy", "stage of proxy", "publish of proxy", "unpublish of proxy", "unstage of proxy",
	}) {
		call, part, _ := strings.Cut(what, " of ")
		for _, fs := range some(t, 1, []string{"xfs", ""}) { // ext4's protection against two mounts waits for a minute
			n := life(call, part, fs, 0)
			if n == 0 {
				t.Errorf("%s %q: nothing is called", what, fs)
			}
			t.Logf("%s %q: %d calls of the system", what, fs, n)
			for _, at := range r.Perm(n)[:min(n, rounds(t, 1)*2)] {
				life(call, part, fs, at+1)
			}
		}
	}
}
