package luks

import (
	"bytes"
	"cmp"
	"context"
	"crypto/aes"
	"errors"
	"fmt"
	"os"
	"strings"
	"unsafe"

	"golang.org/x/crypto/xts"
	"golang.org/x/sys/unix"

	"github.com/keyagent/keyagent/internal/secret"
)

// A mapping of the right name, UUID, device and table may still have been made by
// somebody else, from a header that the host wrote: the table names a key, it does
// not show it. So before a mapping is adopted, some sectors are read from the device,
// decrypted with the volume key of the guarded header, and compared with what the
// mapping gives. One sector of 4096 bytes that agrees proves the key.

const (
	proofSectors = 8
	proofTries   = 4 // a filesystem may write to a sector between the two reads
)

// Prove makes sure that an existing mapping was made with the key of this volume. It
// gives [ErrNotOurs] if it was not.
func Prove(ctx context.Context, e Existing, dek *Key) (Mapping, error) {
	var m Mapping
	err := e.with(ctx, dek, func(d *disk, proved Mapping, _ *Header) error {
		m = proved
		return nil
	})
	if err != nil {
		return Mapping{}, fmt.Errorf("prove mapping of volume %q: %w", e.Identity.Volume, err)
	}
	return m, nil
}

// with finds the mapping and its header, proves the key unless the mapping is
// suspended, and calls f under the locks of both.
func (e Existing) with(ctx context.Context, dek *Key, f func(*disk, Mapping, *Header) error) error {
	if err := cmp.Or(e.Identity.validate(), validateName(e.Name), validateKey(dek), e.MACs.validate()); err != nil {
		return err
	}
	release, err := acquireBoth(ctx, e.Identity.Volume, e.Name)
	if err != nil {
		return err
	}
	defer release()
	d, err := openShared(ctx, e.Device)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.mustBeBlock(); err != nil {
		return err
	}
	live, err := inspect(e.Name)
	if err != nil {
		return err
	}
	m, err := sameVolume(live, e.Name, e.Identity, d)
	if err != nil {
		return err
	}
	h, err := d.headerFor(e.Header, e.Identity, e.MACs, dek)
	if err != nil {
		return err
	}
	if !m.Suspended {
		if err := d.prove(ctx, m, h, dek); err != nil {
			return err
		}
	}
	return f(d, m, h)
}

// headerFor verifies a header that was read before, or the one in front.
func (d *disk) headerFor(h *Header, id Identity, want MACs, dek *Key) (*Header, error) {
	if h == nil {
		return d.examine(id, want, dek)
	}
	return verify(h.raw, id, want, dek)
}

// prove compares what the mapping reads with what the header's key makes of the
// device.
func (d *disk) prove(ctx context.Context, m Mapping, h *Header, dek *Key) error {
	if m.Suspended {
		return fmt.Errorf("%w: %s", ErrSuspended, m.Name)
	}
	vk, err := h.volumeKey(dek)
	if err != nil {
		return err
	}
	defer vk.Close()
	sectors := m.Bytes / dataSectorSize
	side, err := d.cipherSide(m)
	if err != nil {
		return err
	}
	agrees := func(sector int64, cipher, plain []byte) (bool, error) {
		return decryptsTo(vk, uint64(sector), cipher, plain)
	}
	if h.form == aead {
		second, err := mapAgain(ctx, m, h, side, vk)
		if err != nil {
			return err
		}
		defer second.remove(ctx)
		agrees = func(sector int64, _, plain []byte) (bool, error) { return second.agrees(d, sector, plain) }
	}
	verified := !h.form.tagged()
	for try := range proofTries {
		for i := range min(int64(proofSectors), sectors) {
			// Spread over the volume, and others at each try.
			at := (i*sectors/proofSectors + int64(try)*17) % sectors
			if h.form.tagged() && try == 0 {
				at = i // what was not written yet gives an error, and the start is written first
			}
			cipher, plain, err := d.bothSides(m, side, at)
			if h.form.tagged() && errors.Is(err, unix.EILSEQ) {
				continue
			}
			if err != nil {
				return err
			}
			verified = true
			same, err := agrees(at, cipher, plain)
			if err != nil || same {
				return err
			}
		}
	}
	if !verified {
		return fmt.Errorf("%w: %w in %s", ErrNotOurs, errNothingVerifies, m.Name)
	}
	return fmt.Errorf("%w: %s does not decrypt as the header says", ErrNotOurs, m.Name)
}

// second is another mapping of a volume's tags, read-only, with the key of the header that
// the guard knows: of an AEAD, it is the kernel that says whether a key is the right one.
type second struct {
	name, uuid string
	dev        DevNum
}

func proofName(name string) string { return name + "_prf" }

func proofUUID(uuid, name string) string {
	return "KEYAGENT-PROOF-" + strings.ReplaceAll(uuid, "-", "") + "-" + proofName(name)
}

func mapAgain(ctx context.Context, m Mapping, h *Header, side cipherSide, vk *secret.Bytes) (*second, error) {
	if err := removeProof(ctx, m.Name, h.uuid); err != nil {
		return nil, err
	}
	c := creation{
		name: proofName(m.Name), uuid: proofUUID(h.uuid, m.Name), kind: cryptKind, readOnly: true, private: true, bytes: m.Bytes,
		params: cryptParams(h.form, h.form.volumeKeyRef(h.uuid), side.dev, 0, OpenOptions{Workqueues: true}),
	}
	s := &second{name: m.Name, uuid: h.uuid}
	err := kernelCall(ctx, "mapping "+c.name, func() error {
		return withVolumeKey(h.uuid, vk, func() error { return c.create(ctx) })
	}, func() { s.remove(ctx) })
	if err != nil {
		return nil, err
	}
	live, err := inspect(c.name)
	if err == nil {
		s.dev = live.dev
		err = ensureNode(Mapping{Path: mapperPath(c.name), Device: live.dev})
	}
	if err != nil {
		s.remove(ctx)
		return nil, err
	}
	return s, nil
}

func (s *second) agrees(d *disk, sector int64, plain []byte) (same bool, err error) {
	got := aligned()
	defer secret.Wipe(got)
	err = d.do(func() error { return readDirect(mapperPath(proofName(s.name)), s.dev, got, sector*dataSectorSize) })
	if errors.Is(err, unix.EILSEQ) {
		return false, nil
	}
	return err == nil && bytes.Equal(got, plain), err
}

func (s *second) remove(ctx context.Context) {
	_ = removeProof(context.WithoutCancel(ctx), s.name, s.uuid)
}

// removeProof removes what a proof mapped, or left when its process was killed. What
// somebody holds loses its key, at least.
func removeProof(ctx context.Context, name, uuid string) error {
	err := removeBelow(ctx, proofName(name), proofUUID(uuid, name))
	if !errors.Is(err, ErrDeviceBusy) {
		return err
	}
	live, lErr := inspect(proofName(name))
	if lErr != nil {
		return lErr
	}
	sectors, lErr := liveSectors(live, proofName(name))
	if lErr == nil {
		lErr = intoError(ctx, live, proofName(name), sectors)
	}
	if lErr != nil {
		return lErr
	}
	return err
}

// forgetProof makes sure that no proof has the key any more.
func forgetProof(ctx context.Context, name, uuid string) error {
	if err := removeProof(ctx, name, uuid); !errors.Is(err, ErrDeviceBusy) {
		return err
	}
	return nil
}

// errNothingVerifies means that no sector has a tag of the key of its mapping.
var errNothingVerifies = errors.New("no sector verifies")

// cipherSide is where a mapping's ciphertext is read.
type cipherSide struct {
	path   string
	dev    DevNum
	offset int64
}

func (d *disk) cipherSide(m Mapping) (cipherSide, error) {
	if m.Integrity == "" {
		return cipherSide{d.path, d.rdev, dataOffset}, nil
	}
	// Only dm-integrity knows where a sector is, and whether it is in the journal.
	lower, err := inspect(tagsName(m.Name))
	if err != nil {
		return cipherSide{}, err
	}
	path := mapperPath(tagsName(m.Name))
	return cipherSide{path: path, dev: lower.dev}, ensureNode(Mapping{Path: path, Device: lower.dev})
}

// bothSides reads one sector of the volume from the device and from the mapping,
// past the cache: each has one, and what a filesystem wrote last is in one of them.
func (d *disk) bothSides(m Mapping, side cipherSide, sector int64) (cipher, plain []byte, err error) {
	at := sector * dataSectorSize
	// A device that never answers is found out by a read that can be given up. The
	// next one could not be killed.
	if err := d.forget(dataOffset+at, dataSectorSize); err != nil {
		return nil, nil, err
	}
	if err := d.read(make([]byte, dataSectorSize), dataOffset+at); err != nil {
		return nil, nil, err
	}
	raw, mapped := aligned(), aligned()
	err = d.do(func() error {
		if err := readDirect(side.path, side.dev, raw, side.offset+at); err != nil {
			return err
		}
		return readDirect(m.Path, m.Device, mapped, at)
	})
	if err != nil {
		return nil, nil, err
	}
	return raw, mapped, nil
}

// aligned returns one sector of memory as direct reads want it.
func aligned() []byte {
	p := make([]byte, 2*dataSectorSize)
	skip := -uintptr(unsafe.Pointer(&p[0])) & (dataSectorSize - 1)
	return p[skip : skip+dataSectorSize]
}

// readDirect reads from the device itself, if path leads to the device dev.
func readDirect(path string, dev DevNum, p []byte, at int64) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECT|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return &os.PathError{Op: "stat", Path: path, Err: err}
	}
	if got := (DevNum{unix.Major(st.Rdev), unix.Minor(st.Rdev)}); st.Mode&unix.S_IFMT != unix.S_IFBLK || got != dev {
		return fmt.Errorf("%w: %s leads to the device %v, not to %v", ErrNotOurs, path, got, dev)
	}
	n, err := unix.Pread(fd, p, at)
	if err == nil && n != len(p) {
		err = fmt.Errorf("it ends at byte %d", at+int64(n))
	}
	if err != nil {
		return fmt.Errorf("%w: read %s at byte %d: %w", ErrIO, path, at, err)
	}
	return nil
}

// decryptsTo says whether the volume key decrypts a sector of 4096 bytes to plain.
// dm-crypt numbers its initial vectors by sectors of 512 bytes, whatever their size.
func decryptsTo(vk *secret.Bytes, sector uint64, cipher, plain []byte) (same bool, err error) {
	got := make([]byte, len(cipher))
	useErr := vk.Use(func(key []byte) error {
		secret.Do(func() {
			c, cErr := xts.NewCipher(aes.NewCipher, key[:volumeKeySize]) // a MAC's key may follow
			if err = cErr; err == nil {
				c.Decrypt(got, cipher, sector*(dataSectorSize/sectorSize))
				same = bytes.Equal(got, plain)
			}
		})
		return err
	})
	secret.Wipe(got)
	return same, useErr
}
