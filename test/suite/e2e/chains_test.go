//go:build linux && amd64

package e2e

import (
	"encoding/hex"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/keyagent/keyagent/attestation/policy"
	"github.com/keyagent/keyagent/attestation/tpm"
	"github.com/keyagent/keyagent/internal/lab"
)

// chain is one way to start a kernel. Each name of a loader or stub has the Debian
// release before it that it is from.
type chain struct {
	stub     string   // release; empty: GRUB starts the kernel itself
	loaders  []string // "bookworm/systemd-boot", "bookworm/shim", "trixie/grub"
	secure   bool
	sections []lab.Section
	profile  int
	always   bool // not only with KEYAGENT_BOOTS_FULL
}

// newest is the release whose stub and loaders may be newer than what is modelled.
const newest = "testing"

// chainTime is enough for a boot under Secure Boot beside another load.
const chainTime = 10 * time.Minute

var (
	twoProfiles = []lab.Section{
		{Name: ".hwids", Data: make([]byte, 64)}, {Name: ".dtbauto", Data: []byte("no device tree")},
		{Name: ".profile", Data: []byte("ID=main\nTITLE=Main profile\n")},
		{Name: ".profile", Data: []byte("ID=two\n")}, {Name: ".cmdline", Data: []byte(lab.CommandLine("two"))},
	}
	oneProfile = []lab.Section{{Name: ".profile", Data: []byte("ID=main\nTITLE=Main profile\n")}}
)

var chains = map[string]chain{
	"252":                                  {stub: "bookworm"},
	"252 under Secure Boot":                {stub: "bookworm", secure: true},
	"252 by systemd-boot":                  {stub: "bookworm", loaders: []string{"bookworm/systemd-boot"}, always: true},
	"252 by systemd-boot and shim, secure": {stub: "bookworm", loaders: []string{"bookworm/shim", "bookworm/systemd-boot"}, secure: true},
	"254":                                  {stub: "bookworm-backports"},
	"254 under Secure Boot":                {stub: "bookworm-backports", secure: true},
	"254 by systemd-boot":                  {stub: "bookworm-backports", loaders: []string{"bookworm-backports/systemd-boot"}},
	"257 with profiles":                    {stub: "trixie", sections: twoProfiles, always: true},
	"257 with a profile, by systemd-boot":  {stub: "trixie", loaders: []string{"trixie/systemd-boot"}, sections: oneProfile},
	"257 by shim, secure":                  {stub: "trixie", loaders: []string{"bookworm/shim"}, secure: true},
	"257 under Secure Boot":                {stub: "trixie", secure: true},
	"newest":                               {stub: newest},
	"newest under Secure Boot":             {stub: newest, secure: true},
	"newest by shim":                       {stub: newest, loaders: []string{"bookworm/shim"}},
	"newest by shim, secure":               {stub: newest, loaders: []string{"bookworm/shim"}, secure: true},
	"newest by systemd-boot, secure":       {stub: newest, loaders: []string{newest + "/systemd-boot"}, secure: true},
	"newest by systemd-boot and shim":      {stub: newest, loaders: []string{"bookworm/shim", newest + "/systemd-boot"}, sections: oneProfile, secure: true, always: true},
	"newest, second profile":               {stub: newest, loaders: []string{newest + "/systemd-boot"}, sections: twoProfiles, profile: 1},
	"newest by systemd-boot 252":           {stub: newest, loaders: []string{"bookworm/systemd-boot"}},
	"252 by the newest systemd-boot":       {stub: "bookworm", loaders: []string{newest + "/systemd-boot"}},
	"kernel by GRUB of bookworm, secure":   {loaders: []string{"bookworm/shim", "bookworm/grub"}, secure: true},
	"kernel by GRUB of trixie":             {loaders: []string{"bookworm/shim", "trixie/grub"}},
	"kernel by GRUB of trixie, secure":     {loaders: []string{"bookworm/shim", "trixie/grub"}, secure: true},
	"kernel by the newest GRUB":            {loaders: []string{"bookworm/shim", newest + "/grub"}},
	"kernel by the newest GRUB, secure":    {loaders: []string{"bookworm/shim", newest + "/grub"}, secure: true},
}

// TestWhatABootMeasuresWasPredicted: from files alone, before any of them was
// started. Three chains of Debian's releases each time, all of them with
// KEYAGENT_BOOTS_FULL.
func TestWhatABootMeasuresWasPredicted(t *testing.T) {
	cache, kernel := debian(t)
	dir := t.TempDir()
	ca, err := lab.NewCA(filepath.Join(dir, "ca"), "e2e")
	must(t, err)
	machine, err := ca.NewTPM(t.Context(), filepath.Join(dir, "tpm"), lab.TPMOptions{})
	must(t, err)
	initrd := filepath.Join(dir, "initrd")
	must(t, lab.Initramfs{Kernel: kernel, Script: "eventlog; pcrs"}.Build(t.Context(), initrd))
	for _, name := range slices.Sorted(maps.Keys(chains)) {
		c := chains[name]
		if !c.always && os.Getenv("KEYAGENT_BOOTS_FULL") == "" {
			continue
		}
		t.Run(name, func(t *testing.T) {
			p := &chainParts{chain: c, dir: t.TempDir(), cache: cache, kernel: kernel, initrd: initrd}
			args, esp := p.build(t)
			predicted, unknown := p.measure(t, args)
			if unknown {
				return // a release that is newer than this program, which says so
			}
			guest, err := lab.Boot(t.Context(), lab.Options{ESP: esp, TPM: machine, SecureBoot: c.secure, Timeout: chainTime})
			must(t, err)
			defer guest.Close()
			if status, err := guest.Wait(t.Context()); err != nil || status != 0 {
				t.Fatalf("status %d, %v", status, err)
			}
			measured := guest.PCRs()
			for pcr, accepted := range predicted {
				if !slices.Contains(accepted, strings.ToLower(measured[pcr])) {
					t.Errorf("PCR %d: predicted %v, measured %s", pcr, accepted, measured[pcr])
				}
			}
			explains(t, guest, measured)
			if len(c.loaders) > 0 && c.stub != "" {
				p.missesItsLoaders(t, guest, args)
			}
		})
	}
}

// explains checks that the guest's log leads to every register, in words.
func explains(t *testing.T, guest *lab.Guest, measured map[int]string) {
	t.Helper()
	raw, err := guest.Section("eventlog")
	must(t, err)
	log, err := tpm.ParseEventLog(raw)
	must(t, err)
	for pcr, text := range measured {
		value, err := hex.DecodeString(text)
		must(t, err)
		events, err := log.Explain(uint32(pcr), value)
		if err != nil {
			t.Error(err)
		}
		for _, e := range events {
			if strings.ContainsFunc(e.Name+e.Detail, func(r rune) bool { return r > 0x2fff }) {
				t.Errorf("PCR %d: %+v", pcr, e)
			}
		}
	}
}

// missesItsLoaders checks that a loader which was not named is noticed, where the
// log of such a boot is there.
func (p *chainParts) missesItsLoaders(t *testing.T, guest *lab.Guest, args []string) {
	t.Helper()
	raw, err := guest.Section("eventlog")
	must(t, err)
	path := filepath.Join(p.dir, "eventlog")
	must(t, os.WriteFile(path, raw, 0o600))
	image := args[slices.Index(args, "--uki"):]
	out, err := exec.CommandContext(t.Context(), program, append([]string{"measure", "--pcrs", "4", "--event-log", path}, image...)...).CombinedOutput()
	if err != nil || !strings.Contains(string(out), "is a --loader missing?") {
		t.Errorf("%v: %s", err, out)
	}
}

type chainParts struct {
	chain
	dir    string
	cache  *lab.Cache
	kernel *lab.Kernel
	initrd string
}

// packages are where Debian has the loaders.
var packages = map[string]struct{ name, path string }{
	"stub":         {"systemd-boot-efi", "usr/lib/systemd/boot/efi/linuxx64.efi.stub"},
	"systemd-boot": {"systemd-boot-efi", "usr/lib/systemd/boot/efi/systemd-bootx64.efi"},
	"shim":         {"shim-unsigned", "usr/lib/shim/shimx64.efi"},
	"grub":         {"grub-efi-amd64-signed", "usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed"},
}

func (p *chainParts) program(t *testing.T, release, name string) string {
	t.Helper()
	dir, _, err := p.cache.Package(t.Context(), release, packages[name].name)
	must(t, err)
	return filepath.Join(dir, packages[name].path)
}

// sign makes a program one that the firmware starts, where it wants a signature.
func (p *chainParts) sign(t *testing.T, in, name string) string {
	t.Helper()
	if !p.secure {
		return in
	}
	out := filepath.Join(p.dir, name)
	must(t, lab.Sign(t.Context(), in, out))
	return out
}

// build makes the disk, and the arguments of measure for what is on it.
func (p *chainParts) build(t *testing.T) (args []string, esp string) {
	t.Helper()
	var files []lab.File
	place := []string{"/EFI/BOOT/BOOTX64.EFI", "/EFI/BOOT/grubx64.efi"}
	for n, l := range p.loaders {
		release, name, _ := strings.Cut(l, "/")
		signed := p.sign(t, p.program(t, release, name), fmt.Sprintf("loader%d.efi", n))
		files = append(files, lab.File{Path: place[n], Source: signed})
		args = append(args, "--loader", signed)
	}
	if p.stub == "" {
		image := p.sign(t, p.kernel.Image, "vmlinuz")
		config := "linux /vmlinuz " + lab.CommandLine() + "\ninitrd /initrd\nboot\n"
		files = append(files, lab.File{Path: "/EFI/debian/grub.cfg", Data: []byte(config)},
			lab.File{Path: "/vmlinuz", Source: image}, lab.File{Path: "/initrd", Source: p.initrd})
		args = append(args, "--loader", image)
	} else {
		raw := filepath.Join(p.dir, "raw.efi")
		must(t, lab.UKI{Kernel: p.kernel, Initrd: p.initrd, Command: lab.CommandLine(), Stub: p.program(t, p.stub, "stub"), Sections: p.sections}.Build(t.Context(), raw))
		uki := p.sign(t, raw, "uki.efi")
		files = append(files, lab.File{Path: p.placeOfImage(), Source: uki}, lab.File{Path: "/loader/loader.conf", Data: p.loaderConfig()})
		args = append(args, "--uki", uki, "--profile", strconv.Itoa(p.profile))
	}
	esp = filepath.Join(p.dir, "esp.img")
	must(t, lab.BuildESPFiles(t.Context(), files, esp))
	return append(args, fmt.Sprintf("--secure-boot=%t", p.secure)), esp
}

func (p *chainParts) placeOfImage() string {
	switch {
	case len(p.loaders) == 0:
		return "/EFI/BOOT/BOOTX64.EFI"
	case strings.HasSuffix(p.loaders[len(p.loaders)-1], "/shim"):
		return "/EFI/BOOT/grubx64.efi"
	}
	return "/EFI/Linux/uki.efi"
}

func (p *chainParts) loaderConfig() []byte {
	if p.profile == 0 {
		return nil
	}
	return []byte("default uki*@two\n")
}

// measure returns the predicted values, or that the program knows a part not yet.
func (p *chainParts) measure(t *testing.T, args []string) (accepted map[int][]string, unknown bool) {
	t.Helper()
	pcrs := "4,11,12"
	if p.stub == "" {
		pcrs = "4"
	}
	cmd := exec.CommandContext(t.Context(), program, append([]string{"measure", "--pcrs", pcrs}, args...)...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		if strings.Contains(stderr.String(), "is not known") && (p.stub == newest || slices.ContainsFunc(p.loaders, func(l string) bool { return strings.HasPrefix(l, newest) })) {
			t.Log(stderr.String())
			return nil, true
		}
		t.Fatalf("%v: %s", err, stderr.String())
	}
	var profiles []struct {
		TPM policy.TPMProfile `yaml:"tpm"`
	}
	must(t, yaml.Unmarshal(out, &profiles))
	accepted = map[int][]string{}
	for _, r := range profiles[0].TPM.PCRs {
		accepted[int(*r.PCR)] = r.Accept
	}
	return accepted, false
}
