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

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/tpm"
)

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

// measure extends digests one after the other.
func measure(digests ...[]byte) []byte {
	v := make([]byte, 32)
	for _, d := range digests {
		v = tpm.Extend(v, d)
	}
	return v
}

// words are the digests of texts.
func words(texts ...string) (out [][]byte) {
	for _, w := range texts {
		sum := sha256.Sum256([]byte(w))
		out = append(out, sum[:])
	}
	return out
}

func stub(version string) string { return "#### LoaderInfo: systemd-stub " + version + " ####" }

func parsed(t *testing.T, raw []byte) *Image {
	t.Helper()
	img, err := Parse(raw)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func loader(t *testing.T, raw []byte) *Loader {
	t.Helper()
	l, err := ParseLoader(raw)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func shim(version string) []byte {
	return image(nil, section{".sbat", []byte("sbat,1,2021030218\nshim,4,UEFI shim\n")}, section{".data.id", []byte("$Version: " + version + " $")})
}

func grub(version string) []byte {
	return image(nil, section{".sbat", []byte("sbat,1,SBAT Version\ngrub,5,Free Software Foundation,grub," + version + ",https://x/\ngrub.debian,5,Debian,grub2," + version + "-1,https://x/\n")})
}

func systemdBoot(version string) []byte {
	return image(nil, section{".sdmagic", []byte("#### LoaderInfo: systemd-boot " + version + " ####")})
}

func linux() []byte {
	k := image(nil, section{".text", []byte("a kernel")})
	copy(k[0x202:], "HdrS")
	return k
}

// Each case is what boots of these versions measured; docs/platforms/boot-chains.md
// has the list.
func TestPCR4IsWhatIsStartedInItsOrder(t *testing.T) {
	kernel := withoutChecksum(kernel())
	for _, tt := range []struct {
		name    string
		loaders [][]byte
		stub    string
		secure  bool
		inner   bool  // the kernel in the image is measured
		err     error // nil: a value
	}{
		{name: "stub 252", stub: "252.39-1~deb12u2", inner: true},
		{name: "stub 257", stub: "257.13-1~deb13u1", inner: true},
		{name: "stub 257 under Secure Boot", stub: "257.13-1~deb13u1", secure: true},
		{name: "stub 258 starts the kernel itself", stub: "258-1"},
		{name: "stub 262", stub: "262.1-1"},
		{name: "stub 262 under Secure Boot", stub: "262.1-1", secure: true},
		{name: "systemd-boot before it", loaders: [][]byte{systemdBoot("252.39-1~deb12u2")}, stub: "252.39-1~deb12u2", inner: true},
		{name: "shim and systemd-boot", loaders: [][]byte{shim("16.1"), systemdBoot("262.1-1")}, stub: "262.1-1", secure: true},
		{name: "shim without Secure Boot", loaders: [][]byte{shim("15.8")}, stub: "262.1-1"},
		{name: "shim with an older stub", loaders: [][]byte{shim("16.1")}, stub: "257.13", inner: true},
		{name: "shim 16.1 takes the kernel for a part of what it verified", loaders: [][]byte{shim("16.1")}, stub: "257.13", secure: true},
		{name: "an older shim under Secure Boot", loaders: [][]byte{shim("15.8")}, stub: "262.1-1", secure: true, err: ErrNotModelled},
		{name: "shim behind systemd-boot", loaders: [][]byte{systemdBoot("262.1-1"), shim("16.1")}, stub: "262.1-1", err: ErrNotModelled},
	} {
		t.Run(tt.name, func(t *testing.T) {
			raw := unified(stub(tt.stub), "quiet")
			b := Boot{Image: parsed(t, raw), SecureBoot: tt.secure}
			digests := words("Calling EFI Application from Boot Option", "\x00\x00\x00\x00")
			for _, l := range tt.loaders {
				b.Loaders = append(b.Loaders, loader(t, l))
				digests = append(digests, withoutChecksum(l))
			}
			digests = append(digests, withoutChecksum(raw))
			if tt.inner {
				digests = append(digests, kernel)
			}
			p, err := b.PCR4()
			if !errors.Is(err, tt.err) {
				t.Fatal(err)
			}
			if err == nil && (!bytes.Equal(p.Value, measure(digests...)) || len(p.Events) != len(digests)) {
				t.Fatalf("%x, %d events, want %x", p.Value, len(p.Events), measure(digests...))
			}
		})
	}
}

func TestPCR4OfAKernelThatALoaderStarts(t *testing.T) {
	start := words("Calling EFI Application from Boot Option", "\x00\x00\x00\x00")
	foreign := image(nil, section{".sbat", []byte("grub,5,Free Software Foundation,grub,2.14,https://x/\ngrub.other,1,Other,grub2,2.14-1,https://x/\n")})
	for _, tt := range []struct {
		name   string
		chain  [][]byte
		secure bool
		kernel int // how often the kernel is measured
		err    error
	}{
		{"shim, GRUB and a kernel", [][]byte{shim("16.1"), grub("2.14"), linux()}, false, 1, nil},
		{"shim, GRUB and a kernel under Secure Boot", [][]byte{shim("16.1"), grub("2.14"), linux()}, true, 1, nil},
		{"GRUB of trixie", [][]byte{shim("16.1"), grub("2.12"), linux()}, false, 0, nil},
		{"GRUB of trixie under Secure Boot", [][]byte{shim("16.1"), grub("2.12"), linux()}, true, 1, nil},
		{"GRUB of bookworm", [][]byte{shim("16.1"), grub("2.06"), linux()}, false, 0, nil},
		{"GRUB of bookworm under Secure Boot", [][]byte{shim("16.1"), grub("2.06"), linux()}, true, 2, nil},
		{"systemd-boot and a kernel", [][]byte{systemdBoot("262.1-1"), linux()}, false, 1, nil},
		{"GRUB of another distribution", [][]byte{shim("16.1"), foreign, linux()}, false, 0, ErrNotModelled},
		{"GRUB of another version", [][]byte{shim("16.1"), grub("2.13"), linux()}, false, 0, ErrNotModelled},
		{"GRUB without shim", [][]byte{grub("2.14"), linux()}, false, 0, ErrNotModelled},
		{"an old shim under Secure Boot", [][]byte{shim("15.8"), grub("2.14"), linux()}, true, 0, ErrNotModelled},
		{"a loader that starts nothing", [][]byte{shim("16.1"), grub("2.14")}, false, 0, ErrNotModelled},
		{"a kernel that starts a kernel", [][]byte{linux(), linux()}, false, 0, ErrNotModelled},
		{"nothing", nil, false, 0, ErrNotModelled},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b, digests := Boot{SecureBoot: tt.secure}, slices.Clone(start)
			for n, raw := range tt.chain {
				b.Loaders = append(b.Loaders, loader(t, raw))
				times := 1
				if n == len(tt.chain)-1 {
					times = tt.kernel
				}
				for range times {
					digests = append(digests, withoutChecksum(raw))
				}
			}
			p, err := b.PCR4()
			if !errors.Is(err, tt.err) || (err == nil && !bytes.Equal(p.Value, measure(digests...))) {
				t.Fatalf("%x, %v", p.Value, err)
			}
			if _, err := b.PCR12(); !errors.Is(err, ErrNotModelled) {
				t.Errorf("a command line that no image has: %v", err)
			}
		})
	}
}

func TestWhoMeasuresSMBIOSTablesSaysSoInItsCode(t *testing.T) {
	name := section{".rodata", append([]byte("other constants"), smbiosEvent...)}
	withStub := func(more ...section) *Image {
		return parsed(t, image(nil, append([]section{{".sdmagic", []byte(stub("262-1"))}, {".sbat", []byte("sbat")}, {".linux", kernel()}}, more...)...))
	}
	boot262 := loader(t, image(nil, name, section{".sdmagic", []byte("#### LoaderInfo: systemd-boot 262-1 ####")}))
	for _, tt := range []struct {
		what string
		boot Boot
		want bool
	}{
		{"a stub that does", Boot{Image: withStub(name)}, true},
		{"a stub that does not", Boot{Image: withStub()}, false},
		{"an initrd with such a program in it", Boot{Image: withStub(section{".initrd", smbiosEvent})}, false},
		{"a loader that does, before a stub that does not", Boot{Loaders: []*Loader{boot262}, Image: withStub()}, true},
		{"loaders that do not", Boot{Loaders: []*Loader{loader(t, systemdBoot("257.1")), loader(t, linux())}}, false},
	} {
		if got := tt.boot.MeasuresSMBIOS(); got != tt.want {
			t.Errorf("%s: %v", tt.what, got)
		}
	}
}

func TestPCR12IsTheCommandLineOfAnOldSystemdBoot(t *testing.T) {
	line := words("q\x00u\x00i\x00e\x00t\x00\x00\x00")[0]
	for _, tt := range []struct {
		name   string
		loader []byte
		stub   string
		secure bool
		want   [][]byte
		err    error
	}{
		{"no loader", nil, "252.39", false, nil, nil},
		{"systemd-boot 252 and its stub", systemdBoot("252.39"), "252.39", false, [][]byte{line, line}, nil},
		{"systemd-boot 252 under Secure Boot", systemdBoot("252.39"), "252.39", true, [][]byte{line}, nil},
		{"systemd-boot 262", systemdBoot("262.1"), "252.39", false, nil, nil},
		{"between", systemdBoot("255.4"), "255.4", false, nil, ErrNotModelled},
		{"systemd-boot 252 and a new stub", systemdBoot("252.39"), "262.1", false, [][]byte{line, line}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := Boot{Image: parsed(t, unified(stub(tt.stub), "quiet")), SecureBoot: tt.secure}
			if tt.loader != nil {
				b.Loaders = []*Loader{loader(t, tt.loader)}
			}
			p, err := b.PCR12()
			if !errors.Is(err, tt.err) || (err == nil && !bytes.Equal(p.Value, measure(tt.want...))) {
				t.Fatalf("%x, %v", p.Value, err)
			}
		})
	}
}

// What systemd-boot 262 and its stub measured of the second profile.
func TestPCR12NamesAProfileThatIsNotTheFirst(t *testing.T) {
	raw := image(nil, section{".sdmagic", []byte(stub("262.1"))}, section{".linux", kernel()},
		section{".profile", []byte("ID=main\n")}, section{".profile", []byte("ID=two\n")})
	b := Boot{Image: parsed(t, raw), Profile: 1}
	if _, err := b.PCR12(); !errors.Is(err, ErrNotModelled) {
		t.Errorf("without systemd-boot: %v", err)
	}
	b.Loaders = []*Loader{loader(t, systemdBoot("262.1"))}
	p, err := b.PCR12()
	if want := measure(words("@\x001\x00\x00\x00", "1\x00\x00\x00")...); err != nil || !bytes.Equal(p.Value, want) {
		t.Fatalf("%x, want %x, %v", p.Value, want, err)
	}
	b.Profile = 0
	if p, err = b.PCR12(); err != nil || len(p.Events) > 0 {
		t.Fatalf("the first profile: %v, %v", p.Events, err)
	}
}

func TestPCR11IsNamesAndContentsInTheStubsOrder(t *testing.T) {
	common := []string{".linux\x00", string(kernel()), ".osrel\x00", "ID=test\n", ".cmdline\x00", "quiet"}
	for _, tt := range []struct {
		name   string
		stub   string
		phases []string
		want   []string
	}{
		{"a stub of 252, which leaves out .sbat", stub("252.39-1"), nil, nil},
		{"with boot phases", stub("252.39-1"), []string{"sysinit", "ready"}, []string{"sysinit", "ready"}},
		{"a stub of 255", stub("255"), nil, []string{".sbat\x00", "sbat"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			all, err := parsed(t, unified(tt.stub, "quiet")).PCR11(0)
			if err != nil || len(all) != 1 {
				t.Fatal(all, err)
			}
			p := all[0]
			p.Words(tt.phases...)
			if want := measure(words(append(slices.Clone(common), tt.want...)...)...); !bytes.Equal(p.Value, want) {
				t.Errorf("got %x, want %x", p.Value, want)
			}
			var digests [][]byte
			for _, e := range p.Events {
				d, err := hex.DecodeString(e.Digest)
				if err != nil {
					t.Fatal(err)
				}
				digests = append(digests, d)
			}
			if !bytes.Equal(measure(digests...), p.Value) {
				t.Error("the events do not lead to the value")
			}
		})
	}
}

// The sections as boots of stubs 257.13 and 262.1 measured them: .hwids counts,
// what no hardware chose does not, and a profile's own sections stand for the
// common ones.
func TestPCR11OfProfilesAndChoices(t *testing.T) {
	raw := image(nil, section{".sdmagic", []byte(stub("262.1-1"))}, section{".linux", kernel()}, section{".cmdline", []byte("quiet")},
		section{".hwids", []byte("ids")}, section{".dtbauto", []byte("one")}, section{".dtbauto", []byte("two")}, section{".efifw", []byte("firmware")},
		section{".profile", []byte("ID=main\n")}, section{".profile", []byte("ID=two\n")}, section{".cmdline", []byte("debug")}, section{".initrd", []byte("small")})
	img := parsed(t, raw)
	if got := img.Profiles(); !slices.Equal(got, []string{"ID=main\n", "ID=two\n"}) {
		t.Fatal(got)
	}
	head := []string{".linux\x00", string(kernel())}
	tail := []string{".hwids\x00", "ids"}
	first := slices.Concat(head, []string{".cmdline\x00", "quiet", ".profile\x00", "ID=main\n"})
	second := slices.Concat(head, []string{".cmdline\x00", "debug", ".initrd\x00", "small", ".profile\x00", "ID=two\n"})
	for profile, list := range [][]string{first, second} {
		var want [][]byte
		for _, fw := range [][]string{nil, {".efifw\x00", "firmware"}} {
			for _, dt := range [][]string{nil, {".dtbauto\x00", "one"}, {".dtbauto\x00", "two"}} {
				want = append(want, measure(words(slices.Concat(list, dt, tail, fw)...)...))
			}
		}
		all, err := img.PCR11(profile)
		if err != nil || len(all) != len(want) {
			t.Fatalf("profile %d: %d values, %v", profile, len(all), err)
		}
		for n, p := range all {
			if !bytes.Equal(p.Value, want[n]) {
				t.Errorf("profile %d, choice %d: %x, want %x", profile, n, p.Value, want[n])
			}
		}
	}
	for _, n := range []int{-1, 2} {
		if _, err := img.PCR11(n); !errors.Is(err, ErrNotUKI) {
			t.Errorf("profile %d: %v", n, err)
		}
	}
	if line := img.CommandLine(1); line != "debug" {
		t.Error(line)
	}
}

// What is not known is an error, and never a value without it.
func TestWhatIsNotModelledIsRefused(t *testing.T) {
	with := func(magic string, more ...section) []byte {
		return image(nil, append([]section{{".sdmagic", []byte(magic)}, {".linux", kernel()}}, more...)...)
	}
	for name, raw := range map[string][]byte{
		"a section of the future":           with(stub("262.1"), section{".future", []byte("x")}),
		"a section of the future, behind":   with(stub("262.1"), section{".profile", []byte("x")}, section{".future", []byte("x")}),
		"a profile that the stub knows not": with(stub("256.1"), section{".profile", []byte("x")}),
		"a stub of the future":              with(stub("263")),
		"a stub of the past":                with(stub("251.4")),
		"a version that was under way":      with(stub("258~rc1")),
		"a stub without a version":          with(stub("x")),
		"another stub":                      with("#### LoaderInfo: other-stub 262 ####"),
	} {
		if _, err := Parse(raw); !errors.Is(err, ErrNotModelled) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := Parse(with(stub("262.1"), section{"custom", []byte("x")}, section{".note.gn", []byte("x")}, section{".pcrsig", []byte("{}")})); err != nil {
		t.Errorf("sections that no stub measures: %v", err)
	}
	for name, raw := range map[string][]byte{
		"an image with a kernel in it": unified(magic, "quiet"),
		"another program":              image(nil, section{".text", []byte("x")}),
		"no program":                   []byte("text"),
		"shim without a version":       image(nil, section{".sbat", []byte("shim,4\n")}),
	} {
		if _, err := ParseLoader(raw); !errors.Is(err, ErrNotModelled) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestOneWordMoreChangesBothRegisters(t *testing.T) {
	var pcr4, pcr11 [][]byte
	for _, line := range []string{"quiet", "quiet debug"} {
		img := parsed(t, unified(magic, line))
		four, err := (&Boot{Image: img}).PCR4()
		if err != nil {
			t.Fatal(err)
		}
		eleven, err := img.PCR11(0)
		if err != nil {
			t.Fatal(err)
		}
		pcr4, pcr11 = append(pcr4, four.Value), append(pcr11, eleven[0].Value)
		if n := slices.IndexFunc(eleven[0].Events, func(e attestation.Event) bool { return e.Detail == line }); n < 0 {
			t.Errorf("the command line's text is not kept: %+v", eleven[0].Events)
		}
	}
	if bytes.Equal(pcr4[0], pcr4[1]) || bytes.Equal(pcr11[0], pcr11[1]) {
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
	f.Add(shim("16.1"))
	f.Add(image(nil, section{".sdmagic", []byte(stub("262"))}, section{".linux", kernel()}, section{".profile", []byte("a")}, section{".dtbauto", []byte("b")}))
	f.Fuzz(func(t *testing.T, data []byte) {
		if l, err := ParseLoader(data); err != nil {
			if !errors.Is(err, ErrNotModelled) {
				t.Fatal(err)
			}
		} else if len(l.digest) != 32 {
			t.Fatal("a loader without a digest")
		}
		img, err := Parse(data)
		if err != nil {
			if !errors.Is(err, ErrNotUKI) && !errors.Is(err, ErrNotModelled) {
				t.Fatal(err)
			}
			return
		}
		four, err := (&Boot{Image: img}).PCR4()
		if err != nil || len(four.Value) != 32 {
			t.Fatal("a register of another size", err)
		}
		for n := range max(len(img.Profiles()), 1) {
			all, err := img.PCR11(n)
			if err != nil || len(all) == 0 || len(all) > maxVariants {
				t.Fatal(len(all), err)
			}
		}
	})
}
