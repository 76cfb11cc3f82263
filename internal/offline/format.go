package offline

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"encoding/binary"
	"fmt"
	"time"

	"github.com/keyagent/keyagent/attestation/policy"
	"github.com/keyagent/keyagent/internal/keyclient"
	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/kms"
)

// magic begins a file. Another version is another magic.
const magic = "keyagent offline key 1\n"

// maxFile bounds a file in bytes. Those of this version have about 800.
const maxFile = 4096

// lastPCR is the highest register.
const lastPCR = 23

// file is what is kept of one volume. All but the sealed object and the ciphertext is
// authenticated by the latter; the TPM's policy is made of it as well.
type file struct {
	volume   string
	index    uint32   // NV index of the counter
	counter  uint64   // that the counter has while this file is the one that counts
	pcrs     uint32   // bit n: PCR n of the bank SHA-256
	digest   [32]byte // of their values, in ascending order
	lastBoot uint32   // the highest reset count at which it opens
	lastTime uint64   // the highest clock, in ms
	boots    uint32   // in which it was used
	since    uint64   // clock at the first use; 0: none
	written  uint32   // reset count at which it was written
	parent   []byte   // name of the storage key
	public   []byte   // TPM2B_PUBLIC of the sealed object
	private  []byte   // TPM2B_PRIVATE
	sealed   []byte   // ciphertext of the content
}

func lp(to []byte, field []byte) []byte {
	return append(binary.BigEndian.AppendUint32(to, uint32(len(field))), field...)
}

// head is the encoding without the sealed object and the ciphertext.
func (f *file) head() []byte {
	b := lp([]byte(magic), []byte(f.volume))
	b = binary.BigEndian.AppendUint32(b, f.index)
	b = binary.BigEndian.AppendUint64(b, f.counter)
	b = binary.BigEndian.AppendUint32(b, f.pcrs)
	b = append(b, f.digest[:]...)
	b = binary.BigEndian.AppendUint32(b, f.lastBoot)
	b = binary.BigEndian.AppendUint64(b, f.lastTime)
	b = binary.BigEndian.AppendUint32(b, f.boots)
	b = binary.BigEndian.AppendUint64(b, f.since)
	b = binary.BigEndian.AppendUint32(b, f.written)
	return lp(b, f.parent)
}

func (f *file) encode() []byte { return lp(lp(lp(f.head(), f.public), f.private), f.sealed) }

// reader takes fields off a text, and remembers that one was missing.
type reader struct {
	b   []byte
	bad bool
}

func (r *reader) take(n int) []byte {
	if r.bad || n < 0 || n > len(r.b) {
		r.bad = true
		return make([]byte, max(0, min(n, 64)))
	}
	out := r.b[:n:n]
	r.b = r.b[n:]
	return out
}

func (r *reader) u32() uint32 { return binary.BigEndian.Uint32(r.take(4)) }
func (r *reader) u64() uint64 { return binary.BigEndian.Uint64(r.take(8)) }

func (r *reader) lp(least, most int) []byte {
	n := r.u32()
	if n < uint32(least) || n > uint32(most) {
		r.bad = true
		return nil
	}
	return r.take(int(n))
}

// The bounds of parts, in bytes.
const (
	nameSize   = 34 // algorithm and SHA-256
	maxObject  = 1024
	maxContent = 512
	idSize     = 128
	uuidSize   = 36
	leaseSize  = 16
)

// parse decodes a file, of which nothing is known. What it accepts encodes to the same
// bytes.
func parse(data []byte) (*file, error) {
	if len(data) > maxFile {
		return nil, fmt.Errorf("%w: more than %d bytes", ErrFormat, maxFile)
	}
	rest, ok := bytes.CutPrefix(data, []byte(magic))
	if !ok {
		return nil, fmt.Errorf("%w: it does not begin as version 1 does", ErrFormat)
	}
	r := &reader{b: rest}
	f := &file{volume: string(r.lp(1, idSize)), index: r.u32(), counter: r.u64(), pcrs: r.u32()}
	copy(f.digest[:], r.take(len(f.digest)))
	f.lastBoot, f.lastTime, f.boots, f.since, f.written = r.u32(), r.u64(), r.u32(), r.u64(), r.u32()
	f.parent, f.public, f.private, f.sealed = r.lp(nameSize, nameSize), r.lp(1, maxObject), r.lp(1, maxObject), r.lp(1, maxContent)
	switch {
	case r.bad || len(r.b) > 0:
		return nil, fmt.Errorf("%w: it is cut off, or something is behind it", ErrFormat)
	case !policy.ValidVolume(f.volume), f.index < firstIndex || f.index >= firstIndex+indices, f.pcrs == 0 || f.pcrs >= 1<<(lastPCR+1):
		return nil, fmt.Errorf("%w: volume, index or registers", ErrFormat)
	}
	return f, nil
}

// content is the plaintext: what opening a volume needs. The caller closes it.
func content(k *keyclient.Key) (*secret.Bytes, error) {
	if k.DEK.Len() > kms.MaxLength || len(k.UUID) > uuidSize || k.Lease == nil || len(k.Lease.ID) != leaseSize {
		return nil, fmt.Errorf("%w: the key of volume %q", ErrFormat, k.Volume)
	}
	var b []byte
	b = lp(b, []byte(k.UUID))
	b = binary.BigEndian.AppendUint64(b, k.Generation)
	b = binary.BigEndian.AppendUint32(b, k.KeyVersion)
	for _, m := range [][32]byte{k.MACs.Header, k.MACs.Copies[0], k.MACs.Copies[1]} {
		b = append(b, m[:]...)
	}
	b = append(b, k.Lease.ID...)
	b = binary.BigEndian.AppendUint64(b, uint64(k.Lease.Term))
	out, err := secret.New(4 + k.DEK.Len() + len(b))
	if err != nil {
		return nil, err
	}
	return out, k.DEK.Use(func(dek []byte) error {
		return out.Use(func(p []byte) error {
			binary.BigEndian.PutUint32(p, uint32(len(dek)))
			copy(p[4:], dek)
			copy(p[4+len(dek):], b)
			return nil
		})
	})
}

// keyOf reads the plaintext. Its lease has no end, and no time was renewed for it.
func keyOf(volume string, plain []byte) (k *keyclient.Key, err error) {
	r := &reader{b: plain}
	dek := r.lp(kms.MinLength, kms.MaxLength)
	k = &keyclient.Key{Volume: volume, State: keyclient.Active, Writers: keyclient.WritersOne,
		UUID: string(r.lp(uuidSize, uuidSize)), Generation: r.u64(), KeyVersion: r.u32()}
	for _, m := range []*[32]byte{&k.MACs.Header, &k.MACs.Copies[0], &k.MACs.Copies[1]} {
		copy(m[:], r.take(len(m)))
	}
	k.Lease = &keyclient.Lease{ID: bytes.Clone(r.take(leaseSize)), Term: time.Duration(r.u64())}
	if r.bad || len(r.b) > 0 || k.Lease.Term <= 0 || k.MACs.Header == [32]byte{} {
		return nil, fmt.Errorf("%w: its content", ErrFormat)
	}
	// A copy of what the caller wipes.
	k.DEK, err = secret.From(bytes.Clone(dek))
	return k, err
}

// aead is AES-256-GCM under a key that seals one message in its life: its nonce is zeros.
func aead(key []byte) (cipher.AEAD, []byte, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, nil, err
	}
	a, err := cipher.NewGCM(block)
	if err != nil {
		return nil, nil, err
	}
	return a, make([]byte, a.NonceSize()), nil
}

// seal sets the ciphertext of what the head describes.
func (f *file) seal(key, plain []byte) error {
	a, nonce, err := aead(key)
	if err == nil {
		f.sealed = a.Seal(nil, nonce, plain, f.head())
	}
	return err
}

// open decrypts into a key that the caller closes.
func (f *file) open(key []byte) (*keyclient.Key, error) {
	a, nonce, err := aead(key)
	if err != nil {
		return nil, err
	}
	if len(f.sealed) <= a.Overhead() {
		return nil, fmt.Errorf("%w: no content", ErrFormat)
	}
	plain, err := secret.New(len(f.sealed) - a.Overhead())
	if err != nil {
		return nil, err
	}
	defer plain.Close()
	var k *keyclient.Key
	err = plain.Use(func(p []byte) error {
		if _, err := a.Open(p[:0], nonce, f.sealed, f.head()); err != nil {
			return fmt.Errorf("%w: it does not decrypt: %w", ErrFormat, err)
		}
		var err error
		k, err = keyOf(f.volume, p)
		return err
	})
	return k, err
}
