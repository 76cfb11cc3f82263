//go:build umlguest

package luks

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/keyagent/keyagent/internal/secret"
)

// refusesAttack forges every header of one case, seals it with a fresh MAC, and
// asserts that it is the whitelist that stops it; then that the MAC alone would.
func refusesAttack(t *testing.T, attack int) {
	v := newVolume(t, idData, dataKey(t))
	good := v.header(t)
	for _, h := range hostileHeaders {
		if h.attack != attack {
			continue
		}
		t.Run(h.name, func(t *testing.T) {
			raw := h.forge(t, good)
			patch(t, v.device, raw, 0)
			sealed := v
			sealed.macs = MACs{}
			var err error
			sealed.macs.Header, err = headerMAC(guarded{raw: raw}, v.id, v.dek)
			must(t, err)
			untouched(t, v.device, func() error {
				_, err := sealed.open("victim")
				wantRule(t, err, h.rule)
				return err
			}, func() error {
				_, err := Adopt(context.Background(), v.device, v.id, v.dek)
				wantRule(t, err, h.rule)
				return err
			}, func() error {
				_, err := formatDevice(v.device, v.id, v.dek)
				wantError(t, err, ErrNotBlank)
				return err
			})
			err = authenticate(guarded{raw: raw, uuid: v.id.UUID}, v.id, v.macs.Header, v.dek)
			wantError(t, err, ErrHeaderMAC)
		})
	}
	patch(t, v.device, good, 0)
	v.mustOpen(t, "victim")
}

func TestAttack01NullSegmentCipher(t *testing.T)       { refusesAttack(t, 1) }
func TestAttack02NullKeyslotCipher(t *testing.T)       { refusesAttack(t, 2) }
func TestAttack07RequirementsAndSegments(t *testing.T) { refusesAttack(t, 7) }
func TestAttack08OffsetsAndSizes(t *testing.T)         { refusesAttack(t, 8) }
func TestAttack09CostOfKeyDerivation(t *testing.T)     { refusesAttack(t, 9) }
func TestAttack10AmbiguousHeaders(t *testing.T)        { refusesAttack(t, 10) }

// The forgeries are real: the stock tool opens them. Where a newer one does not,
// that is noted, and the refusals above still stand.
func TestAttack01And02WorkOnTheStockTool(t *testing.T) {
	v := newVolume(t, idData, dataKey(t))
	good := v.header(t)
	right, wrong := keyFile(t, v.dek), keyFile(t, logsKey(t))

	patch(t, v.device, hostileHeaders[0].forge(t, good), 0)
	if out, err := exec.Command("cryptsetup", "open", "--key-file", right, v.device, "stock").CombinedOutput(); err != nil {
		t.Logf("this cryptsetup refuses a null segment cipher: %s", out)
	} else {
		plain := []byte("this text was meant to be encrypted")
		patch(t, "/dev/mapper/stock", plain, 0)
		run(t, "cryptsetup", "close", "stock")
		got := make([]byte, len(plain))
		d, err := openShared(context.Background(), v.device)
		must(t, err)
		must(t, d.read(got, dataOffset))
		must(t, d.Close())
		if !bytes.Equal(got, plain) {
			t.Error("the control is not hostile: the device holds no plaintext")
		}
		t.Log("the stock tool opened a null segment cipher, and plaintext is on the disk")
	}
	for _, h := range hostileHeaders {
		if h.attack != 2 {
			continue
		}
		patch(t, v.device, h.forge(t, good), 0)
		if out, err := exec.Command("cryptsetup", "open", "--test-passphrase", "--key-file", wrong, v.device).CombinedOutput(); err != nil {
			t.Logf("this cryptsetup refuses a null keyslot cipher: %v: %s", err, out)
		} else {
			t.Log("the stock tool accepts any key for a null keyslot cipher")
		}
	}
}

func TestAttack03HeaderSwappedBetweenCheckAndOpen(t *testing.T) {
	v := newVolume(t, idData, dataKey(t))
	good := v.header(t)
	ctx := context.Background()
	d, err := openShared(context.Background(), v.device)
	must(t, err)
	defer d.Close()
	header, err := d.examine(v.id, v.macs, v.dek)
	must(t, err)

	patch(t, v.device, hostileHeaders[0].forge(t, good), 0)
	m, err := d.activate(ctx, OpenRequest{Name: "victim"}, header, v.dek)
	must(t, err)
	defer v.close("victim")
	if table := run(t, "dmsetup", "table", "victim"); !strings.Contains(table, " crypt aes-xts-plain64 :64:logon:") {
		t.Errorf("table is %s", table)
	}
	plain := []byte("this text must be encrypted")
	patch(t, m.Path, plain, 0)
	got := make([]byte, len(plain))
	must(t, d.read(got, dataOffset))
	if bytes.Equal(got, plain) {
		t.Error("plaintext reached the device")
	}
}

func TestAttack04AnotherVolumesHeader(t *testing.T) {
	data, logs := newVolume(t, idData, dataKey(t)), newVolume(t, idLogs, logsKey(t))
	t.Run("swapped disks are a mismatch of volumes", func(t *testing.T) {
		swapped := data
		swapped.device = logs.device
		wantError(t, untouched(t, logs.device, func() error { _, err := swapped.open("victim"); return err }), ErrVolumeMismatch)
	})
	t.Run("another volume's header under this UUID does not match the MAC", func(t *testing.T) {
		f := forgery{t, logs.header(t)}
		binaryField(offUUID, []byte(data.id.UUID)...)(f)
		patch(t, data.device, f.raw, 0)
		wantError(t, untouched(t, data.device, func() error { _, err := data.open("victim"); return err }), ErrHeaderMAC)
	})
}

func TestAttack05OlderHeaderOfTheSameVolume(t *testing.T) {
	v := newVolume(t, idData, dataKey(t))
	old, oldMACs := v.header(t), v.macs
	patch(t, v.device, make([]byte, guardedSize), 0)
	v.id.Generation++
	h, err := formatDevice(v.device, v.id, v.dek)
	must(t, err)
	v.macs = h.MACs()
	patch(t, v.device, old, 0)
	wantError(t, untouched(t, v.device, func() error { _, err := v.open("victim"); return err }), ErrHeaderMAC)
	v.macs = oldMACs // even the old header's own MAC is of the old generation
	wantError(t, untouched(t, v.device, func() error { _, err := v.open("victim"); return err }), ErrHeaderMAC)
}

func TestAttack06WipedHeader(t *testing.T) {
	v := newVolume(t, idData, dataKey(t))
	m := v.mustOpen(t, "victim")
	patch(t, m.Path, []byte("data that must survive"), 0)
	must(t, v.close("victim"))
	patch(t, v.device, make([]byte, guardedSize), 0)
	wantRule(t, untouched(t, v.device, func() error { _, err := v.open("victim"); return err }), RuleMagic)
	wantError(t, untouched(t, v.device, func() error {
		_, err := formatDevice(v.device, v.id, v.dek)
		return err
	}), ErrNotBlank)
}

func TestAttack12ForeignFilesystemUnderTheUUID(t *testing.T) {
	v := volume{device: blankDevice(t, deviceSize), id: idData, dek: dataKey(t), macs: MACs{Header: MAC{1}}}
	run(t, "mkfs.ext4", "-q", "-U", v.id.UUID, "-L", "data", v.device)
	wantRule(t, untouched(t, v.device, func() error { _, err := v.open("victim"); return err }), RuleMagic)
	err := untouched(t, v.device, func() error {
		_, err := formatDevice(v.device, v.id, v.dek)
		return err
	})
	wantError(t, err, ErrNotBlank)
	if !strings.Contains(err.Error(), "ext4") {
		t.Errorf("error does not name the filesystem: %v", err)
	}
}

// mapped makes a device of a device-mapper table.
func mapped(t testing.TB, table string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "table")
	must(t, os.WriteFile(file, []byte(table), 0o600))
	run(t, "dmsetup", "create", "bad", file)
	t.Cleanup(func() { run(t, "dmsetup", "remove", "--retry", "bad") })
	return "/dev/" + run(t, "dmsetup", "info", "-c", "--noheadings", "-o", "blkdevname", "bad")
}

func TestAttack13FailingDisk(t *testing.T) {
	ctx := context.Background()
	v := newVolume(t, idData, dataKey(t))
	sectors := deviceSize / sectorSize
	for _, c := range []struct {
		name  string
		table string
	}{
		{"the first sector cannot be read", fmt.Sprintf("0 8 error\n8 %d linear %s 8\n", sectors-8, v.device)},
		{"the secondary header cannot be read", fmt.Sprintf("0 32 linear %s 0\n32 8 error\n40 %d linear %s 40\n", v.device, sectors-40, v.device)},
		{"the keyslot cannot be read", fmt.Sprintf("0 256 linear %s 0\n256 8 error\n264 %d linear %s 264\n", v.device, sectors-264, v.device)},
	} {
		t.Run(c.name, func(t *testing.T) {
			bad := v
			bad.device = mapped(t, c.table)
			untouched(t, v.device, func() error {
				_, err := bad.open("victim")
				wantError(t, err, ErrIO)
				return err
			}, func() error {
				_, err := Adopt(ctx, bad.device, v.id, v.dek)
				wantError(t, err, ErrIO)
				return err
			})
		})
	}
	t.Run("a blank disk that fails in the middle is not blank", func(t *testing.T) {
		blank := blankDevice(t, deviceSize)
		bad := mapped(t, fmt.Sprintf("0 40000 linear %s 0\n40000 8 error\n40008 %d linear %s 40008\n", blank, sectors-40008, blank))
		for name, f := range map[string]func() error{
			"format": func() error { _, err := formatDevice(bad, v.id, v.dek); return err },
			"blank":  func() error { return CheckBlank(ctx, bad) },
			"probe":  func() error { _, err := Probe(ctx, bad, v.id, v.dek); return err },
		} {
			t.Run(name, func(t *testing.T) { wantError(t, untouched(t, blank, f), ErrIO) })
		}
	})
	t.Run("a disk that ends in the header is incomplete", func(t *testing.T) {
		short := v
		short.device = blankDevice(t, 100<<10)
		patch(t, short.device, v.header(t)[:100<<10], 0)
		wantError(t, untouched(t, short.device, func() error { _, err := short.open("victim"); return err }), ErrShortHeader)
	})
}

func TestAttack14WrongKeys(t *testing.T) {
	ctx := context.Background()
	v := newVolume(t, idData, dataKey(t))
	zero, err := secret.New(32)
	must(t, err)
	defer zero.Close()
	for _, c := range []struct {
		name                string
		dek                 *secret.Bytes
		open, adopt, format error
	}{
		{"another volume's DEK", logsKey(t), ErrHeaderMAC, ErrWrongKey, ErrNotBlank},
		{"the DEK and one byte more", key(t, 1, 33), ErrHeaderMAC, ErrWrongKey, ErrNotBlank},
		{"the DEK's first half", key(t, 1, 16), ErrHeaderMAC, ErrWrongKey, ErrNotBlank},
		{"a short DEK", key(t, 1, 15), ErrInvalidKey, ErrInvalidKey, ErrInvalidKey},
		{"a long DEK", key(t, 1, 65), ErrInvalidKey, ErrInvalidKey, ErrInvalidKey},
		{"zeros", zero, ErrInvalidKey, ErrInvalidKey, ErrInvalidKey},
		{"no DEK", nil, ErrInvalidKey, ErrInvalidKey, ErrInvalidKey},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := v
			w.dek = c.dek
			untouched(t, v.device, func() error {
				_, err := w.open("victim")
				wantError(t, err, c.open)
				return err
			}, func() error {
				_, err := Adopt(ctx, v.device, v.id, c.dek)
				wantError(t, err, c.adopt)
				return err
			}, func() error {
				_, err := formatDevice(v.device, v.id, c.dek)
				wantError(t, err, c.format)
				return err
			})
		})
	}
}
