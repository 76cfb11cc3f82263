//go:build umlguest

package luks

// These tests need a kernel with dm-crypt, and run as root in a guest that is
// thrown away: test/suite/luks builds them and boots it.

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/keyagent/keyagent/internal/secret"
)

// deviceSize leaves 4 MiB for data: every byte is hashed twice for each attack.
const deviceSize = 20 << 20

// volume is a formatted loop device.
type volume struct {
	device string
	id     Identity
	dek    *secret.Bytes
	macs   MACs
}

func run(t testing.TB, command string, args ...string) string {
	t.Helper()
	out, err := exec.Command(command, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v: %s", command, strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// blankDevice makes a loop device of zeros.
func blankDevice(t testing.TB, size int64) string {
	t.Helper()
	device := run(t, "losetup", "-f", "--show", image(t, size))
	t.Cleanup(func() { run(t, "losetup", "-d", device) })
	return device
}

func newVolume(t testing.TB, id Identity, dek *secret.Bytes) volume {
	t.Helper()
	v := volume{device: blankDevice(t, deviceSize), id: id, dek: dek}
	h, err := formatDevice(v.device, id, dek)
	must(t, err)
	v.macs = h.MACs()
	return v
}

// formatDevice does what a caller with a pending record does.
func formatDevice(device string, id Identity, dek *secret.Bytes) (*Header, error) {
	h, err := NewHeader(context.Background(), id, Layout{}, dek)
	if err != nil {
		return nil, err
	}
	return h, Write(context.Background(), WriteRequest{device, id, h, DeadlineIn(time.Minute)}, dek)
}

func (v volume) request(name string, opts OpenOptions) OpenRequest {
	return OpenRequest{Device: v.device, Name: name, Identity: v.id, MACs: v.macs, Options: opts}
}

func (v volume) existing(name string) Existing {
	return Existing{Device: v.device, Name: name, Identity: v.id, MACs: v.macs}
}

func (v volume) open(name string) (Mapping, error) { return v.openWith(name, OpenOptions{}) }

func (v volume) openWith(name string, opts OpenOptions) (Mapping, error) {
	m, _, err := Open(context.Background(), v.request(name, opts), v.dek)
	return m, err
}

func (v volume) close(name string) error {
	return Close(context.Background(), CloseRequest{Name: name, UUID: v.id.UUID})
}

func (v volume) mustOpen(t testing.TB, name string) Mapping {
	t.Helper()
	m, err := v.open(name)
	must(t, err)
	t.Cleanup(func() {
		if _, err := Status(context.Background(), name); err == nil {
			must(t, v.close(name))
		}
	})
	return m
}

// guarded reads the header back from the device.
func (v volume) header(t testing.TB) []byte {
	t.Helper()
	d, err := openShared(context.Background(), v.device)
	must(t, err)
	defer d.Close()
	raw, err := d.readGuarded()
	must(t, err)
	return raw
}

func mappingNames(t testing.TB) string { return run(t, "dmsetup", "ls") }

// untouched runs calls and asserts that each fails, that no byte of the device
// has changed and that no mapping has appeared. It returns the last error.
func untouched(t testing.TB, device string, calls ...func() error) (err error) {
	t.Helper()
	before, names := digest(t, device), mappingNames(t)
	for _, call := range calls {
		if err = call(); err == nil {
			t.Fatal("it was accepted")
		}
		t.Log(err)
	}
	if digest(t, device) != before {
		t.Error("the device has changed")
	}
	if now := mappingNames(t); now != names {
		t.Errorf("mappings are %q, were %q", now, names)
	}
	return err
}

func keyFile(t testing.TB, dek *secret.Bytes) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "key")
	must(t, dek.Use(func(p []byte) error { return os.WriteFile(path, p, 0o600) }))
	return path
}
