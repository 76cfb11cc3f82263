package bed

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"syscall"
)

// process is a running child. Exactly one goroutine waits for it.
type process struct {
	done   chan struct{} // closed when it has ended and been waited for
	err    error         // valid after done
	stderr *bytes.Buffer // valid after done
}

func startProcess(cmd *exec.Cmd) (*process, error) {
	p := &process{done: make(chan struct{}), stderr: &bytes.Buffer{}}
	cmd.Stderr = p.stderr
	ownChild(cmd)
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		defer close(p.done)
		p.err = cmd.Wait()
	}()
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
