// Package secret holds key material in memory that the kernel keeps to itself.
//
// A [Bytes] lives in pages outside the Go heap that hold nothing but secrets, so
// that the garbage collector never copies it. The pages come from memfd_secret(2) where the
// kernel offers it: they are then missing from the kernel's direct map, and
// neither ptrace, /proc/PID/mem nor a kernel read primitive sees them. Elsewhere
// they are anonymous pages that are locked (no swap), left out of core dumps and
// wiped in a forked child. [InForce] says which of the two this machine gives.
//
// A Bytes has no printable form: every way to format, log or marshal it gives
// "[secret]" or an error. Its content is reached only inside [Bytes.Use], and it
// is overwritten with zeros by [Bytes.Close].
//
// What this package cannot do: a function that is handed the slice may copy it.
// Callers run such code inside [Do], which erases the registers, the stack and
// the heap allocations of the call when the binary is built with
// GOEXPERIMENT=runtimesecret: registers and stack before Do returns, the heap at
// the next garbage collection, which [Forget] brings about.
package secret

import (
	"crypto/rand"
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"runtime"
	"sync"
)

// ErrClosed is returned by the methods of a Bytes whose content is gone.
var ErrClosed = errors.New("secret is closed")

// ErrSize says that a secret is empty or longer than its reader allows.
var ErrSize = errors.New("secret has a size that is not allowed")

// ErrEmpty says that there was nothing to read.
var ErrEmpty = fmt.Errorf("%w: empty", ErrSize)

// Bytes is a fixed-size secret. It is safe for concurrent use: Close waits for
// every Use that is under way. The zero value is closed.
type Bytes struct {
	mu      sync.RWMutex
	mem     *area
	n       int
	cleanup runtime.Cleanup
}

// New returns n zero bytes, 1 ≤ n ≤ 1 MiB.
func New(n int) (*Bytes, error) {
	if n < 1 || n > 1<<20 {
		return nil, fmt.Errorf("%w: %d bytes", ErrSize, n)
	}
	m, err := newArea(n)
	if err != nil {
		return nil, err
	}
	b := &Bytes{mem: m, n: n}
	// A Bytes that nobody closed is wiped when it becomes unreachable.
	b.cleanup = runtime.AddCleanup(b, func(m *area) { m.destroy() }, m)
	return b, nil
}

// From moves p into a new Bytes: p is overwritten with zeros, also on error.
func From(p []byte) (*Bytes, error) {
	defer Wipe(p)
	b, err := New(len(p))
	if err != nil {
		return nil, err
	}
	copy(b.mem.data, p)
	return b, nil
}

// Random returns n bytes from the system's generator.
func Random(n int) (*Bytes, error) {
	b, err := New(n)
	if err != nil {
		return nil, err
	}
	rand.Read(b.mem.data[:n]) // never fails: crypto/rand crashes the program instead
	return b, nil
}

// Read reads r to its end straight into locked memory. An empty input, or one of
// more than limit bytes, is an error that wraps [ErrSize]; of an empty one it is
// [ErrEmpty].
func Read(r io.Reader, limit int) (*Bytes, error) {
	buf, err := New(limit + 1)
	if err != nil {
		return nil, err
	}
	defer buf.Close()
	n, err := io.ReadFull(r, buf.mem.data[:limit+1])
	switch {
	case err == nil:
		return nil, fmt.Errorf("%w: more than %d bytes", ErrSize, limit)
	case errors.Is(err, io.EOF):
		return nil, ErrEmpty
	case !errors.Is(err, io.ErrUnexpectedEOF):
		return nil, err
	}
	out, err := New(n)
	if err != nil {
		return nil, err
	}
	copy(out.mem.data, buf.mem.data[:n])
	return out, nil
}

// Use calls f with the content and returns what f returns. The slice is valid
// only until f returns; f may write to it and must not keep or grow it.
func (b *Bytes) Use(f func([]byte) error) error {
	b.mu.RLock()
	defer b.mu.RUnlock()
	if b.mem == nil {
		return ErrClosed
	}
	return f(b.mem.data[:b.n:b.n])
}

// Len returns the length in bytes. It stays known after Close.
func (b *Bytes) Len() int { return b.n }

// Clone returns an independent copy.
func (b *Bytes) Clone() (*Bytes, error) {
	var c *Bytes
	err := b.Use(func(p []byte) (err error) {
		if c, err = New(len(p)); err == nil {
			copy(c.mem.data, p)
		}
		return err
	})
	return c, err
}

// Equal compares in constant time. A closed Bytes equals nothing.
func (b *Bytes) Equal(o *Bytes) bool {
	if b == o {
		return b.Use(func([]byte) error { return nil }) == nil
	}
	equal := false
	_ = b.Use(func(p []byte) error {
		return o.Use(func(q []byte) error {
			equal = subtle.ConstantTimeCompare(p, q) == 1
			return nil
		})
	})
	return equal
}

// Close overwrites the content and gives the memory back. It is idempotent, and
// nil-safe so that it can be deferred before the error is looked at.
func (b *Bytes) Close() error {
	if b == nil {
		return nil
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.mem == nil {
		return nil
	}
	b.cleanup.Stop()
	m := b.mem
	b.mem = nil
	return m.destroy()
}

const redacted = "[secret]"

// String never shows the content.
func (b *Bytes) String() string { return redacted }

// GoString never shows the content.
func (b *Bytes) GoString() string { return redacted }

// Format never shows the content, whatever the verb.
func (b *Bytes) Format(s fmt.State, _ rune) { _, _ = io.WriteString(s, redacted) }

// LogValue never shows the content.
func (b *Bytes) LogValue() slog.Value { return slog.StringValue(redacted) }

var errMarshal = errors.New("a secret cannot be marshalled")

// MarshalJSON always fails, so that a secret in a struct is noticed.
func (b *Bytes) MarshalJSON() ([]byte, error) { return nil, errMarshal }

// MarshalText always fails.
func (b *Bytes) MarshalText() ([]byte, error) { return nil, errMarshal }

// MarshalBinary always fails.
func (b *Bytes) MarshalBinary() ([]byte, error) { return nil, errMarshal }

// Wipe overwrites p with zeros.
func Wipe(p []byte) {
	clear(p)
	runtime.KeepAlive(&p) // the write is to memory that others may see: never elided
}
