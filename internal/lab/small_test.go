package lab

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// measured are the PCRs that must be the same in every boot of one image.
var measured = []int{0, 1, 2, 3, 4, 5, 6, 7, 9, 11}

func TestMain(m *testing.M) {
	if err := Check(); err != nil {
		os.Stderr.WriteString(err.Error() + "\n")
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// parts is what the boots of one test have in common.
type parts struct {
	dir    string
	cache  *Cache
	kernel *Kernel
	tpm    *TPM
}

func makeParts(t *testing.T) *parts {
	t.Helper()
	p := &parts{dir: t.TempDir()}
	var err error
	if p.cache, err = OpenCache(""); err != nil {
		t.Fatal(err)
	}
	if p.kernel, err = p.cache.Kernel(t.Context()); err != nil {
		t.Fatal(err)
	}
	ca, err := NewCA(p.path("ca"), "bed test")
	if err != nil {
		t.Fatal(err)
	}
	if p.tpm, err = ca.NewTPM(t.Context(), p.path("tpm"), TPMOptions{}); err != nil {
		t.Fatal(err)
	}
	return p
}

func (p *parts) path(name string) string { return filepath.Join(p.dir, name) }

// esp makes the disk that a guest starts from.
func (p *parts) esp(t *testing.T, initrd, command string) string {
	t.Helper()
	uki, esp := p.path("uki.efi"), p.path("esp.img")
	if err := (UKI{Kernel: p.kernel, Initrd: initrd, Command: command}).Build(t.Context(), uki); err != nil {
		t.Fatal(err)
	}
	if err := BuildESP(t.Context(), uki, esp); err != nil {
		t.Fatal(err)
	}
	return esp
}

func (p *parts) boot(t *testing.T, opts Options) *Guest {
	t.Helper()
	opts.TPM = p.tpm
	opts.Console = func(l Line) {
		if !strings.Contains(l.Text, "KEYAGENT-DATA") {
			t.Logf("%7.3fs %s", l.At.Seconds(), l.Text)
		}
	}
	g, err := Boot(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { g.Close() })
	return g
}

func wantStatus(t *testing.T, g *Guest, want int) {
	t.Helper()
	if got, err := g.Wait(t.Context()); err != nil || got != want {
		t.Fatalf("the guest ended with %d, %v; want %d", got, err, want)
	}
}

func samePCRs(t *testing.T, first, second *Guest) {
	t.Helper()
	a, b := first.PCRs(), second.PCRs()
	for _, i := range measured {
		if a[i] == "" || a[i] != b[i] {
			t.Errorf("PCR %d: %q in one boot, %q in another", i, a[i], b[i])
		}
	}
}

// listen serves each connection with one message, and counts the connections.
func listen(t *testing.T, message string) (address string, served <-chan string) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	got := make(chan string, 16)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			conn.SetDeadline(time.Now().Add(10 * time.Second))
			line := make([]byte, 64)
			n, _ := conn.Read(line)
			conn.Write([]byte(message))
			conn.Close()
			got <- strings.TrimSpace(string(line[:n]))
		}
	}()
	t.Cleanup(func() { listener.Close(); <-ended })
	return listener.Addr().String(), got
}

// The planted pattern comes over the network and not in the image, so that the
// search cannot find the image instead. Its encoding is on the wire, it itself
// only in the guest.
const smallScript = `
pcrs
eventlog
cat /proc/cmdline
cat /proc/meminfo | head -n 1
disk=/dev/disk/by-id/virtio-data
head -c 13 $disk; echo
echo first | nc 10.0.2.101 8443 | base64 -d >/tmp/planted
echo second | nc 10.0.2.101 8443 >/dev/null
echo third | nc 10.0.2.102 443
wc -c /tmp/planted
await planted
options="-q --disable-locks --type luks2 --key-file /tmp/planted"
cryptsetup luksFormat $options --pbkdf pbkdf2 --pbkdf-force-iterations 1000 $disk &&
	mark formatted &&
	cryptsetup open $options $disk data &&
	mark opened &&
	/sbin/mke2fs -q -t ext4 /dev/mapper/data &&
	mount -t ext4 /dev/mapper/data /mnt &&
	mark mounted &&
	echo "an encrypted file system" >/mnt/file &&
	cat /mnt/file &&
	umount /mnt &&
	cryptsetup close data &&
	exit 7
`

func TestSmallGuestBoots(t *testing.T) {
	p := makeParts(t)
	initrd := p.path("initrd")
	cryptsetup, err := tool("cryptsetup")
	if err != nil {
		t.Fatal(err)
	}
	if err := (Initramfs{
		Kernel:   p.kernel,
		Programs: []File{{Path: "/sbin/cryptsetup", Source: cryptsetup}},
		Script:   smallScript,
	}).Build(t.Context(), initrd); err != nil {
		t.Fatal(err)
	}
	esp := p.esp(t, initrd, CommandLine("extra.word=1"))
	disk := make([]byte, 32<<20)
	copy(disk, "from the host")
	if err := os.WriteFile(p.path("data"), disk, 0o600); err != nil {
		t.Fatal(err)
	}
	pattern := make([]byte, 48)
	rand.Read(pattern)
	first, served := listen(t, base64.StdEncoding.EncodeToString(pattern))
	second, alsoServed := listen(t, "hello from the second port\n")
	opts := Options{
		ESP: esp, Data: p.path("data"),
		Forward: []Forward{{Guest: "10.0.2.101:8443", Host: first}, {Guest: "10.0.2.102:443", Host: second}},
	}

	one := p.boot(t, opts)
	if _, err := one.WaitMark(t.Context(), "planted"); err != nil {
		t.Fatal(err)
	}
	dump := p.path("dump")
	if err := one.DumpMemory(t.Context(), dump); err != nil {
		t.Fatal(err)
	}
	if n, err := SearchFile(dump, pattern); err != nil || n == 0 {
		t.Errorf("the planted pattern is %d times in the memory dump, %v", n, err)
	}
	pattern[0] ^= 1
	if n, err := SearchFile(dump, pattern); err != nil || n != 0 {
		t.Errorf("a pattern that was never planted is %d times in the memory dump, %v", n, err)
	}
	pattern[0] ^= 1
	if err := one.Continue(); err != nil {
		t.Fatal(err)
	}
	wantStatus(t, one, 7)
	for _, want := range []string{"from the host", "extra.word=1", "hello from the second port", "48 /tmp/planted", "an encrypted file system"} {
		if _, err := one.WaitLine(t.Context(), want); err != nil {
			t.Error(err)
		}
	}
	if a, b, c := <-served, <-served, <-alsoServed; a != "first" || b != "second" || c != "third" {
		t.Errorf("the host got %q, %q and %q", a, b, c)
	}
	if log, err := one.Section("eventlog"); err != nil || !bytes.Contains(log, []byte("Spec ID Event03")) {
		t.Errorf("event log of %d bytes, %v", len(log), err)
	}
	if marks := one.Marks(); len(marks) < 3 || marks[0].Name != "userspace" || marks[1].Name != "devices" {
		t.Errorf("milestones: %+v", marks)
	}
	// The second copy of the LUKS2 header, and nothing of what is inside.
	for text, want := range map[string]int{"SKUL\xba\xbe": 1, "an encrypted file system": 0} {
		if n, err := SearchFile(p.path("data"), []byte(text)); err != nil || n != want {
			t.Errorf("%q is %d times on the guest's disk, %v; want %d", text, n, err, want)
		}
	}

	two := p.boot(t, opts)
	if _, err := two.WaitMark(t.Context(), "planted"); err != nil {
		t.Fatal(err)
	}
	if err := two.Continue(); err != nil {
		t.Fatal(err)
	}
	wantStatus(t, two, 7)
	samePCRs(t, one, two)
}

func TestBuildsAreReproducible(t *testing.T) {
	p := makeParts(t)
	build := func(name string) []byte {
		dir := t.TempDir()
		initrd, uki := filepath.Join(dir, "initrd"), filepath.Join(dir, "uki")
		files := []File{{Path: "/etc/keyagent/config.yaml", Data: []byte("a: 1\n")}}
		if err := (Initramfs{Kernel: p.kernel, Files: files, Script: "true"}).Build(t.Context(), initrd); err != nil {
			t.Fatal(err)
		}
		if err := (UKI{Kernel: p.kernel, Initrd: initrd, Command: CommandLine()}).Build(t.Context(), uki); err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(uki)
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	if !bytes.Equal(build("one"), build("two")) {
		t.Error("two builds of the same image differ")
	}
}

func TestGuestThatIsClosedEndsWithEverythingOfIt(t *testing.T) {
	p := makeParts(t)
	initrd := p.path("initrd")
	if err := (Initramfs{Kernel: p.kernel, Script: "true"}).Build(t.Context(), initrd); err != nil {
		t.Fatal(err)
	}
	g := p.boot(t, Options{ESP: p.esp(t, initrd, CommandLine())})
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := g.Wait(t.Context()); !errors.Is(err, ErrDied) || !errors.Is(err, context.Canceled) {
		t.Errorf("Wait after Close: %v", err)
	}
	for name, process := range map[string]*process{"qemu": g.qemu, "swtpm": g.tpm} {
		select {
		case <-process.done:
		default:
			t.Errorf("%s still runs", name)
		}
	}
	if exists(g.dir) {
		t.Errorf("%s is left behind", g.dir)
	}
	if _, err := g.WaitMark(t.Context(), "never"); err == nil {
		t.Error("a milestone of a guest that is off")
	}
}

func TestGuestIsSwitchedOffWhenItsTimeIsUp(t *testing.T) {
	p := makeParts(t)
	initrd := p.path("initrd")
	if err := (Initramfs{Kernel: p.kernel, Script: "true"}).Build(t.Context(), initrd); err != nil {
		t.Fatal(err)
	}
	g := p.boot(t, Options{ESP: p.esp(t, initrd, CommandLine()), Timeout: time.Second})
	if _, err := g.Wait(t.Context()); !errors.Is(err, ErrDied) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
}
