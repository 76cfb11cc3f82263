//go:build umlguest

package luks

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
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/keyagent/keyagent/internal/secret"
)

// newAuthenticated is a volume with integrity, on a loop device, as a first format
// leaves it.
func newAuthenticated(t testing.TB, size int64, i Integrity) volume {
	t.Helper()
	v := volume{device: blankDevice(t, size), id: idData, dek: dataKey(t)}
	h, err := NewHeader(t.Context(), v.id, Layout{i, size}, v.dek)
	must(t, err)
	must(t, Write(t.Context(), WriteRequest{v.device, v.id, h, DeadlineIn(time.Minute)}, v.dek))
	v.macs = h.MACs()
	return v
}

// withEachIntegrity runs a test for each way in which sectors have tags.
func withEachIntegrity(t *testing.T, test func(t *testing.T, i Integrity)) {
	for _, i := range []Integrity{HMACSHA256, AEGIS128} {
		t.Run(string(i), func(t *testing.T) { test(t, i) })
	}
}

// fresh opens an authenticated volume for the first time.
func (v volume) fresh(t testing.TB, opts OpenOptions) Mapping {
	t.Helper()
	req := v.request("data", opts)
	req.FreshTags = true
	m, _, err := Open(t.Context(), req, v.dek)
	must(t, err)
	t.Cleanup(func() {
		if _, err := Status(context.Background(), "data"); err == nil {
			must(t, v.close("data"))
		}
		if _, err := os.Stat("/dev/mapper/data_dif"); err == nil {
			t.Error("the lower mapping is left")
		}
	})
	return m
}

func direct(t testing.TB, path string, at int64, write []byte) ([]byte, error) {
	t.Helper()
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	must(t, err)
	defer unix.Close(fd)
	p := aligned()
	if write != nil {
		copy(p, write)
		_, err = unix.Pwrite(fd, p, at)
		return nil, err
	}
	_, err = unix.Pread(fd, p, at)
	return p, err
}

func TestLiveAnAuthenticatedVolumeKeepsItsDataAndNotWhatSomebodyChanged(t *testing.T) {
	for _, c := range []struct {
		Integrity
		OpenOptions
	}{{HMACSHA256, OpenOptions{}}, {HMACSHA256, OpenOptions{NoJournal: true}}, {AEGIS128, OpenOptions{NoJournal: true}}} {
		i, opts := c.Integrity, c.OpenOptions
		t.Run(fmt.Sprintf("%s/journal=%v", i, !opts.NoJournal), func(t *testing.T) {
			v := newAuthenticated(t, 40<<20, i)
			m := v.fresh(t, opts)
			if m.Integrity != i || m.NoJournal != opts.NoJournal || m.Bytes < 20<<20 || m.Bytes%dataSectorSize != 0 {
				t.Fatalf("it is mapped as %+v", m)
			}
			t.Log(run(t, "dmsetup", "table", "data_dif"), m.Bytes)
			if _, err := direct(t, m.Path, 0, nil); !errors.Is(err, unix.EILSEQ) {
				t.Errorf("what was never written reads with %v", err)
			}
			// The journal of a disk this small makes writing all of it slow.
			done := int64(0)
			must(t, Wipe(t.Context(), m, opts.NoJournal, func(n, _ int64) { done = n }))
			if done != m.Bytes {
				t.Errorf("%d bytes of %d were wiped", done, m.Bytes)
			}
			text := bytes.Repeat([]byte("keyagent"), dataSectorSize/8)
			const at = 5 << 20
			for i := range int64(2) {
				_, err := direct(t, m.Path, at+i*dataSectorSize, text)
				must(t, err)
			}
			must(t, v.close("data"))

			m, _, err := Open(t.Context(), v.request("data", opts), v.dek)
			must(t, err)
			got, err := direct(t, m.Path, at, nil)
			must(t, err)
			if !bytes.Equal(got, text) {
				t.Fatal("other data came back")
			}
			// Again, by what is there: the key is proved through the lower mapping.
			_, _, err = Open(t.Context(), v.request("data", opts), v.dek)
			must(t, err)
			_, _, err = Open(t.Context(), OpenRequest{Device: v.device, Name: "data", Identity: v.id, MACs: v.macs, Options: opts, Integrity: i}, v.dek)
			must(t, err)

			// Each bit of the sector as it lies on the disk.
			cipher, err := direct(t, "/dev/mapper/data_dif", at, nil)
			must(t, err)
			must(t, v.close("data"))
			image, err := os.ReadFile(run(t, "losetup", "-n", "-O", "BACK-FILE", v.device))
			must(t, err)
			where := bytes.LastIndex(image, cipher) // the journal has it, too
			if where < 0 {
				t.Fatal("the sector is not on the disk")
			}
			for _, bit := range []int{0, 12345, dataSectorSize*8 - 1} {
				patch(t, v.device, []byte{cipher[bit/8] ^ 1<<(bit%8)}, int64(where+bit/8))
				m, _, err = Open(t.Context(), v.request("data", opts), v.dek)
				must(t, err)
				if _, err := direct(t, m.Path, at, nil); !errors.Is(err, unix.EILSEQ) {
					t.Errorf("bit %d flipped: %v", bit, err)
				}
				if _, err := os.ReadFile(m.Path); !errors.Is(err, unix.EILSEQ) && !errors.Is(err, unix.EIO) {
					t.Errorf("bit %d flipped, read through the cache: %v", bit, err)
				}
				if _, err := direct(t, m.Path, at+dataSectorSize, nil); err != nil {
					t.Errorf("the next sector: %v", err)
				}
				must(t, v.close("data"))
				patch(t, v.device, cipher[bit/8:bit/8+1], int64(where+bit/8))
			}
			// Another sector's content with that sector's own tag does not move: the
			// sector's number is part of the tag.
			m, _, err = Open(t.Context(), v.request("data", opts), v.dek)
			must(t, err)
			if got, err := direct(t, m.Path, at, nil); err != nil || !bytes.Equal(got, text) {
				t.Errorf("put back: %v", err)
			}
			must(t, v.close("data"))
		})
	}
}

// The stock program makes the same form of header, and opens ours.
func TestLiveStockCryptsetupOpensAnAuthenticatedVolume(t *testing.T) {
	withEachIntegrity(t, func(t *testing.T, i Integrity) {
		v := newAuthenticated(t, 40<<20, i)
		m := v.fresh(t, OpenOptions{})
		ours := [2]string{run(t, "dmsetup", "table", "data"), run(t, "dmsetup", "table", "data_dif")}
		must(t, Wipe(t.Context(), m, false, nil))
		text := bytes.Repeat([]byte("sector!!"), dataSectorSize/8)
		_, err := direct(t, m.Path, 0, text)
		must(t, err)
		must(t, v.close("data"))
		key := keyFile(t, v.dek)
		run(t, "cryptsetup", "open", "--disable-locks", "--key-file", key, v.device, "stock")
		stock := [2]string{run(t, "dmsetup", "table", "stock"), run(t, "dmsetup", "table", "stock_dif")}
		got, err := direct(t, "/dev/mapper/stock", 0, nil)
		must(t, err)
		if !bytes.Equal(got, text) {
			t.Error("stock cryptsetup reads something else")
		}
		run(t, "cryptsetup", "close", "stock")
		t.Logf("tables:\n%s\n%s\n%s\n%s", ours[0], stock[0], ours[1], stock[1])

		// What it formats differs in the length alone, which it leaves to the disk.
		theirs := blankDevice(t, 40<<20)
		form := []string{"--cipher", "aes-xts-plain64", "--key-size", "512", "--integrity", "hmac-sha256"}
		if i == AEGIS128 {
			form = []string{"--cipher", "aegis128-random", "--key-size", "128", "--integrity", "aead"}
		}
		out, err := exec.Command("cryptsetup", append(form, "luksFormat", "--batch-mode", "--disable-locks", "--type", "luks2", "--uuid", idData.UUID, "--key-file", key,
			"--integrity-no-wipe", "--sector-size", "4096",
			"--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--hash", "sha256", "--offset", fmt.Sprint(dataOffset/sectorSize), theirs)...).CombinedOutput()
		if err != nil {
			t.Fatalf("cryptsetup luksFormat: %v: %s", err, out)
		}
		_, err = Adopt(t.Context(), theirs, idData, v.dek)
		wantRule(t, err, RuleSize)
	})
}

func TestLiveWhatAnAuthenticatedVolumeDoesNotDo(t *testing.T) {
	withEachIntegrity(t, func(t *testing.T, i Integrity) {
		v := newAuthenticated(t, 20<<20, i)
		m := v.fresh(t, OpenOptions{})
		must(t, Wipe(t.Context(), m, false, nil))
		must(t, v.close("data"))
		for name, req := range map[string]OpenRequest{
			"read-only": v.request("data", OpenOptions{ReadOnly: true}),
			"TRIM":      v.request("data", OpenOptions{AllowDiscards: true}),
			"long name": v.request(strings.Repeat("n", maxAuthenticatedName+1), OpenOptions{}),
		} {
			wantError(t, untouched(t, v.device, func() error { _, _, err := Open(t.Context(), req, v.dek); return err }), ErrInvalid)
			_ = name
		}
		other := newVolume(t, idLogs, logsKey(t))
		req := other.request("logs", OpenOptions{})
		req.Integrity = i
		wantError(t, untouched(t, other.device, func() error { _, _, err := Open(t.Context(), req, other.dek); return err }), ErrNoIntegrity)
		// What the host may say in the superblock.
		for _, forged := range []struct {
			at   int64
			with []byte
		}{{0, []byte("integrX")}, {offTagsVersion, []byte{99}}, {offTagsTagSize, []byte{4, 0}}, {offTagsProvided, []byte{0, 0, 0, 0, 1}}, {offTagsFlags, []byte{2 | 8}}, {offTagsBlock, []byte{0}}} {
			d, err := openShared(t.Context(), v.device)
			must(t, err)
			was := make([]byte, len(forged.with))
			must(t, d.read(was, dataOffset+forged.at))
			d.Close()
			patch(t, v.device, forged.with, dataOffset+forged.at)
			wantError(t, untouched(t, v.device, func() error { _, err := v.open("data"); return err }), ErrHeaderRefused)
			patch(t, v.device, was, dataOffset+forged.at)
		}
		_, err := v.open("data")
		must(t, err)
	})
}

// A process that was killed left the lower mapping, or both before anything was
// written.
func TestLiveRemainsOfAnAuthenticatedVolumeAreCleared(t *testing.T) {
	withEachIntegrity(t, func(t *testing.T, i Integrity) {
		v := newAuthenticated(t, 40<<20, i)
		v.fresh(t, OpenOptions{})
		_, err := v.open("data") // nothing verifies: it is made anew
		must(t, err)
		run(t, "dmsetup", "remove", "data")
		held, err := os.Open("/dev/mapper/data_dif")
		must(t, err)
		wantError(t, v.close("data"), ErrDeviceBusy) // what is below may still write
		must(t, held.Close())
		wantError(t, v.close("data"), ErrNotActive)
		if names := mappingNames(t); strings.Contains(names, "data") {
			t.Errorf("closing leaves %s", names)
		}
		m, err := v.open("data")
		must(t, err)
		must(t, Wipe(t.Context(), m, false, nil))
		run(t, "dmsetup", "remove", "data")
		_, err = v.open("data")
		must(t, err)
		must(t, Suspend(t.Context(), "data", v.id.UUID))
		m, err = Resume(t.Context(), v.existing("data"), v.dek)
		must(t, err)
		if m.Suspended || m.Integrity == "" {
			t.Errorf("resumed: %+v", m)
		}
		must(t, Cut(t.Context(), "data", v.id.UUID))
		if table := run(t, "dmsetup", "table", "data_dif"); !strings.Contains(table, "error") {
			t.Errorf("cut off, its tags are still written: %s", table)
		}
		must(t, v.close("data"))
		if names := mappingNames(t); strings.Contains(names, "data") {
			t.Errorf("closing leaves %s", names)
		}
	})
}

// XFS reads nothing that it has not written: its volume is there at once. It does not
// grow, and opens on a disk that did.
func TestLiveAnAuthenticatedVolumeWithXFSIsNotWiped(t *testing.T) {
	if _, err := exec.LookPath("mkfs.xfs"); err != nil {
		t.Fatal(err)
	}
	const small, big = 340 << 20, 440 << 20
	v := newAuthenticated(t, small, HMACSHA256)
	m := v.fresh(t, OpenOptions{})
	d, err := openShared(t.Context(), v.device)
	must(t, err)
	offered, err := d.provided()
	must(t, err)
	d.Close()
	if m.Bytes != Room(small, HMACSHA256) || offered != modelProvided(small) {
		t.Errorf("it has %d bytes of %d, which were foretold as %d of %d", m.Bytes, offered, Room(small, HMACSHA256), modelProvided(small))
	}
	must(t, Wipe(t.Context(), m, false, nil))
	run(t, "mkfs.xfs", "-q", "-f", m.Path)
	at := filepath.Join(t.TempDir(), "mnt")
	must(t, os.Mkdir(at, 0o755))
	run(t, "mount", m.Path, at)
	defer exec.Command("umount", at).Run()
	must(t, os.WriteFile(filepath.Join(at, "file"), []byte("kept"), 0o644))
	must(t, os.WriteFile(filepath.Join(at, "big"), make([]byte, 60<<20), 0o644))
	resizeDevice(t, v.device, big)
	_, err = Resize(t.Context(), v.existing("data"), v.dek)
	wantError(t, err, ErrNoGrowth)
	run(t, "umount", at)
	must(t, v.close("data"))
	for range 2 { // the kernel writes down at the first what it offers from then on
		m, err = v.open("data")
		must(t, err)
		if m.Bytes != Room(small, HMACSHA256) {
			t.Errorf("on a larger disk it has %d bytes", m.Bytes)
		}
		must(t, v.close("data"))
	}
	m, err = v.open("data")
	must(t, err)
	run(t, "mount", m.Path, at)
	text, err := os.ReadFile(filepath.Join(at, "file"))
	must(t, err)
	if string(text) != "kept" {
		t.Errorf("read %q", text)
	}
	run(t, "umount", at)
}

// What a suspended volume accepted is on the disk when it is suspended, and nothing of it
// is written afterwards: the disk may be another machine's by then.
func TestLiveASuspendedVolumeWithIntegrityWritesNothingMore(t *testing.T) {
	withEachIntegrity(t, func(t *testing.T, i Integrity) {
		v := newAuthenticated(t, 40<<20, i)
		m := v.fresh(t, OpenOptions{})
		must(t, Wipe(t.Context(), m, false, nil))
		text := bytes.Repeat([]byte("accepted"), dataSectorSize/8)
		for at := int64(0); at < 1<<20; at += dataSectorSize {
			_, err := direct(t, m.Path, at, text) // without a flush: it is in memory, or in the journal
			must(t, err)
		}
		must(t, Suspend(t.Context(), "data", v.id.UUID))
		m, err := Status(t.Context(), "data")
		must(t, err)
		if !m.Suspended {
			t.Error("it is not suspended")
		}
		must(t, Suspend(t.Context(), "data", v.id.UUID)) // once more
		run(t, "blockdev", "--flushbufs", v.device)
		before := digest(t, v.device)
		must(t, Cut(t.Context(), "data", v.id.UUID))
		must(t, v.close("data"))
		run(t, "blockdev", "--flushbufs", v.device)
		if digest(t, v.device) != before {
			t.Error("the disk was written after the volume was suspended")
		}
		m, err = v.open("data")
		must(t, err)
		for at := int64(0); at < 1<<20; at += dataSectorSize {
			got, err := direct(t, m.Path, at, nil)
			must(t, err)
			if !bytes.Equal(got, text) {
				t.Fatalf("byte %d: what was accepted is lost", at)
			}
		}
		// What another program did with such a volume is taken out of use, both halves.
		must(t, Sever(t.Context(), "data"))
		if names := mappingNames(t); strings.Contains(names, "data") {
			t.Errorf("severing leaves %s", names)
		}
	})
}

// A mapping of the right name, UUID, device and table, through which somebody has written
// with another key.
func TestLiveAnotherKeyIsNotThatOfAnAuthenticatedVolume(t *testing.T) {
	withEachIntegrity(t, func(t *testing.T, i Integrity) {
		v := newAuthenticated(t, 40<<20, i)
		m := v.fresh(t, OpenOptions{NoJournal: true})
		run(t, "dmsetup", "remove", "data")
		lower, err := inspect("data_dif")
		must(t, err)
		f, err := formOf(i)
		must(t, err)
		other, err := secret.Random(f.keySize)
		must(t, err)
		defer other.Close()
		c := creation{
			name: "data", uuid: dmUUID(v.id.UUID, "data"), kind: cryptKind, bytes: m.Bytes,
			params: cryptParams(f, f.volumeKeyRef(v.id.UUID), lower.dev, 0, OpenOptions{Workqueues: true}),
		}
		runtime.LockOSThread()
		err = withVolumeKey(v.id.UUID, other, func() error { return c.create(t.Context()) })
		runtime.UnlockOSThread()
		must(t, err)
		live, err := inspect("data")
		must(t, err)
		must(t, ensureNode(Mapping{Path: m.Path, Device: live.dev}))
		for n := range int64(16) {
			_, err := direct(t, m.Path, n*dataSectorSize, []byte("written with another key"))
			must(t, err)
		}
		_, err = v.open("data")
		wantError(t, err, ErrNotOurs)
		if names := mappingNames(t); strings.Contains(names, "_prf") {
			t.Errorf("left are %s", names)
		}
		run(t, "dmsetup", "remove", "data")
		wantError(t, v.close("data"), ErrNotActive)
	})
}

// A process that was killed while it proved a key has left its mapping.
func TestLiveRemainsOfAProofAreCleared(t *testing.T) {
	v := newAuthenticated(t, 40<<20, AEGIS128)
	m := v.fresh(t, OpenOptions{NoJournal: true})
	must(t, Wipe(t.Context(), m, false, nil))
	left := func() {
		lower, err := inspect("data_dif")
		must(t, err)
		run(t, "dmsetup", "create", proofName("data"), "--uuid", proofUUID(v.id.UUID, "data"), "--readonly",
			"--table", fmt.Sprintf("0 %d linear %v 0", m.Bytes/sectorSize, lower.dev))
		run(t, "dmsetup", "mknodes", proofName("data"))
	}
	left()
	_, err := v.open("data") // proves it
	must(t, err)
	left()
	must(t, Suspend(t.Context(), "data", v.id.UUID))
	if names := mappingNames(t); strings.Contains(names, "_prf") {
		t.Errorf("suspended, left are %s", names)
	}
	m, err = Resume(t.Context(), v.existing("data"), v.dek)
	must(t, err)
	// One that somebody holds has no key, and what is suspended is suspended.
	left()
	held, err := os.Open("/dev/mapper/" + proofName("data"))
	must(t, err)
	defer held.Close()
	must(t, Suspend(t.Context(), "data", v.id.UUID))
	if table := run(t, "dmsetup", "table", proofName("data")); !strings.Contains(table, "error") {
		t.Errorf("it is held, and is %s", table)
	}
	_, err = Resume(t.Context(), v.existing("data"), v.dek)
	wantError(t, err, ErrDeviceBusy)
	must(t, held.Close())
	m, err = Resume(t.Context(), v.existing("data"), v.dek)
	must(t, err)
	left()
	must(t, Cut(t.Context(), "data", v.id.UUID))
	if names := mappingNames(t); strings.Contains(names, "_prf") {
		t.Errorf("cut off, left are %s", names)
	}
	must(t, v.close("data"))
	m, err = v.open("data")
	must(t, err)
	if m.Integrity != AEGIS128 {
		t.Errorf("it is %+v", m)
	}
	// A volume has what it was made with: asking for the other kind is asking for tags.
	req := v.request("data", OpenOptions{NoJournal: true})
	req.Integrity = HMACSHA256
	_, _, err = Open(t.Context(), req, v.dek)
	must(t, err)
	left()
	must(t, v.close("data"))
	if names := mappingNames(t); strings.Contains(names, "data") {
		t.Errorf("closing leaves %s", names)
	}
}
