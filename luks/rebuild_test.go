package luks

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/keyagent/keyagent/internal/secret"
)

// version1 makes a header of version 1 of a good one: its salts have nothing to do
// with each other.
func version1(t testing.TB, dek *secret.Bytes) (raw []byte, want MACs) {
	t.Helper()
	raw = header(t)
	raw[metadataSize+offSalt] ^= 1
	forgery{t, raw}.reseal()
	mac, err := headerMAC(guarded{raw: raw}, idData, dek)
	must(t, err)
	return raw, MACs{Header: mac}
}

// Case 50: one copy is damaged, anywhere, by one bit or as a whole.
func TestOneGoodCopyIsTheWholeHeader(t *testing.T) {
	ctx, dek := context.Background(), dataKey(t)
	good := header(t)
	want, err := headerMACs(guarded{raw: good}, idData, dek)
	must(t, err)
	path := image(t, 20<<20)
	for i, name := range copyNames {
		at := i * metadataSize
		for damage, p := range map[string]struct {
			offset int
			data   []byte
		}{
			"its magic":           {offMagic, []byte("x")},
			"its sequence number": {offSeqID + 7, []byte{9}},
			"its salt":            {offSalt + 3, []byte{good[at+offSalt+3] ^ 1}},
			"its UUID":            {offUUID, []byte(idLogs.UUID)},
			"its checksum":        {offChecksum, []byte{good[at+offChecksum] ^ 0x80}},
			"its JSON":            {binarySize + 30, []byte("\xff")},
			"its last byte":       {metadataSize - 1, []byte{1}},
			"all of it":           {0, make([]byte, metadataSize)},
		} {
			t.Run(name+": "+damage, func(t *testing.T) {
				raw := bytes.Clone(good)
				copy(raw[at+p.offset:], p.data)
				patch(t, path, raw, 0)
				before := digest(t, path)
				h, err := ReadHeader(ctx, HeaderRequest{path, idData, want}, dek)
				must(t, err)
				if bad, damaged := h.Damaged(); !damaged || bad != name {
					t.Errorf("damaged is %q, %v", bad, damaged)
				}
				if !bytes.Equal(h.Bytes(), good) || h.MACs() != want {
					t.Error("the header is not the one that was recorded")
				}
				if digest(t, path) != before {
					t.Error("reading has changed the disk")
				}
				wantError(t, Matches(ctx, path, h), ErrHeaderChanged)
				_, err = RebuildCopy(ctx, HeaderRequest{path, idData, want}, dek)
				must(t, err)
				must(t, Matches(ctx, path, h))
				_, err = RebuildCopy(ctx, HeaderRequest{path, idData, want}, dek)
				wantError(t, err, ErrNotRebuildable)
			})
		}
	}
}

func TestWhatIsNotOneGoodCopyIsRefused(t *testing.T) {
	dek := dataKey(t)
	good := header(t)
	want, err := headerMACs(guarded{raw: good}, idData, dek)
	must(t, err)
	flip := func(offsets ...int) []byte {
		raw := bytes.Clone(good)
		for _, o := range offsets {
			raw[o] ^= 1
		}
		return raw
	}
	resealed := func(edit func(forgery)) []byte {
		f := forgery{t, bytes.Clone(good)}
		edit(f)
		f.reseal()
		return f.raw
	}
	v1, v1MACs := version1(t, dek)
	v1Damaged := bytes.Clone(v1)
	v1Damaged[metadataSize-1] ^= 1
	for _, c := range []struct {
		name string
		raw  []byte
		want MACs
		is   error
	}{
		{"both copies are damaged", flip(offSalt, metadataSize+offSalt), want, ErrHeaderRefused},
		{"the keyslot is damaged", flip(areasOffset + 5), want, ErrHeaderMAC},
		{"one copy and the keyslot are damaged", flip(offSalt, areasOffset+5), want, ErrHeaderRefused},
		{"both copies have new salts", resealed(func(f forgery) { f.raw[offSalt] ^= 1; f.raw[metadataSize+offSalt] ^= 1 }), want, ErrHeaderMAC},
		{"a version 1 header has a damaged copy", v1Damaged, v1MACs, ErrHeaderRefused},
		{"the record's MACs are of two headers", flip(offSalt), MACs{Header: MAC{1}, Copies: want.Copies}, ErrHeaderMAC},
		{"the MACs of the copies are exchanged", flip(offSalt), MACs{Header: want.Header, Copies: [2]MAC{want.Copies[1], want.Copies[0]}}, ErrHeaderRefused},
		{"one MAC is missing", flip(offSalt), MACs{Header: want.Header, Copies: [2]MAC{want.Copies[0]}}, ErrHeaderMAC},
		{"no MAC is there", good, MACs{}, ErrHeaderMAC},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := verify(c.raw, idData, c.want, dek)
			wantError(t, err, c.is)
		})
	}
	for name, id := range map[string]Identity{"another volume": idLogs, "another generation": {idData.Volume, idData.UUID, 8}} {
		if _, err := verify(flip(offSalt), id, want, dek); err == nil {
			t.Errorf("%s: it was rebuilt", name)
		}
	}
	_, err = verify(v1, idData, v1MACs, dek) // goes on opening
	must(t, err)
}

func TestAHeaderIsRestoredFromItsBackupAlone(t *testing.T) {
	ctx, dek := context.Background(), dataKey(t)
	path, want := formatted(t, idData, dek)
	h, err := ReadHeader(ctx, HeaderRequest{path, idData, want}, dek)
	must(t, err)
	var backup bytes.Buffer
	must(t, h.WriteBackup(&backup))
	if backup.Len() != BackupSize {
		t.Errorf("backup has %d bytes", backup.Len())
	}
	for name, wipe := range map[string]func(){
		"the header is gone":     func() { patch(t, path, make([]byte, guardedSize), 0) },
		"a few bytes differ":     func() { patch(t, path, []byte{1, 2, 3}, offSalt) },
		"the keyslot is gone":    func() { patch(t, path, make([]byte, areaSize), areasOffset) },
		"another header of ours": func() { patch(t, path, newTestHeader(t, idData, dek).raw, 0) },
		"nothing":                func() {},
	} {
		t.Run(name, func(t *testing.T) {
			wipe()
			_, err := RestoreHeader(ctx, HeaderRequest{path, idData, want}, dek, backup.Bytes())
			must(t, err)
			must(t, Matches(ctx, path, h))
			wipe()
			_, err = RestoreHeader(ctx, HeaderRequest{path, idData, want}, dek, h.Bytes())
			must(t, err)
			must(t, Matches(ctx, path, h))
		})
	}
	other := newTestHeader(t, idData, dek)
	for name, raw := range map[string][]byte{
		"an older header": other.raw, "a part": backup.Bytes()[:guardedSize-1], "nothing": nil,
		"a changed keyslot": append(bytes.Clone(h.raw[:guardedSize-1]), h.raw[guardedSize-1]^1),
	} {
		before := digest(t, path)
		if _, err := RestoreHeader(ctx, HeaderRequest{path, idData, want}, dek, raw); err == nil {
			t.Errorf("%s was restored", name)
		}
		if digest(t, path) != before {
			t.Errorf("%s: the disk has changed", name)
		}
	}
}

func TestAHeaderIsNotRestoredOverAnotherTenant(t *testing.T) {
	ctx, dek := context.Background(), dataKey(t)
	h := newTestHeader(t, idData, dek)
	for name, prepare := range map[string]func(testing.TB, string){
		"an ext4 filesystem": tool("mkfs.ext4", "-q", "-F"),
		"another volume": func(t testing.TB, path string) {
			_, err := formatImage(path, idLogs, logsKey(t))
			must(t, err)
		},
	} {
		t.Run(name, func(t *testing.T) {
			path := image(t, 20<<20)
			prepare(t, path)
			before := digest(t, path)
			_, err := RestoreHeader(ctx, HeaderRequest{path, idData, h.MACs()}, dek, h.Bytes())
			if !errors.Is(err, ErrNotBlank) && !errors.Is(err, ErrVolumeMismatch) {
				t.Errorf("error is %v", err)
			}
			if WriteBack(ctx, path, h, DeadlineIn(1e9)) == nil || digest(t, path) != before {
				t.Error("the disk has changed")
			}
		})
	}
}

// The stock tool reads our backups, and both of a header's copies.
func TestTheStockToolRestoresOurBackup(t *testing.T) {
	ctx, dek := context.Background(), dataKey(t)
	path, want := formatted(t, idData, dek)
	h, err := ReadHeader(ctx, HeaderRequest{path, idData, want}, dek)
	must(t, err)
	backup := filepath.Join(t.TempDir(), "backup")
	f, err := os.Create(backup)
	must(t, err)
	must(t, errors.Join(h.WriteBackup(f), f.Close()))
	patch(t, path, make([]byte, guardedSize), 0)
	stock(t, "luksHeaderRestore", "-q", "--header-backup-file", backup, path)
	_, err = ReadHeader(ctx, HeaderRequest{path, idData, want}, dek)
	must(t, err)
	// Its own backup is one that we restore.
	must(t, os.Remove(backup))
	stock(t, "luksHeaderBackup", "--header-backup-file", backup, path)
	raw, err := os.ReadFile(backup)
	must(t, err)
	patch(t, path, make([]byte, guardedSize), 0)
	_, err = RestoreHeader(ctx, HeaderRequest{path, idData, want}, dek, raw)
	must(t, err)
	// It repairs a copy from the other, and then has a salt of its own: the record's
	// MAC notices, the other copy's MAC still holds.
	patch(t, path, make([]byte, metadataSize), 0)
	out := stock(t, "luksDump", path)
	if !bytes.Contains(out, []byte(idData.UUID)) {
		t.Errorf("luksDump says %s", out)
	}
	got, err := ReadHeader(ctx, HeaderRequest{path, idData, want}, dek)
	must(t, err)
	if bad, damaged := got.Damaged(); damaged && bad != "primary" {
		t.Errorf("damaged is %q", bad)
	}
	if !bytes.Equal(got.Bytes(), h.Bytes()) {
		t.Error("the header is another one")
	}
}

// FuzzVerify: whatever is done to the two copies, a header that is accepted is bit for
// bit the one that was recorded.
func FuzzVerify(f *testing.F) {
	good := header(f)
	dek := dataKey(f)
	want, err := headerMACs(guarded{raw: good}, idData, dek)
	must(f, err)
	f.Add(uint32(0), []byte{})
	f.Add(uint32(5), []byte("x"))
	f.Add(uint32(metadataSize+offSalt), make([]byte, 64))
	f.Add(uint32(metadataSize-1), []byte{1, 1})
	f.Fuzz(func(t *testing.T, offset uint32, p []byte) {
		raw := bytes.Clone(good)
		copy(raw[offset%guardedSize:], p)
		h, err := verify(raw, idData, want, dek)
		if err != nil {
			if !errors.Is(err, ErrHeaderRefused) && !errors.Is(err, ErrHeaderMAC) && !errors.Is(err, ErrVolumeMismatch) {
				t.Fatal(err)
			}
			return
		}
		if !bytes.Equal(h.raw, good) {
			t.Error("another header was accepted")
		}
		if _, damaged := h.Damaged(); damaged == bytes.Equal(raw, good) {
			t.Errorf("damaged is %v", damaged)
		}
	})
}

func ExampleHeader_Damaged() {
	h := &Header{damaged: 1}
	fmt.Println(h.Damaged())
	// Output: secondary true
}
