package cluster

import (
	"bytes"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Process is a program that a test started, and that ends with it.
type Process struct {
	Log  *Output
	cmd  *exec.Cmd
	done chan struct{}
}

// Output is what a program prints, read while it prints on.
type Output struct {
	mu   sync.Mutex
	text bytes.Buffer
}

// Write implements io.Writer.
func (o *Output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.Write(b)
}

func (o *Output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.String()
}

// Tail is the end of it, enough to see why a program failed.
func (o *Output) Tail() string {
	s := o.String()
	return s[max(0, len(s)-4000):]
}

// Start starts a program in a folder.
func Start(t testing.TB, dir, program string, args ...string) *Process {
	t.Helper()
	p := &Process{cmd: exec.Command(program, args...), Log: &Output{}, done: make(chan struct{})}
	p.cmd.Dir, p.cmd.Stdout, p.cmd.Stderr = dir, p.Log, p.Log
	// A test that the go tool's own timeout kills runs no clean-up.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	go func() {
		// The kernel ends the program with the thread that started it, not with the
		// process, so this thread has to stay for as long as the program does.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := p.cmd.Start()
		started <- err
		if err == nil {
			_ = p.cmd.Wait()
			close(p.done)
		}
	}()
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Kill)
	return p
}

// Stop ends a program as a service manager does.
func (p *Process) Stop(t testing.TB) {
	t.Helper()
	_ = p.cmd.Process.Signal(os.Interrupt)
	select {
	case <-p.done:
	case <-time.After(time.Minute):
		t.Errorf("%s does not stop", p.cmd.Path)
		p.Kill()
	}
}

// Kill ends a program at once.
func (p *Process) Kill() {
	_ = p.cmd.Process.Kill()
	<-p.done
}

// Ended says whether the program is over.
func (p *Process) Ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}
