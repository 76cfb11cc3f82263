//go:build linux && amd64

package e2e

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/keyagent/keyagent/internal/demo"
	"github.com/keyagent/keyagent/internal/lab"
	"github.com/keyagent/keyagent/systemd"
)

// node is a machine that is booted again and again: its TPM, its disk, and the
// key service that it asks. Its root file system is Debian with our unit.
type node struct {
	dir     string
	cache   *lab.Cache
	kernel  *lab.Kernel
	initrd  string
	stub    string // of its images; empty: the bed's
	tpm     *lab.TPM
	service *demo.Service
	disk    string
	limit   time.Duration // of a boot; 0: the bed's
	clock   time.Time     // of the machine; zero: the right one
	secure  bool          // Secure Boot
	forward []lab.Forward // besides the key service
}

const diskSize = 64 << 20

// newNode makes a machine and a key service whose policy expects it to boot with
// that kernel command line. The service runs.
func newNode(t *testing.T, command string) *node {
	t.Helper()
	n := newMachine(t, false)
	n.expect(t, command)
	n.start(t)
	return n
}

// expect makes what the machine boots, and has the policy accept it with that kernel
// command line.
func (n *node) expect(t *testing.T, command string) {
	t.Helper()
	must(t, lab.BuildRootInitrd(t.Context(), n.kernel, n.initrd))
	uki, _ := n.image(t, "expected", command)
	pcrs := "0,1,2,3,4,5,6,7,11"
	measure := func() ([]byte, error) {
		return n.service.Run(t.Context(), "measure", "--name", "guest", "--trust", "root:demo", "--uki", uki,
			"--phase", "sysinit", "--phase", "sysinit:ready", "--event-log", "trusted.log", "--pcrs", pcrs)
	}
	profile, err := measure()
	if n.stub != "" {
		// The log is of a boot with an older stub, which did not measure all that this does.
		if err == nil || !strings.Contains(err.Error(), "SMBIOS tables") {
			t.Errorf("PCR 1 is computed: %v", err)
		}
		pcrs = strings.Replace(pcrs, "1,", "", 1)
		profile, err = measure()
	}
	must(t, err)
	must(t, n.service.WritePolicy("tpm-maker.pem", profile))
}

// start starts the key service.
func (n *node) start(t testing.TB) {
	t.Helper()
	// Not the test's context: it ends before the clean-up stops the service.
	must(t, n.service.Start(context.WithoutCancel(t.Context())))
	t.Cleanup(func() {
		if err := n.service.Stop(); err != nil {
			t.Errorf("the key service: %v", err)
		}
	})
}

// newMachine makes a machine and a key service that does not run yet and has no policy.
func newMachine(t testing.TB, secure bool) *node {
	t.Helper()
	n := &node{dir: t.TempDir(), secure: secure}
	n.disk, n.initrd = n.path("disk.img"), n.path("initrd")
	var err error
	n.cache, n.kernel = debian(t)
	ca, err := lab.NewCA(n.path("tpm-maker"), "e2e")
	must(t, err)
	n.tpm, err = ca.NewTPM(t.Context(), n.path("tpm"), lab.TPMOptions{})
	must(t, err)
	n.service, err = demo.NewService(n.path("service"), program)
	must(t, err)
	maker, err := os.ReadFile(ca.IssuerCert())
	must(t, err)
	must(t, os.WriteFile(n.path("service/tpm-maker.pem"), maker, 0o644))
	must(t, os.WriteFile(n.path("service/trusted.log"), trustedLog(t, secure), 0o600))
	must(t, os.WriteFile(n.disk, nil, 0o600))
	must(t, os.Truncate(n.disk, diskSize))
	return n
}

func (n *node) path(name string) string { return filepath.Join(n.dir, name) }

// image makes what the machine starts from.
func (n *node) image(t testing.TB, name, command string) (uki, esp string) {
	t.Helper()
	uki, esp = n.path(name+".efi"), n.path(name+".esp")
	must(t, lab.UKI{Kernel: n.kernel, Initrd: n.initrd, Stub: n.stub, Command: command}.Build(t.Context(), uki))
	if n.secure {
		must(t, lab.Sign(t.Context(), uki, uki))
	}
	must(t, lab.BuildESP(t.Context(), uki, esp))
	return uki, esp
}

// unitFolder is where a package puts units.
const unitFolder = "/usr/lib/systemd/system/"

// root makes the root file system, which is not measured, with one script.
func (n *node) root(t *testing.T, script string, more ...lab.File) string {
	t.Helper()
	files, err := demo.AgentFiles(n.service.CA())
	must(t, err)
	files = append(files,
		lab.File{Path: "/usr/bin/keyagent", Source: program, Mode: 0o755},
		lab.File{Path: "/etc/systemd/system/multi-user.target.wants/keyagent-agent.service", Link: unitFolder + "keyagent-agent.service"})
	for _, unit := range []string{"keyagent-agent.service", "keyagent-serve.service"} {
		files = append(files, lab.File{Path: unitFolder + unit, Data: unitFile(t, unit)})
	}
	out := n.path("root.img")
	must(t, n.cache.Rootfs(t.Context(), lab.Rootfs{Kernel: n.kernel, Files: append(files, more...), Script: script}, out))
	return out
}

func unitFile(t *testing.T, name string) []byte {
	t.Helper()
	data, err := systemd.Units.ReadFile("units/" + name)
	must(t, err)
	return data
}

// boot switches the machine on.
func (n *node) boot(t testing.TB, esp, root string) *lab.Guest {
	t.Helper()
	g, err := lab.Boot(t.Context(), lab.Options{
		ESP: esp, Root: root, TPM: n.tpm, Data: n.disk, Timeout: n.limit, Clock: n.clock, SecureBoot: n.secure,
		Forward: append([]lab.Forward{{Guest: demo.KeyServiceAddress, Host: n.service.Address}}, n.forward...),
		Console: func(l lab.Line) { logLine(t, l) },
	})
	must(t, err)
	t.Cleanup(func() { g.Close() })
	return g
}

// logLine logs a line of the console: the whole of it on request alone, because what a
// test complains of is lost between a thousand lines.
func logLine(t testing.TB, l lab.Line) {
	t.Helper()
	text := l.Text
	if os.Getenv("KEYAGENT_TEST_CONSOLE") == "" {
		if strings.Contains(text, `"level":"INFO"`) || strings.HasPrefix(text, "BdsDxe") || strings.Contains(text, "KEYAGENT-DATA") {
			return
		}
		if short := 240; len(text) > short {
			text = text[:short] + "… (KEYAGENT_TEST_CONSOLE=1 shows all)"
		}
	}
	t.Logf("%7.3fs %s", l.At.Seconds(), text)
}

// commandLine is the kernel's, as the policy expects it.
func commandLine(more ...string) string {
	return lab.CommandLine(append([]string{"systemd.show_status=0"}, more...)...)
}

// wantLines fails for each text that no line of the console contains.
func wantLines(t testing.TB, g *lab.Guest, texts ...string) {
	t.Helper()
	for _, text := range texts {
		if !hasLine(g, text) {
			complain(t, "the guest did not print %q", text)
		}
	}
}

// complain fails the test, and says why once more at its end: a console is long.
func complain(t testing.TB, format string, args ...any) {
	t.Helper()
	text := fmt.Sprintf(format, args...)
	t.Error(text)
	t.Cleanup(func() { t.Log("failed: " + text) })
}

func hasLine(g *lab.Guest, text string) bool {
	for _, l := range g.Lines() {
		if strings.Contains(l.Text, text) {
			return true
		}
	}
	return false
}

func wantStatus(t testing.TB, g *lab.Guest, want int) {
	t.Helper()
	if got, err := g.Wait(t.Context()); err != nil || got != want {
		t.Fatalf("the guest ended with %d, %v; want %d", got, err, want)
	}
}

// debian returns the cache and the kernel, which all guests share.
func debian(t testing.TB) (*lab.Cache, *lab.Kernel) {
	t.Helper()
	cache, err := lab.OpenCache("")
	must(t, err)
	kernel, err := cache.Kernel(t.Context())
	must(t, err)
	return cache, kernel
}

// trusted are the event logs of boots without Secure Boot and with it.
var trusted = map[bool]func(context.Context, string, *lab.Kernel) ([]byte, error){false: once(false), true: once(true)}

// trustedLog is the event log of a boot that is trusted, with another image and
// another TPM: what the firmware does depends on neither.
func trustedLog(t testing.TB, secure bool) []byte {
	t.Helper()
	_, kernel := debian(t)
	log, err := trusted[secure](t.Context(), t.TempDir(), kernel)
	must(t, err)
	return log
}

func once(secure bool) func(context.Context, string, *lab.Kernel) ([]byte, error) {
	var first sync.Once
	var log []byte
	var err error
	return func(ctx context.Context, dir string, kernel *lab.Kernel) ([]byte, error) {
		first.Do(func() { log, err = referenceBoot(ctx, dir, kernel, secure) })
		return log, err
	}
}

func referenceBoot(ctx context.Context, dir string, kernel *lab.Kernel, secure bool) ([]byte, error) {
	ca, err := lab.NewCA(filepath.Join(dir, "ca"), "reference")
	if err != nil {
		return nil, err
	}
	tpm, err := ca.NewTPM(ctx, filepath.Join(dir, "tpm"), lab.TPMOptions{})
	if err != nil {
		return nil, err
	}
	return demo.Reference(ctx, dir, kernel, tpm, secure)
}

// digest is the SHA-256 of a file.
func digest(t testing.TB, path string) string {
	t.Helper()
	f, err := os.Open(path)
	must(t, err)
	defer f.Close()
	h := sha256.New()
	_, err = io.Copy(h, f)
	must(t, err)
	return hex.EncodeToString(h.Sum(nil))
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
