package bed

import (
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
	if got := <-served; got != "ping" {
		t.Errorf("the host got %q", got)
	}
	if log, err := g.Section("eventlog"); err != nil || len(log) == 0 {
		t.Errorf("event log of %d bytes, %v", len(log), err)
	}
}
