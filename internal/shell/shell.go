// Package shell runs commands that an operator configured: by /bin/sh, with a bound
// on their time, and with an end to everything that they started.
package shell

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os/exec"
	"sync"
	"syscall"
	"time"
)

// maxLogged bounds what of a command's standard error is logged, in lines.
const maxLogged = 100

// ErrDeadline: the command did not end within its time, and was killed.
var ErrDeadline = errors.New("it took too long and was killed")

// Command is what to run.
type Command struct {
	Name     string        // in the log
	Text     string        // for /bin/sh -c
	Stdin    io.Reader     // default none
	Deadline time.Duration // Required
	// Stdout reads the standard output to its end. An error of it ends the command,
	// so that one that prints without end is not waited for.
	Stdout func(io.Reader) error
	Log    *slog.Logger // gets the standard error
}

// Run runs a command. Its error is that of ctx, [ErrDeadline], that of Stdout, or how
// the command ended.
func Run(ctx context.Context, c Command) error {
	asked := ctx
	ctx, cancel := context.WithTimeout(ctx, c.Deadline)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/bin/sh", "-c", c.Text)
	// A group of its own: what the command started goes with it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second
	cmd.Stdin = c.Stdin
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	stderr, err := cmd.StderrPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	// A child that left the group keeps the pipes open: they are not waited for
	// beyond the deadline.
	stop := context.AfterFunc(ctx, func() { _ = stdout.Close(); _ = stderr.Close() })
	defer stop()
	var logged sync.WaitGroup
	logged.Go(func() { c.logLines(stderr) })
	readErr := c.Stdout(stdout)
	if readErr != nil {
		_ = cmd.Cancel()
	}
	logged.Wait()
	waitErr := cmd.Wait()
	switch {
	case asked.Err() != nil:
		return asked.Err()
	case ctx.Err() != nil:
		return fmt.Errorf("%w (deadline %s)", ErrDeadline, c.Deadline)
	case readErr != nil:
		return fmt.Errorf("its output: %w", readErr)
	case waitErr != nil:
		return fmt.Errorf("%w (hint: what it wrote to standard error is in the log)", waitErr)
	}
	return nil
}

func (c *Command) logLines(r io.Reader) {
	scan := bufio.NewScanner(r)
	for n := 0; scan.Scan(); n++ {
		if n < maxLogged {
			c.Log.Warn(c.Name, "stderr", scan.Text())
		}
	}
	_, _ = io.Copy(io.Discard, r)
}
