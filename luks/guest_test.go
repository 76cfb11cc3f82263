//go:build umlguest

package luks

// These tests need a kernel with dm-crypt, and run as root in a guest that is
// thrown away: test/uml builds them and boots it.

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/keyagent/keyagent/internal/secret"
)

// deviceSize leaves 4 MiB for data: every byte is hashed twice for each attack.
const deviceSize = 20 << 20

// volume is a formatted loop device.
type volume struct {
	device string
	id     Identity
	dek    *secret.Bytes
	mac    MAC
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
	mac, err := Format(context.Background(), v.device, id, dek, FormatOptions{})
	must(t, err)
	v.mac = mac
	return v
}

func (v volume) open(name string) (Mapping, error) {
	return Open(context.Background(), v.device, name, v.id, v.mac, v.dek, OpenOptions{})
}

func (v volume) mustOpen(t testing.TB, name string) Mapping {
	t.Helper()
	m, err := v.open(name)
	must(t, err)
	t.Cleanup(func() {
		if _, err := Status(context.Background(), name); err == nil {
			must(t, Close(context.Background(), name))
		}
	})
	return m
}

// guarded reads the header back from the device.
func (v volume) header(t testing.TB) []byte {
	t.Helper()
	d, err := openShared(v.device)
	must(t, err)
	defer d.Close()
	raw, err := d.readGuarded(context.Background())
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
