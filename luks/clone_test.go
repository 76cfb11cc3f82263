package luks

import (
	"bytes"
	"context"
	"errors"
	"os"
	"testing"

	"github.com/keyagent/keyagent/internal/secret"
)

// The source of clones is the volume "logs", and what becomes of them is "data".
func sourceDEK() (*secret.Bytes, error) {
	return secret.From([]byte("the DEK of the source, 32 bytes."))
}
func cloneDEK() (*secret.Bytes, error) {
	return secret.From([]byte("a DEK of thirty-two bytes, 01234"))
}

// clone is an image that begins as a copy of the source, with data behind the header.
func clone(t testing.TB, l Layout) (path string, source []byte) {
	t.Helper()
	dek, err := sourceDEK()
	must(t, err)
	defer dek.Close()
	path = image(t, 20<<20)
	h, err := NewHeader(t.Context(), idLogs, l, dek)
	must(t, err)
	patch(t, path, h.raw, 0)
	patch(t, path, bytes.Repeat([]byte("data"), 1<<20), dataOffset)
	must(t, os.WriteFile(path+".macs", append(append(append([]byte(nil), h.macs.Header[:]...), h.macs.Copies[0][:]...), h.macs.Copies[1][:]...), 0o600))
	return path, h.raw
}

func cloneHeader(path string) (*Header, error) {
	from, err := sourceDEK()
	if err != nil {
		return nil, err
	}
	defer from.Close()
	dek, err := cloneDEK()
	if err != nil {
		return nil, err
	}
	defer dek.Close()
	macs, err := os.ReadFile(path + ".macs")
	if err != nil {
		return nil, err
	}
	of := Source{Identity: idLogs, MACs: MACs{Header: MAC(macs), Copies: [2]MAC{MAC(macs[len(MAC{}):]), MAC(macs[2*len(MAC{}):])}}}
	return NewCloneHeader(context.Background(), path, of, from, idData, dek)
}

// cloneImage does to a regular file what a node does to a cloned device.
func cloneImage(path string) error {
	h, err := cloneHeader(path)
	if err != nil {
		return err
	}
	return writeImage(path, h)
}

func writeImage(path string, h *Header) error {
	dek, err := cloneDEK()
	if err != nil {
		return err
	}
	defer dek.Close()
	d, err := openExclusive(context.Background(), path)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.write(idData, dek, h, inTime)
}

// wantClone fails unless the image is the volume "data" with the source's volume key.
func wantClone(t *testing.T, path string, source []byte) {
	t.Helper()
	from, err := sourceDEK()
	must(t, err)
	defer from.Close()
	dek, err := cloneDEK()
	must(t, err)
	defer dek.Close()
	h, err := Adopt(t.Context(), path, idData, dek)
	must(t, err)
	src, err := vouch(source, idLogs, from)
	must(t, err)
	if h.form != src.form || h.bytes != src.bytes {
		t.Errorf("it is %v with %d bytes, the source %v with %d", h.form.integrity, h.bytes, src.form.integrity, src.bytes)
	}
	had, err := src.volumeKey(from)
	must(t, err)
	defer had.Close()
	has, err := h.volumeKey(dek)
	must(t, err)
	defer has.Close()
	must(t, had.Use(func(a []byte) error {
		return has.Use(func(b []byte) error {
			if !bytes.Equal(a, b) {
				t.Error("it has another volume key than its source")
			}
			return nil
		})
	}))
	if _, err := h.volumeKey(from); err == nil {
		t.Error("the source's DEK opens it")
	}
	data, err := os.ReadFile(path)
	must(t, err)
	if !bytes.Equal(data[dataOffset:dataOffset+4<<20], bytes.Repeat([]byte("data"), 1<<20)) {
		t.Error("its data was changed")
	}
	kept, err := SourceKept(t.Context(), path, idData, dek)
	must(t, err)
	other, err := SourceKept(t.Context(), path, idData, from)
	must(t, err)
	if !kept || other {
		t.Errorf("the source is kept: %v, by its own DEK %v", kept, other)
	}
	d, err := openExclusive(t.Context(), path)
	must(t, err)
	defer d.Close()
	must(t, d.forgetSource())
	if kept, err = SourceKept(t.Context(), path, idData, dek); err != nil || kept {
		t.Errorf("afterwards it is kept: %v, %v", kept, err)
	}
	data, err = os.ReadFile(path)
	must(t, err)
	if !allZero(data[maxGuardedSize:dataOffset]) {
		t.Error("something of the source is left between header and data")
	}
}

func TestACloneBecomesAVolumeOfItsOwn(t *testing.T) {
	for name, l := range map[string]Layout{"plain": {}, "integrity": {Integrity: HMACSHA256, DeviceBytes: 20 << 20}} {
		t.Run(name, func(t *testing.T) {
			path, source := clone(t, l)
			must(t, cloneImage(path))
			must(t, cloneImage(path)) // another attempt, after the word of the first was lost
			wantClone(t, path, source)
		})
		// Half of the source's header is enough, as it is of any volume.
		t.Run(name+", damaged", func(t *testing.T) {
			path, source := clone(t, l)
			patch(t, path, []byte("damage"), metadataSize+100)
			must(t, cloneImage(path))
			wantClone(t, path, source)
		})
	}
}

func TestAHeaderOfACloneReplacesNothingElse(t *testing.T) {
	other := func(t *testing.T) []byte {
		dek := key(t, 77, 32)
		h, err := NewHeader(t.Context(), Identity{Volume: "other", UUID: "a3a9e1b4-55d2-4e7b-8f0e-2b1f3a4c5d6e", Generation: 1}, Layout{}, dek)
		must(t, err)
		return h.raw
	}
	for _, tt := range []struct {
		name   string
		change func(t *testing.T, path string)
		make   error // of the header
		write  error // where the disk changes after the header was made
	}{
		{"blank", func(t *testing.T, path string) { patch(t, path, make([]byte, 20<<20), 0) }, ErrHeaderRefused, ErrNotBlank},
		{"data", func(t *testing.T, path string) { patch(t, path, bytes.Repeat([]byte{7}, 1<<20), 0) }, ErrHeaderRefused, ErrNotBlank},
		{"another volume", func(t *testing.T, path string) { patch(t, path, other(t), 0) }, ErrVolumeMismatch, ErrNotBlank},
		{"a changed header", func(t *testing.T, path string) {
			patch(t, path, []byte{1}, areasOffset+5000)
		}, ErrHeaderMAC, ErrNotBlank},
		{"a marker of nobody", func(t *testing.T, path string) {
			patch(t, path, append([]byte(markerMagic), make([]byte, areasOffset)...), 0)
		}, ErrHeaderRefused, ErrNotBlank},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path, _ := clone(t, Layout{})
			h, err := cloneHeader(path)
			must(t, err)
			tt.change(t, path)
			before := digest(t, path)
			_, err = cloneHeader(path)
			wantError(t, err, tt.make)
			wantError(t, writeImage(path, h), tt.write)
			if digest(t, path) != before {
				t.Error("it was written to")
			}
		})
	}
	path, _ := clone(t, Layout{})
	from, err := sourceDEK()
	must(t, err)
	defer from.Close()
	_, err = NewCloneHeader(t.Context(), path, Source{Identity: idLogs, MACs: MACs{Header: MAC{1}}}, from, idLogs, from)
	wantError(t, err, ErrInvalid)
}

// A machine that was frozen at any look at the clock, while another node finished the
// clone, wakes up and gives up: what stands in front is not written to, unless it had begun
// to in time.
func TestACloneThatIsTooLateGivesUp(t *testing.T) {
	for late := 1; late <= 4; late++ {
		path, source := clone(t, Layout{})
		h, err := cloneHeader(path)
		must(t, err)
		d, err := openExclusive(t.Context(), path)
		must(t, err)
		dek, err := cloneDEK()
		must(t, err)
		looks := 0
		err = d.write(idData, dek, h, func() error {
			if looks++; looks == late {
				return ErrTooLate
			}
			return nil
		})
		must(t, errors.Join(d.Close(), dek.Close()))
		wantError(t, err, ErrTooLate)
		if looks != late {
			t.Errorf("it went on after look %d, until %d", late, looks)
		}
		front, err := os.ReadFile(path)
		must(t, err)
		if late < 4 && !bytes.HasPrefix(front, source) {
			t.Errorf("late at look %d, it wrote over the header", late)
		}
		must(t, cloneImage(path)) // the next attempt
		wantClone(t, path, source)
	}
}

// Killed at every write and every flush, it converges, and keeps the key of the data.
func TestACloneKilledAtEveryWriteConverges(t *testing.T) {
	kills := map[string]int{}
	for _, call := range []string{"pwrite64", "fsync"} {
		for n := 1; ; n++ {
			path, source := clone(t, Layout{})
			if killedAt(t, cloneEnv, path, call, n) {
				break
			}
			kills[call]++
			killedAt(t, cloneEnv, path, call, n) // once more at the same point
			must(t, cloneImage(path))
			wantClone(t, path, source)
		}
	}
	if kills["pwrite64"] != 4 || kills["fsync"] != 5 {
		t.Errorf("killed at %v; it has 4 writes, each with a flush, and a flush before it reads back", kills)
	}
}
