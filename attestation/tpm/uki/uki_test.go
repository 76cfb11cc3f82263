package uki

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/keyagent/keyagent/attestation/tpm"
)

// section of a small EFI image.
type section struct {
	name string
	data []byte
}

// image builds a 64-bit EFI image with nothing in it but sections. Behind them
// come trailing bytes that belong to no section.
func image(trailing []byte, sections ...section) []byte {
	const headers = 1024
	le := binary.LittleEndian
	b := make([]byte, headers)
	copy(b, "MZ")
	le.PutUint32(b[0x3c:], 64)
	copy(b[64:], "PE\x00\x00")
	coff := b[68:]
	le.PutUint16(coff[0:], 0x8664)
	le.PutUint16(coff[2:], uint16(len(sections)))
	le.PutUint16(coff[16:], 240) // of the optional header
	opt := b[88:]
	le.PutUint16(opt[0:], 0x20b)
	le.PutUint32(opt[60:], headers)
	le.PutUint32(opt[64:], 0x12345678) // the checksum, which is not hashed
	le.PutUint32(opt[108:], 16)
	for i, s := range sections {
		h := b[88+240+i*40:]
		copy(h[0:8], s.name)
		raw := slices.Concat(s.data, make([]byte, (512-len(s.data)%512)%512))
		le.PutUint32(h[8:], uint32(len(s.data))) // virtual size
		le.PutUint32(h[12:], uint32(0x1000*(i+1)))
		le.PutUint32(h[16:], uint32(len(raw)))
		le.PutUint32(h[20:], uint32(len(b)))
		b = append(b, raw...)
	}
	return append(b, trailing...)
}

const magic = "#### LoaderInfo: systemd-stub 252.39-1 ####"

func kernel() []byte { return image(nil, section{".text", []byte("a kernel")}) }

func unified(stub, command string) []byte {
	return image([]byte("odd"), section{".sdmagic", []byte(stub)}, section{".sbat", []byte("sbat")},
		section{".osrel", []byte("ID=test\n")}, section{".cmdline", []byte(command)}, section{".linux", kernel()})
}

// withoutChecksum is what Authenticode hashes of an image that is not signed.
func withoutChecksum(img []byte) []byte {
	entry := 88 + 112 + 4*8 // of the certificate table
	h := sha256.New()
	h.Write(img[:88+64])
	h.Write(img[88+68 : entry])
	h.Write(img[entry+8:])
	return h.Sum(nil)
}

func TestAuthenticodeIsWhatTheFirmwareHashes(t *testing.T) {
	img := unified(magic, "quiet")
	got, err := authenticodeDigest(img)
	if err != nil || !bytes.Equal(got, withoutChecksum(img)) {
		t.Fatalf("%x, %v", got, err)
	}
	signed := slices.Clone(img)
	binary.LittleEndian.PutUint32(signed[88+64:], 0xffffffff)
	entry := signed[88+112+4*8:]
	binary.LittleEndian.PutUint32(entry[0:], uint32(len(img)))
	binary.LittleEndian.PutUint32(entry[4:], 16)
	signed = append(signed, make([]byte, 16)...)
	if again, err := authenticodeDigest(signed); err != nil || !bytes.Equal(again, got) {
		t.Errorf("a signature and the checksum change the digest: %x, %v", again, err)
	}
}

func TestPCR4IsTheImageAndItsKernel(t *testing.T) {
	raw := unified(magic, "quiet")
	img, err := Parse(raw)
	if err != nil {
		t.Fatal(err)
	}
	action := sha256.Sum256([]byte("Calling EFI Application from Boot Option"))
	separator := sha256.Sum256([]byte{0, 0, 0, 0})
	want := make([]byte, 32)
	for _, d := range [][]byte{action[:], separator[:], withoutChecksum(raw), withoutChecksum(kernel())} {
		want = tpm.Extend(want, d)
	}
	if p := img.PCR4(); !bytes.Equal(p.Value, want) || len(p.Events) != 4 {
		t.Fatalf("%x, %d events", p.Value, len(p.Events))
	}
}

func TestPCR11IsNamesAndContentsInTheStubsOrder(t *testing.T) {
	measure := func(words ...string) []byte {
		v := make([]byte, 32)
		for _, w := range words {
			d := sha256.Sum256([]byte(w))
			v = tpm.Extend(v, d[:])
		}
		return v
	}
	sections := []string{".linux\x00", string(kernel()), ".osrel\x00", "ID=test\n", ".cmdline\x00", "quiet"}
	for _, tt := range []struct {
		name   string
		stub   string
		phases []string
		want   []byte
	}{
		{"a stub of 252, which leaves out .sbat", magic, nil, measure(sections...)},
		{"with boot phases", magic, []string{"sysinit", "ready"}, measure(append(slices.Clone(sections), "sysinit", "ready")...)},
		{"a stub of 255", "#### LoaderInfo: systemd-stub 255 ####", nil, measure(append(slices.Clone(sections), ".sbat\x00", "sbat")...)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			img, err := Parse(unified(tt.stub, "quiet"))
			if err != nil {
				t.Fatal(err)
			}
			p := img.PCR11(tt.phases...)
			if !bytes.Equal(p.Value, tt.want) {
				t.Errorf("got %x, want %x", p.Value, tt.want)
			}
			replayed := make([]byte, 32)
			for _, e := range p.Events {
				d, err := hex.DecodeString(e.Digest)
				if err != nil {
					t.Fatal(err)
				}
				replayed = tpm.Extend(replayed, d)
			}
			if !bytes.Equal(replayed, p.Value) {
				t.Error("the events do not lead to the value")
			}
		})
	}
}

func TestOneWordMoreChangesBothRegisters(t *testing.T) {
	a, err := Parse(unified(magic, "quiet"))
	if err != nil {
		t.Fatal(err)
	}
	b, err := Parse(unified(magic, "quiet debug"))
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Equal(a.PCR4().Value, b.PCR4().Value) || bytes.Equal(a.PCR11().Value, b.PCR11().Value) {
		t.Fatal("a register stays the same")
	}
}

func TestWhatIsNoUKIIsRefused(t *testing.T) {
	whole := unified(magic, "quiet")
	for name, data := range map[string][]byte{
		"nothing":           nil,
		"text":              []byte("a text file"),
		"a kernel alone":    kernel(),
		"cut in a section":  whole[:len(whole)-600],
		"cut in the header": whole[:200],
		"two command lines": image(nil, section{".sdmagic", []byte(magic)}, section{".linux", kernel()}, section{".cmdline", nil}, section{".cmdline", nil}),
		"a kernel that is none": image(nil, section{".sdmagic", []byte(magic)},
			section{".linux", []byte("no EFI image")}),
	} {
		if _, err := Parse(data); !errors.Is(err, ErrNotUKI) {
			t.Errorf("%s: %v", name, err)
		}
	}
	path := filepath.Join(t.TempDir(), "x")
	if err := os.WriteFile(path, []byte("text"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(path); !errors.Is(err, ErrNotUKI) {
		t.Error(err)
	}
}

func FuzzImage(f *testing.F) {
	f.Add(unified(magic, "quiet"))
	f.Add(kernel())
	f.Fuzz(func(t *testing.T, data []byte) {
		img, err := Parse(data)
		if err != nil {
			if !errors.Is(err, ErrNotUKI) {
				t.Fatal(err)
			}
			return
		}
		if len(img.PCR4().Value) != 32 || len(img.PCR11().Value) != 32 {
			t.Fatal("a register of another size")
		}
	})
}
