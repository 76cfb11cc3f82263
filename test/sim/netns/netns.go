// Package netns gives a test a network of its own, of which the machine's others see
// nothing and that leads nowhere: for programs that want certain addresses, and for
// guests with a network card.
package netns

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"
)

const inside = "KEYAGENT_TEST_NETNS"

// Inside says whether this process is one that Enter started.
func Inside() bool { return os.Getenv(inside) != "" }

// Enter runs the test that calls it a second time, in a process with a network of its
// own and additions to its environment, as NAME=value; the test fails if that fails.
// What needs the machine's network comes before.
func Enter(t *testing.T, env ...string) {
	t.Helper()
	if Inside() || strings.Contains(t.Name(), "/") {
		t.Fatal("only a test that is no part of another enters a network, once")
	}
	args := []string{"-test.run", "^" + t.Name() + "$", "-test.count", "1"}
	if testing.Verbose() {
		args = append(args, "-test.v")
	}
	if deadline, ok := t.Deadline(); ok {
		// It ends first, and says where it was.
		args = append(args, "-test.timeout", max(time.Second, time.Until(deadline)-10*time.Second).String())
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], args...)
	cmd.Env = append(append(os.Environ(), inside+"=1"), env...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	// The kernel ends the process with the thread that started it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := cmd.Run(); err != nil {
		t.Fatalf("in a network of its own: %v (hint: a network namespace needs root)", err)
	}
}

// Tap makes a TAP device, with an address of this side as ADDRESS/BITS, and brings the
// loopback device up. Both end with the network.
func Tap(t testing.TB, name, address string) {
	t.Helper()
	if !Inside() {
		t.Fatal("this is the machine's own network")
	}
	for _, args := range []string{
		"link set lo up",
		fmt.Sprintf("tuntap add dev %s mode tap", name),
		fmt.Sprintf("addr add %s dev %s", address, name),
		fmt.Sprintf("link set %s up", name),
	} {
		if out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput(); err != nil {
			t.Fatalf("ip %s: %v: %s (hint: make deps)", args, err, out)
		}
	}
}
