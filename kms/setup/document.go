package setup

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os/exec"
	"syscall"
	"time"
)

// documentCommand is a command that makes attestation documents: it reads a
// public key in DER form (PKIX) and prints the document.
type documentCommand string

const (
	documentDeadline = 30 * time.Second
	maxDocument      = 16 << 10
)

// Document runs the command.
func (c documentCommand) Document(ctx context.Context, publicKey []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, documentDeadline)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/bin/sh", "-c", string(c))
	// A group of its own: what the command started goes with it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second
	cmd.Stdin = bytes.NewReader(publicKey)
	var out bytes.Buffer
	cmd.Stdout = &limited{&out, maxDocument}
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("attestation command: %w", err)
	}
	if out.Len() == 0 {
		return nil, fmt.Errorf("attestation command: it printed no document")
	}
	return out.Bytes(), nil
}

// limited refuses what exceeds n bytes, which ends the command.
type limited struct {
	w io.Writer
	n int
}

func (l *limited) Write(p []byte) (int, error) {
	if l.n -= len(p); l.n < 0 {
		return 0, fmt.Errorf("it printed more than %d bytes", maxDocument)
	}
	return l.w.Write(p)
}
