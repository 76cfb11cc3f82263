package lab

import (
	"crypto/sha256"
	"debug/pe"
	"encoding/hex"
	"os"
	"strings"
	"testing"
)

const systemdScript = `
pcrs
eventlog
systemctl is-system-running
/bed/program
systemctl is-active test.service
stat -c %a /bed/program
journalctl -b -o cat --no-pager -u systemd-pcrphase-sysinit -u systemd-pcrphase
nc -h 2>/dev/null
bash -c 'exec 3<>/dev/tcp/10.0.2.101/8443; echo ping >&3; cat <&3'
modprobe dm-crypt && modprobe dm-integrity && dmsetup targets
head -c 13 /dev/disk/by-id/virtio-data; echo
await standing
`

const testUnit = `[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bed/program
`

func TestGuestWithSystemdBoots(t *testing.T) {
	p := makeParts(t)
	root, initrd := p.path("root.img"), p.path("initrd")
	if err := p.cache.Rootfs(t.Context(), Rootfs{
		Kernel: p.kernel,
		Files: []File{
			{Path: "/bed/program", Data: []byte("#!/bin/sh\necho program runs\n"), Mode: 0o755},
			{Path: "/etc/systemd/system/test.service", Data: []byte(testUnit)},
			{Path: "/etc/systemd/system/multi-user.target.wants/test.service", Link: "../test.service"},
		},
		Script: systemdScript,
	}, root); err != nil {
		t.Fatal(err)
	}
	if err := BuildRootInitrd(t.Context(), p.kernel, initrd); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(p.path("data"), []byte(strings.Repeat("from the host", 1<<16)), 0o600); err != nil {
		t.Fatal(err)
	}
	address, served := listen(t, "hello from the host\n")
	g := p.boot(t, Options{
		ESP:     p.esp(t, initrd, CommandLine("systemd.show_status=0")),
		Root:    root,
		Data:    p.path("data"),
		Forward: []Forward{{Guest: "10.0.2.101:8443", Host: address}},
	})
	if _, err := g.WaitMark(t.Context(), "standing"); err != nil {
		t.Fatal(err)
	}
	if err := g.Continue(); err != nil {
		t.Fatal(err)
	}
	wantStatus(t, g, 0)
	for _, want := range []string{
		"running", "program runs", "active", "755", "hello from the host", "crypt ", "integrity ", "from the host",
		// The guest's own measurements of its progress, after those of the firmware.
		"Successfully extended PCR index 11 with 'sysinit'", "Successfully extended PCR index 11 with 'ready'",
	} {
		if _, err := g.WaitLine(t.Context(), want); err != nil {
			t.Error(err)
		}
	}
	if got, want := g.PCRs()[11], predictPCR11(t, p.path("uki.efi"), "sysinit", "ready"); got != want {
		t.Errorf("PCR 11 is %s after the boot, predicted %s", got, want)
	}
	if got := <-served; got != "ping" {
		t.Errorf("the host got %q", got)
	}
	if log, err := g.Section("eventlog"); err != nil || len(log) == 0 {
		t.Errorf("event log of %d bytes, %v", len(log), err)
	}
}

// predictPCR11 computes what the stub measures of an image, each section's name
// and then its content, and what systemd adds: one word per phase of the boot.
func predictPCR11(t *testing.T, uki string, phases ...string) string {
	t.Helper()
	file, err := pe.Open(uki)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	pcr := make([]byte, sha256.Size)
	extend := func(data []byte) {
		digest := sha256.Sum256(data)
		sum := sha256.Sum256(append(pcr, digest[:]...))
		pcr = sum[:]
	}
	for _, name := range []string{".linux", ".osrel", ".cmdline", ".initrd"} {
		section := file.Section(name)
		data, err := section.Data()
		if err != nil {
			t.Fatal(err)
		}
		extend([]byte(name + "\x00"))
		extend(data[:section.VirtualSize])
	}
	for _, phase := range phases {
		extend([]byte(phase))
	}
	return hex.EncodeToString(pcr)
}
