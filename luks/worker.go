package luks

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/keyagent/keyagent/internal/secret"
)

// A disk that never answers must hold up nothing but the call that asked it. Each
// open device has a worker, a thread of its own that does everything that may wait
// for the device. Its caller waits for the worker as long as its patience and its
// context allow, and then leaves it behind. The worker closes the device when the
// system call returns at last. Reads go through the page cache, because such a wait
// ends with the process: an agent that is told to stop, stops.

// defaultPatience is how long a device may take for one read, write or flush.
const defaultPatience = 30 * time.Second

type patienceKey struct{}

// WithPatience returns a context under which the functions of this package wait at
// most d for each answer of a device before they give [ErrDeviceHung]. The default
// is 30 seconds.
func WithPatience(ctx context.Context, d time.Duration) context.Context {
	return context.WithValue(ctx, patienceKey{}, d)
}

func patience(ctx context.Context) time.Duration {
	if d, ok := ctx.Value(patienceKey{}).(time.Duration); ok && d > 0 {
		return d
	}
	return defaultPatience
}

// worker does the work of one device, one job at a time.
type worker struct {
	ctx    context.Context // of the one call that the device was opened for
	what   string          // the device, for errors
	dev    DevNum          // of a block device
	jobs   chan func()
	ended  chan struct{}
	lost   error    // set when a job was left behind; used by the caller alone
	held   bool     // by another process as well
	device *os.File // set when it is open; used by the caller alone
}

// newWorker starts a worker. end runs on its thread when everything is done.
func newWorker(ctx context.Context, what string, dev DevNum, end func()) *worker {
	w := &worker{ctx: ctx, what: what, dev: dev, jobs: make(chan func()), ended: make(chan struct{})}
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer deafen()()
		defer close(w.ended)
		for job := range w.jobs {
			job()
		}
		end()
	}()
	return w
}

// deafen keeps signals away from the calling thread, and returns what undoes that. The
// kernel gives a signal for the process to one thread of its choice, the first one by
// preference. If that one waits for a disk, nobody hears of SIGTERM.
func deafen() (undo func()) {
	secret.ForgetThread() // now, since it will hear of no other occasion
	var all, before unix.Sigset_t
	for i := range all.Val {
		all.Val[i] = ^all.Val[i]
	}
	for _, fault := range []unix.Signal{unix.SIGSEGV, unix.SIGBUS, unix.SIGFPE, unix.SIGILL, unix.SIGTRAP, unix.SIGABRT} {
		all.Val[0] &^= 1 << (fault - 1) // the thread's own
	}
	if err := unix.PthreadSigmask(unix.SIG_BLOCK, &all, &before); err != nil {
		return func() {}
	}
	return func() { _ = unix.PthreadSigmask(unix.SIG_SETMASK, &before, nil) }
}

// do runs f on the worker's thread. f must not write to anything that its caller
// reads if do fails: it may still be running.
func (w *worker) do(f func() error) error {
	if w == nil {
		return f() // a test's disk in memory
	}
	if w.lost != nil {
		return w.lost
	}
	done := make(chan error, 1)
	w.jobs <- func() { done <- f() }
	limit := patience(w.ctx)
	slow := time.NewTimer(min(limit, time.Second))
	defer slow.Stop()
	select {
	case err := <-done:
		return err
	case <-slow.C:
		w.hold()
	case <-w.ctx.Done():
	}
	timer := time.NewTimer(limit - min(limit, time.Second))
	defer timer.Stop()
	select {
	case err := <-done:
		return err
	case <-timer.C:
		w.lost = fmt.Errorf("%w: %s said nothing for %v", ErrDeviceHung, w.what, limit)
	case <-w.ctx.Done():
		w.lost = w.ctx.Err()
	}
	w.hold()
	hung.add(w)
	close(w.jobs)
	return w.lost
}

// hold has another process keep the device open, too, until the worker has closed it.
// The kernel lets the last process that closes a device wait for every read that was
// begun: that is to be one that nobody waits for, and not an agent that is told to
// stop. It is a program that ends with its input.
func (w *worker) hold() {
	if w.held || w.device == nil {
		return
	}
	w.held = true
	cmd := exec.Command("cat")
	cmd.ExtraFiles = []*os.File{w.device}
	cmd.Dir, cmd.Env = "/", []string{}
	input, err := cmd.StdinPipe()
	if err != nil || cmd.Start() != nil {
		return // then this process may have to wait, as LIMITATIONS.md says
	}
	go func() {
		<-w.ended
		_ = input.Close()
		_ = cmd.Wait()
	}()
}

// close ends the worker. A device that hangs is closed when it answers.
func (w *worker) close() {
	if w == nil || w.lost != nil {
		return
	}
	w.lost = os.ErrClosed
	close(w.jobs)
	select {
	case <-w.ended:
	case <-time.After(patience(w.ctx)): // closing writes back what others left in the cache
		hung.add(w)
	}
}

// hungDevices knows the devices that still owe an answer. They are not asked again
// before they have given it: each new question would cost another thread.
type hungDevices struct {
	mu   sync.Mutex
	owed map[DevNum]chan struct{}
}

var hung = hungDevices{owed: map[DevNum]chan struct{}{}}

func (h *hungDevices) add(w *worker) {
	if w.dev == (DevNum{}) {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.owed[w.dev] = w.ended
	go func() {
		<-w.ended
		h.mu.Lock()
		defer h.mu.Unlock()
		if h.owed[w.dev] == w.ended {
			delete(h.owed, w.dev)
		}
	}()
}

// check waits a moment for a device that owes an answer: a call that was cancelled
// leaves one behind that comes at once.
func (h *hungDevices) check(ctx context.Context, dev DevNum, path string) error {
	h.mu.Lock()
	ended, owes := h.owed[dev]
	h.mu.Unlock()
	if !owes {
		return nil
	}
	timer := time.NewTimer(min(time.Second, patience(ctx)))
	defer timer.Stop()
	select {
	case <-ended:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return fmt.Errorf("%w: %s still owes the answer to an earlier call", ErrDeviceHung, path)
	}
}

// blockNumber returns the device number that path leads to, without asking the
// device; zero if it is no block device.
func blockNumber(path string) DevNum {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return DevNum{}
	}
	return DevNum{unix.Major(st.Rdev), unix.Minor(st.Rdev)}
}

// kernelCall runs f, which may wait in the kernel, on a thread of its own. If the
// caller has left by the time that f succeeds, undo takes back what f did.
func kernelCall(ctx context.Context, what string, f func() error, undo func()) error {
	var mu sync.Mutex
	left := false
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: keyrings of the thread end with it
		deafen()
		err := f()
		mu.Lock()
		defer mu.Unlock()
		if left {
			if err == nil && undo != nil {
				undo()
			}
			return
		}
		done <- err
	}()
	limit := patience(ctx)
	timer := time.NewTimer(limit)
	defer timer.Stop()
	var err error
	select {
	case err := <-done:
		return err
	case <-timer.C:
		err = fmt.Errorf("%w: %s took more than %v", ErrDeviceHung, what, limit)
	case <-ctx.Done():
		err = ctx.Err()
	}
	mu.Lock()
	defer mu.Unlock()
	select {
	case err := <-done: // it was a close race, and f won
		return err
	default:
		left = true
		return err
	}
}
