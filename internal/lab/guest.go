package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"
)

// ErrDied says that a guest went off before its script had ended: a kernel
// panic, a triple fault, a refused image, or a Close.
var ErrDied = errors.New("guest stopped before its script ended")

// Guest is a machine that was switched on. Its methods are safe for concurrent
// use.
type Guest struct {
	dir       string // private to this boot
	ctx       context.Context
	cancel    context.CancelFunc
	console   *console
	monitor   *monitor
	qemu, tpm *process
	following chan struct{} // closed when the console has been read to its end
	closing   sync.Once

	inputLock sync.Mutex
	input     io.Writer
}

// Started is the moment of power on.
func (g *Guest) Started() time.Time { return g.console.start }

// Wait waits until the guest is off, and returns the exit status of its script.
// The error is [ErrDied] if the script never ended, and the context's cause if
// the guest's time was up or ctx ended.
func (g *Guest) Wait(ctx context.Context) (status int, err error) {
	// The TPM too, or the next boot would find its state locked.
	for _, done := range []<-chan struct{}{g.qemu.done, g.following, g.tpm.done} {
		select {
		case <-done:
		case <-ctx.Done():
			return 0, fmt.Errorf("wait for guest: %w", context.Cause(ctx))
		}
	}
	for _, line := range g.Lines() {
		words, found := directive(line, "EXIT")
		if !found || len(words) != 1 {
			continue
		}
		if status, err = strconv.Atoi(words[0]); err == nil && g.qemu.err == nil {
			return status, nil
		}
	}
	if g.ctx.Err() != nil {
		err = context.Cause(g.ctx)
	} else {
		err = g.qemu.err
	}
	return 0, fmt.Errorf("%w (cause: %w)%s", ErrDied, orUnknown(err), g.lastWords())
}

func orUnknown(err error) error {
	if err == nil {
		return errors.New("it switched itself off")
	}
	return err
}

// lastWords is what helps to see why a guest died.
func (g *Guest) lastWords() string {
	var out strings.Builder
	if text := tail(g.qemu.stderr.Bytes(), 800); text != "" {
		out.WriteString("\nqemu: " + text)
	}
	lines := g.Lines()
	for _, line := range lines[max(len(lines)-15, 0):] {
		fmt.Fprintf(&out, "\n%8.3fs %s", line.At.Seconds(), line.Text)
	}
	return out.String()
}

// Close switches the guest off, if it is still on, and frees everything that
// belongs to this boot. The console stays readable.
func (g *Guest) Close() error {
	g.closing.Do(g.release)
	return nil
}

// Lines returns the console so far.
func (g *Guest) Lines() []Line {
	lines, _, _ := g.console.snapshot(0)
	return lines
}

// WaitLine waits for the first console line that contains text, printed before
// or after this call.
func (g *Guest) WaitLine(ctx context.Context, text string) (Line, error) {
	line, err := g.console.wait(ctx, func(l Line) bool { return strings.Contains(l.Text, text) })
	if err != nil {
		return Line{}, fmt.Errorf("wait for console line %q: %w%s", text, err, g.lastWordsIfOff())
	}
	return line, nil
}

// WaitMark waits for a milestone, reached before or after this call.
func (g *Guest) WaitMark(ctx context.Context, name string) (Mark, error) {
	var mark Mark
	_, err := g.console.wait(ctx, func(l Line) bool {
		m, ok := parseMark(l)
		if !ok || m.Name != name {
			return false
		}
		mark = m
		return true
	})
	if err != nil {
		return Mark{}, fmt.Errorf("wait for milestone %q: %w%s", name, err, g.lastWordsIfOff())
	}
	return mark, nil
}

func (g *Guest) lastWordsIfOff() string {
	select {
	case <-g.qemu.done:
		return g.lastWords()
	default:
		return ""
	}
}

// Marks returns the milestones so far.
func (g *Guest) Marks() []Mark { return parseMarks(g.Lines()) }

// PCRs returns the SHA-256 PCRs that the guest printed (shell function pcrs), in
// lower-case hex.
func (g *Guest) PCRs() map[int]string { return parsePCRs(g.Lines()) }

// Section returns a file that the guest printed (shell function section, or
// eventlog, whose section has that name).
func (g *Guest) Section(name string) ([]byte, error) { return parseSection(g.Lines(), name) }

// Continue lets a guest go on that stands at an await.
func (g *Guest) Continue() error {
	g.inputLock.Lock()
	defer g.inputLock.Unlock()
	if _, err := io.WriteString(g.input, "\n"); err != nil {
		return fmt.Errorf("continue guest: %w", err)
	}
	return nil
}

// DumpMemory writes all memory of the guest, as an ELF core file, to path. The
// guest stands still meanwhile, and goes on afterwards.
func (g *Guest) DumpMemory(ctx context.Context, path string) error {
	path, err := filepath.Abs(path)
	if err != nil {
		return fmt.Errorf("dump memory: %w", err)
	}
	if err := g.monitor.do(ctx, "stop", nil); err != nil {
		return fmt.Errorf("dump memory: %w", err)
	}
	err = g.monitor.do(ctx, "dump-guest-memory", map[string]any{"paging": false, "protocol": "file:" + path})
	if err != nil {
		return fmt.Errorf("dump memory: %w", err)
	}
	if err := g.monitor.do(ctx, "cont", nil); err != nil {
		return fmt.Errorf("dump memory: %w", err)
	}
	return nil
}
