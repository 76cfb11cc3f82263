package uml_test

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/keyagent/keyagent/test/sim/netns"
	"github.com/keyagent/keyagent/test/sim/uml"
)

// script makes a program of a few lines of shell.
func script(t *testing.T, lines ...string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "program")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+strings.Join(lines, "\n")+"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestAGuestReturnsOutputAndExitCode(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	got, err := uml.Run(ctx, uml.Guest{
		Program: script(t,
			`printf '%s|' "$@" "$WORD"; echo`,
			`pwd; echo error >&2`,
			`touch /root-is-writable 2>/dev/null && echo writable`,
			`exit 42`),
		Args: []string{"two words", "it's", "$HOME", ""},
		Env:  []string{"WORD=x y"},
	})
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(got.Output, "\n")
	want := []string{"two words|it's|$HOME||x y|", "", "error"}
	if got.ExitCode != 42 || len(lines) < 3 || lines[0] != want[0] || lines[2] != want[2] {
		t.Errorf("exit code %d, output %q", got.ExitCode, got.Output)
	}
	if strings.Contains(got.Output, "writable") {
		t.Error("the host's root is writable")
	}
}

func TestAGuestThatDoesNotEndIsKilled(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 25*time.Second)
	defer cancel()
	_, err := uml.Run(ctx, uml.Guest{Program: script(t, "echo began", "exec sleep infinity")})
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "began") {
		t.Errorf("error is %v", err)
	}
}

func TestAMissingKernelIsAnErrorThatSaysWhatToDo(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	_, err := uml.Run(t.Context(), uml.Guest{Program: "/bin/true"})
	if !errors.Is(err, uml.ErrMissing) || !strings.Contains(err.Error(), "make deps") {
		t.Errorf("error is %v", err)
	}
}

func TestAGuestWithANetworkReachesItsHost(t *testing.T) {
	if !netns.Inside() {
		netns.Enter(t)
		return
	}
	netns.Tap(t, "tap0", "10.0.2.2/24")
	l, err := net.Listen("tcp", "10.0.2.2:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		if c, err := l.Accept(); err == nil {
			_, _ = io.WriteString(c, "hello from the host\n")
			c.Close()
		}
	}()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	got, err := uml.Run(ctx, uml.Guest{Tap: "tap0", Program: "/bin/bash", Args: []string{"-c", `set -e
ip link set vec0 up
ip addr add 10.0.2.15/24 dev vec0
exec cat </dev/tcp/${1%:*}/${1#*:}`, "guest", l.Addr().String()}})
	if err != nil || got.ExitCode != 0 || got.Output != "hello from the host\n" {
		t.Errorf("exit code %d, %v: %q", got.ExitCode, err, got.Output)
	}
}
