package lab

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"
)

// process is a running child. Exactly one goroutine waits for it.
type process struct {
	done   chan struct{} // closed when it has ended and been waited for
	err    error         // valid after done
	stderr *bytes.Buffer // valid after done
}

// startProcess starts a child that is ended by the context of cmd.
func startProcess(cmd *exec.Cmd) (*process, error) {
	p := &process{done: make(chan struct{}), stderr: &bytes.Buffer{}}
	cmd.Stderr = p.stderr
	ownChild(cmd)
	started := make(chan error)
	go func() {
		// The kernel ends the child with the thread that started it, not with the
		// process, so this thread has to stay for as long as the child does.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err != nil {
			return
		}
		defer close(p.done)
		p.err = cmd.Wait()
	}()
	if err := <-started; err != nil {
		return nil, err
	}
	return p, nil
}

// socketPair returns two connected unix stream sockets: one end for a child,
// the other for another child or for this process.
func socketPair() (a, b *os.File, err error) {
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("socket pair: %w", err)
	}
	return os.NewFile(uintptr(fds[0]), "socketpair"), os.NewFile(uintptr(fds[1]), "socketpair"), nil
}
