package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// ErrMissingTool says that a program or file which the bed needs is not
// installed on this machine. The remedy is always `make deps`.
var ErrMissingTool = errors.New("missing tool")

// required lists every program that some part of the bed runs.
var required = []string{
	"apt-cache", "apt-get", "busybox", "debugfs", "depmod", "dpkg", "mcopy",
	"e2fsck", "mke2fs", "mkfs.vfat", "mmd", "mmdebstrap", "modprobe",
	"openssl", "qemu-system-x86_64", "sbsign", "socat", "swtpm", "swtpm_setup", "tar", "zstd",
}

// Check reports every program and firmware file that is missing, in one error,
// so that a test fails at once and with the remedy, not halfway through a boot.
func Check() error {
	var missing []string
	for _, name := range required {
		if _, err := tool(name); err != nil {
			missing = append(missing, name)
		}
	}
	for _, path := range []string{firmwareCode, firmwareVars, secureCode, secureVars, secureKey, secureCert, StubPath} {
		if _, err := os.Stat(path); err != nil {
			missing = append(missing, path)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	return fmt.Errorf("%w: %s; run: make deps", ErrMissingTool, strings.Join(missing, ", "))
}

// tool finds a program, also in the sbin folders that an ordinary user's PATH
// lacks on Debian.
func tool(name string) (string, error) {
	if path, err := exec.LookPath(name); err == nil {
		return path, nil
	}
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		path := filepath.Join(dir, name)
		if info, err := os.Stat(path); err == nil && info.Mode()&0o111 != 0 {
			return path, nil
		}
	}
	return "", fmt.Errorf("%w: %s; run: make deps", ErrMissingTool, name)
}

// invocation is one run of a tool to its end.
type invocation struct {
	dir   string // working directory; empty: the caller's
	stdin []byte
	env   []string // beside this process's own
}

// run runs a tool and returns what it wrote to stdout. The error of a tool that
// fails carries the end of what it wrote, since that is where it says why.
func (inv invocation) run(ctx context.Context, name string, args ...string) ([]byte, error) {
	path, err := tool(name)
	if err != nil {
		return nil, err
	}
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Dir = inv.dir
	cmd.Env = append(append(os.Environ(), "LC_ALL=C"), inv.env...)
	if inv.stdin != nil {
		cmd.Stdin = bytes.NewReader(inv.stdin)
	}
	cmd.Stderr = &stderr
	cmd.Stdout = &stdout
	// No thread to bind it to, as startProcess does: a tool ends soon by itself.
	cmd.WaitDelay = killDelay
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, fmt.Errorf("%s: %w: %s", name, err, tail(append(stdout.Bytes(), stderr.Bytes()...), 800))
	}
	return stdout.Bytes(), nil
}

// run is invocation.run without a directory, extra environment or input.
func run(ctx context.Context, name string, args ...string) ([]byte, error) {
	return invocation{}.run(ctx, name, args...)
}

// killDelay is what a child gets between the polite signal and the other one.
const killDelay = 5 * time.Second

// ownChild makes a child process end with this one: by signal when its context
// ends, and by the kernel when this process dies without having run its
// clean-up, as a test does that the go tool's own timeout kills.
func ownChild(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = killDelay
}

// tail returns the last n bytes of text, trimmed.
func tail(text []byte, n int) string {
	text = bytes.TrimSpace(text)
	if len(text) > n {
		return "…" + string(text[len(text)-n:])
	}
	return string(text)
}
