// Package uml runs a program inside a real Linux kernel: user-mode-linux, a
// kernel that is an ordinary process. Tests use it for what needs device-mapper,
// dm-crypt and the kernel's keyrings, which the machine that they run on may not
// have or not offer.
//
// The guest's root is the host's own / over hostfs, read-only, so that programs
// and libraries are there as they are; /run is a tmpfs and TMPDIR lies in it.
// There is no network unless one is asked for. A guest boots in about two seconds, and is killed with
// its whole process group when its context ends.
package uml

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// ErrMissing says that this machine has no user-mode-linux.
var ErrMissing = errors.New("user-mode-linux is not installed: run `make deps`, or install the Debian packages user-mode-linux and kmod")

//go:embed init.sh
var initScript string

// Guest is one boot.
type Guest struct {
	Program string    // absolute path of what to run; its directory is the guest's working directory
	Args    []string  // its arguments
	Env     []string  // additions to its environment, as NAME=value
	Memory  int       // in MiB; 0 means 512
	Tap     string    // name of a TAP device, which the guest has as vec0; "" means no network
	Tee     io.Writer // is shown what the guest prints while it runs; may be nil
}

// Result is what came of it.
type Result struct {
	Output   string        // what the program printed, both streams
	ExitCode int           // its exit code
	Elapsed  time.Duration // boot and power-off included
}

// Run boots a guest, runs its program and powers off. An error means that the
// program did not run to its end; its exit code is no error.
func Run(ctx context.Context, g Guest) (Result, error) {
	kernel, err := exec.LookPath("linux.uml")
	if err != nil {
		return Result{}, ErrMissing
	}
	if _, err := os.Stat(modules); err != nil {
		return Result{}, fmt.Errorf("%w (%w)", ErrMissing, err)
	}
	dir, err := os.MkdirTemp("", "uml-")
	if err != nil {
		return Result{}, err
	}
	defer os.RemoveAll(dir)
	script := filepath.Join(dir, "init")
	if err := os.WriteFile(script, []byte(g.script()), 0o700); err != nil {
		return Result{}, err
	}

	memory := g.Memory
	if memory == 0 {
		memory = 512
	}
	args := []string{fmt.Sprintf("mem=%dM", memory),
		"root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro", "quiet",
		"con0=null,fd:1", "con=null", "ssl=null", "uml_dir=" + dir, "init=" + script}
	if g.Tap != "" {
		args = append(args, "vec0:transport=tap,ifname="+g.Tap+",depth=64,gro=1")
	}
	cmd := exec.CommandContext(ctx, kernel, args...)
	// The kernel is several processes. A group of their own is what is killed,
	// and nothing else.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 5 * time.Second
	var out bytes.Buffer
	cmd.Stdout = &out
	if g.Tee != nil {
		cmd.Stdout = io.MultiWriter(&out, g.Tee)
	}
	cmd.Stderr = cmd.Stdout

	began := time.Now()
	err = cmd.Run()
	result, ok := parse(out.String())
	result.Elapsed = time.Since(began)
	switch {
	case ok:
		return result, nil
	case ctx.Err() != nil:
		return result, fmt.Errorf("guest did not end: %w; it said:\n%s", context.Cause(ctx), out.String())
	default:
		return result, fmt.Errorf("guest died before its program ended: %w; it said:\n%s", err, out.String())
	}
}

// modules is where Debian keeps the modules of this kernel.
const modules = "/usr/lib/uml/modules"

func (g Guest) script() string {
	var env strings.Builder
	for _, e := range g.Env {
		env.WriteString("export " + quote(e) + "\n")
	}
	command := quote(g.Program)
	for _, a := range g.Args {
		command += " " + quote(a)
	}
	return strings.NewReplacer(
		"@MODULES@", modules,
		"@ENV@", env.String(),
		"@DIR@", quote(filepath.Dir(g.Program)),
		"@COMMAND@", command,
	).Replace(initScript)
}

// quote makes one word of s for a POSIX shell.
func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

var frame = regexp.MustCompile(`(?s)=== guest begins ===\n(.*)=== guest ends: (\d+) ===\n`)

// parse cuts the program's output out of the console's.
func parse(console string) (Result, bool) {
	console = strings.ReplaceAll(console, "\r\n", "\n")
	m := frame.FindStringSubmatch(console)
	if m == nil {
		return Result{Output: console}, false
	}
	code, err := strconv.Atoi(m[2])
	return Result{Output: m[1], ExitCode: code}, err == nil
}
