//go:build goexperiment.runtimesecret && linux

package secret_test

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"runtime"
	"sync/atomic"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/keyagent/keyagent/internal/secret"
)

// The kernel saves the registers of a thread on its signal stack when a signal
// arrives. Package luks found the key of a header's MAC there, after the thread had
// gone deaf, ended, and been forgotten.
func TestForgetThreadOverwritesWhatSignalsLeft(t *testing.T) {
	runtime.LockOSThread() // never unlocked: the thread ends as package luks ends its own
	var tid, in, stop atomic.Int64
	tid.Store(int64(unix.Gettid()))
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for stop.Load() == 0 {
			if in.Load() == 1 {
				_ = unix.Tgkill(unix.Getpid(), int(tid.Load()), unix.SIGURG)
			}
			runtime.Gosched()
		}
	}()
	seed := [2]uint64{rand.Uint64(), rand.Uint64()}
	left := 0
	for try := 0; try < 100 && left == 0; try++ {
		secret.Do(func() {
			in.Store(1)
			work(seed)
			in.Store(0)
		})
		left = onSignalStack(t, product(seed))
	}
	stop.Store(1)
	<-ended
	if left == 0 {
		t.Fatal("no signal left the secret behind, so that this test shows nothing")
	}
	secret.ForgetThread()
	if n := onSignalStack(t, product(seed)); n != 0 {
		t.Errorf("the secret is %d times on the signal stack", n)
	}
}

// product is what work keeps in a register. Nobody else computes it before it is
// looked for.
func product(seed [2]uint64) uint64 { return seed[0]*seed[1] | 1 }

//go:noinline
func work(seed [2]uint64) (sum uint64) {
	p := product(seed)
	for i := range uint64(20_000_000) {
		sum = sum*p ^ i
	}
	return sum
}

// onSignalStack counts a value on the signal stack of the calling thread.
func onSignalStack(t *testing.T, v uint64) int {
	t.Helper()
	var s struct {
		base  unsafe.Pointer
		flags int32
		size  uintptr
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SIGALTSTACK, 0, uintptr(unsafe.Pointer(&s)), 0); errno != 0 {
		t.Fatal(errno)
	}
	return bytes.Count(unsafe.Slice((*byte)(s.base), s.size), binary.LittleEndian.AppendUint64(nil, v))
}
