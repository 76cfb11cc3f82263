package luks

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/keyagent/keyagent/internal/secret"
)

var (
	idData = Identity{Volume: "data", UUID: "6f1d3a52-1c6b-4f0c-9a53-0d8a4a6b7c11", Generation: 7}
	idLogs = Identity{Volume: "logs", UUID: "c0a9e1b4-55d2-4e7b-8f0e-2b1f3a4c5d6e", Generation: 7}
)

// key returns a DEK of n bytes that counts up from first.
func key(t testing.TB, first byte, n int) *secret.Bytes {
	t.Helper()
	p := make([]byte, n)
	for i := range p {
		p[i] = first + byte(i)
	}
	dek, err := secret.From(p)
	must(t, err)
	t.Cleanup(func() { dek.Close() })
	return dek
}

func dataKey(t testing.TB) *secret.Bytes { return key(t, 1, 32) }
func logsKey(t testing.TB) *secret.Bytes { return key(t, 101, 32) }

// image makes a sparse file of zeros.
func image(t testing.TB, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.img")
	f, err := os.Create(path)
	must(t, err)
	defer f.Close()
	must(t, f.Truncate(size))
	return path
}

// formatted makes an image that has been formatted.
func formatted(t testing.TB, id Identity, dek *secret.Bytes) (string, MACs) {
	t.Helper()
	path := image(t, 20<<20)
	h, err := formatImage(path, id, dek)
	must(t, err)
	return path, h.MACs()
}

// inTime is a deadline that never passes.
func inTime() error { return nil }

// formatImage does to a regular file what Write does to a device, and refuses a file.
func formatImage(path string, id Identity, dek *secret.Bytes) (*Header, error) {
	h, err := NewHeader(context.Background(), id, Layout{}, dek)
	if err != nil {
		return nil, err
	}
	d, err := openExclusive(context.Background(), path)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return h, d.write(id, dek, h, inTime)
}

// header returns the guarded bytes that NewHeader makes for idData and dataKey. It
// is made once, and each caller gets a copy.
func header(t testing.TB) []byte {
	t.Helper()
	raw, err := goodHeader()
	must(t, err)
	return append([]byte(nil), raw...)
}

var goodHeader = sync.OnceValues(func() ([]byte, error) {
	p := make([]byte, 32)
	for i := range p {
		p[i] = 1 + byte(i)
	}
	dek, err := secret.From(p)
	if err != nil {
		return nil, err
	}
	defer dek.Close()
	h, err := newHeader(context.Background(), idData, Layout{}, dek)
	if err != nil {
		return nil, err
	}
	return h.raw, nil
})

// patch overwrites part of a file or device.
func patch(t testing.TB, path string, p []byte, offset int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	must(t, err)
	_, err = f.WriteAt(p, offset)
	must(t, errors.Join(err, f.Sync(), f.Close()))
}

// digest is the SHA-256 of a file or device, all of it.
func digest(t testing.TB, path string) string {
	t.Helper()
	f, err := os.Open(path)
	must(t, err)
	defer f.Close()
	h := sha256.New()
	_, err = io.Copy(h, f)
	must(t, err)
	return fmt.Sprintf("%x", h.Sum(nil))
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantError(t testing.TB, got, want error) {
	t.Helper()
	if !errors.Is(got, want) {
		t.Fatalf("error is %v, want %v", got, want)
	}
}

func wantRule(t testing.TB, err error, want Rule) {
	t.Helper()
	wantError(t, err, ErrHeaderRefused)
	var refused *HeaderError
	if !errors.As(err, &refused) || refused.Rule != want {
		t.Fatalf("error is %v, want the rule %q", err, want)
	}
}
