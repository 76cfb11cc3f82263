package demo

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/keyagent/keyagent/internal/lab"
)

// KeyServiceAddress is where a guest of the bed finds the key service.
const KeyServiceAddress = "10.0.2.101:8443"

// agentConfig is the guest's configuration.
const agentConfig = `servers:
  - address: ` + KeyServiceAddress + `
    name: keyservice.demo
    ca: ca.pem
callers:
  - {uid: 0, operations: [open, format, close, status, list], volumes: ["*"]}
volumes:
  - id: data
    device: /dev/disk/by-id/virtio-data
    format: true
    filesystem: ext4
    mount: /data
`

// demoConfig is that of the demo's own machine: a partition whose size is no multiple
// of 4096 bytes, as partitioning tools make them, and a second volume that is mounted
// inside the first.
const demoConfig = `servers:
  - address: ` + KeyServiceAddress + `
    name: keyservice.demo
    ca: ca.pem
callers:
  - {uid: 0, operations: [open, format, close, status, list], volumes: ["*"]}
volumes:
  - {id: data-logs, device: /dev/disk/by-id/virtio-data-part2, format: true, filesystem: ext4, no_mmp: true, mount: /data/logs}
  - {id: data, device: /dev/disk/by-id/virtio-data-part1, format: true, filesystem: ext4, no_mmp: true, mount: /data}
`

// script is what the small guest does, the same in each boot.
const script = `
keyagent version
mark keyagent
if keyagent unlock --standalone --log-format json; then
	mark unlocked
	if [ -f /data/hello ]; then
		echo "DEMO read: $(cat /data/hello)"
		echo "DEMO read inside it: $(cat /data/logs/hello)"
	else
		echo "written by the first boot" >/data/hello
		echo "DEMO wrote: $(cat /data/hello)"
		echo "and inside it" >/data/logs/hello
	fi
	keyagent status --standalone | sed 's/^/DEMO /'
	keyagent close --standalone --all
else
	echo "DEMO refused: exit code $?"
	[ -e /dev/mapper/data ] && echo "DEMO the mapping exists"
	[ -e /data/hello ] && echo "DEMO the file can be read"
	exit 3
fi
`

// referenceScript is for a boot that is trusted: it shows the event log.
const referenceScript = "eventlog\n"

// images are what the guests start from.
type images struct {
	dir    string
	kernel *lab.Kernel
}

// AgentFiles are the agent's files in a guest, whatever init it has.
func AgentFiles(ca string) ([]lab.File, error) { return agentFiles(ca, agentConfig) }

func agentFiles(ca, config string) ([]lab.File, error) {
	text, err := os.ReadFile(ca)
	if err != nil {
		return nil, err
	}
	return []lab.File{
		{Path: "/etc/keyagent/agent.yaml", Data: []byte(config), Mode: 0o600},
		{Path: "/etc/keyagent/ca.pem", Data: text},
	}, nil
}

// build makes a disk to start from, and returns the path of the kernel image in
// it as well.
func (im images) build(ctx context.Context, name, script, command, program, ca string) (uki, esp string, err error) {
	path := func(suffix string) string { return filepath.Join(im.dir, name+suffix) }
	initramfs := lab.Initramfs{Kernel: im.kernel, Script: script}
	if program != "" {
		initramfs.Programs = []lab.File{{Path: "/sbin/keyagent", Source: program}}
		if initramfs.Files, err = agentFiles(ca, demoConfig); err != nil {
			return "", "", err
		}
	}
	if err := initramfs.Build(ctx, path(".initrd")); err != nil {
		return "", "", err
	}
	if err := (lab.UKI{Kernel: im.kernel, Initrd: path(".initrd"), Command: command}).Build(ctx, path(".efi")); err != nil {
		return "", "", err
	}
	return path(".efi"), path(".esp"), lab.BuildESP(ctx, path(".efi"), path(".esp"))
}

// Reference boots the firmware once with an image that is not the product's,
// and returns its event log: the trusted boot for everything that the image
// itself does not decide. With secure the firmware has Secure Boot.
func Reference(ctx context.Context, dir string, kernel *lab.Kernel, tpm *lab.TPM, secure bool) ([]byte, error) {
	uki, esp, err := images{dir, kernel}.build(ctx, "reference", referenceScript, lab.CommandLine(), "", "")
	if err != nil {
		return nil, err
	}
	if secure {
		if err := lab.Sign(ctx, uki, uki); err != nil {
			return nil, err
		}
		if err := lab.BuildESP(ctx, uki, esp); err != nil {
			return nil, err
		}
	}
	data := filepath.Join(dir, "reference.data")
	if err := os.WriteFile(data, make([]byte, 1<<20), 0o600); err != nil {
		return nil, err
	}
	g, err := lab.Boot(ctx, lab.Options{ESP: esp, TPM: tpm, Data: data, SecureBoot: secure})
	if err != nil {
		return nil, err
	}
	defer g.Close()
	if status, err := g.Wait(ctx); err != nil || status != 0 {
		return nil, fmt.Errorf("reference boot ended with %d: %w", status, err)
	}
	return g.Section("eventlog")
}
