package filesystem

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/keyagent/keyagent/internal/failure"
)

// searchPath are the system's folders: the environment's PATH is not trusted.
const searchPath = "/usr/sbin:/usr/bin:/sbin:/bin"

// lookPath finds a tool.
func lookPath(tool, pkg string) (string, error) {
	for _, dir := range filepath.SplitList(searchPath) {
		p := filepath.Join(dir, tool)
		if st, err := os.Stat(p); err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0 {
			return p, nil
		}
	}
	return "", failure.Newf(failure.Configuration, "install the package "+pkg, "%s is not installed", tool)
}

// maxOutput bounds what is kept of a tool's output, in bytes.
const maxOutput = 2048

// run runs a tool to its end and returns its exit code, -1 if it has none, and its
// last words.
func run(ctx context.Context, pkg string, args ...string) (code int, out string, err error) {
	path, err := lookPath(args[0], pkg)
	if err != nil {
		return -1, "", err
	}
	cmd := exec.CommandContext(ctx, path, args[1:]...)
	cmd.Env = []string{"PATH=" + searchPath, "LC_ALL=C"}
	var b bytes.Buffer
	cmd.Stdout, cmd.Stderr = &b, &b
	// It must not go on writing when this process is killed: the next one begins
	// again. The kernel ends it with the thread that started it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	err = cmd.Run()
	text := strings.Join(strings.Fields(b.String()), " ")
	if len(text) > maxOutput {
		text = "…" + text[len(text)-maxOutput:]
	}
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0, text, nil
	case ctx.Err() != nil:
		return -1, text, ctx.Err()
	case errors.As(err, &exit) && exit.Exited():
		return exit.ExitCode(), text, fmt.Errorf("%s: %w", args[0], err)
	}
	return -1, text, fmt.Errorf("%s: %w", args[0], err)
}

// isDamage says that the kernel found a filesystem that it cannot trust.
func isDamage(err error) bool {
	for _, e := range []error{unix.EUCLEAN, unix.EBADMSG, unix.EINVAL, unix.EIO, unix.ENODATA} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}
