package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// Debian's OVMF without Secure Boot, and the variables of a machine that never
// ran.
const (
	firmwareCode = "/usr/share/OVMF/OVMF_CODE_4M.fd"
	firmwareVars = "/usr/share/OVMF/OVMF_VARS_4M.fd"
)

// Debian's OVMF with Secure Boot, whose keys are those that the package has for
// tests, and the keys themselves, under the password "snakeoil".
const (
	secureCode = "/usr/share/OVMF/OVMF_CODE_4M.secboot.fd"
	secureVars = "/usr/share/OVMF/OVMF_VARS_4M.snakeoil.fd"
	secureKey  = "/usr/share/ovmf/PkKek-1-snakeoil.key"
	secureCert = "/usr/share/ovmf/PkKek-1-snakeoil.pem"
)

// Forward connects a TCP address in the guest's network to one of this machine.
// Each connection that the guest opens is one connection here. It is all that
// the guest reaches.
type Forward struct {
	Guest string // address and port, in 10.0.2.0/24, such as 10.0.2.101:8443
	Host  string // address and port, such as 127.0.0.1:18443
}

// Options are the parts and the limits of one boot.
type Options struct {
	ESP string // the disk that firmware starts from; the guest's writes to it are dropped
	TPM *TPM
	// Data is a raw disk image, in the guest /dev/disk/by-id/virtio-data; what the
	// guest writes stays. Empty: no such disk.
	Data string
	// Root is a raw disk image for the guest with systemd; the guest's writes to it
	// are dropped. Empty: no such disk.
	Root string
	// Vars is the file with the firmware's variables, made if it is not there, and
	// kept. Empty: a fresh copy for this boot alone, so that every boot is the
	// first one to the firmware, and measures the same.
	Vars string
	// SecureBoot starts only what [Sign] signed.
	SecureBoot bool
	Forward    []Forward
	Clock      time.Time     // of the machine at power on; zero: the right time
	Memory     int           // MiB; 0: 512
	CPUs       int           // 0: 2
	Console    func(Line)    // called for each console line, in order; may be nil
	Timeout    time.Duration // from power on to power off; 0: 3 minutes
}

// Boot switches a guest on. It runs until it powers off by itself, its time is
// up, ctx ends, or [Guest.Close] is called; the caller must call Close.
func Boot(ctx context.Context, opts Options) (*Guest, error) {
	if err := opts.complete(); err != nil {
		return nil, fmt.Errorf("boot: %w", err)
	}
	g, err := boot(ctx, opts)
	if err != nil {
		return nil, fmt.Errorf("boot: %w", err)
	}
	return g, nil
}

func (o *Options) complete() error {
	switch {
	case o.TPM == nil:
		return errors.New("no TPM")
	case o.ESP == "":
		return errors.New("no disk to start from")
	}
	if o.Memory == 0 {
		o.Memory = 512
	}
	if o.CPUs == 0 {
		o.CPUs = 2
	}
	if o.Timeout == 0 {
		o.Timeout = 3 * time.Minute
	}
	for _, f := range o.Forward {
		for _, address := range []string{f.Guest, f.Host} {
			if strings.ContainsAny(address, ", \t\n'\"\\") || !strings.Contains(address, ":") {
				return fmt.Errorf("forward %q to %q: want address:port", f.Guest, f.Host)
			}
		}
	}
	return nil
}

func boot(ctx context.Context, opts Options) (_ *Guest, err error) {
	qemu, err := tool("qemu-system-x86_64")
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "keyagent-bed-")
	if err != nil {
		return nil, err
	}
	g := &Guest{dir: dir}
	// Until the guest runs, whatever fails here undoes everything before it.
	defer func() {
		if err != nil {
			g.release()
		}
	}()
	ctx, g.cancel = context.WithTimeoutCause(ctx, opts.Timeout, fmt.Errorf("guest still running after %s: %w", opts.Timeout, context.DeadlineExceeded))
	g.ctx = ctx

	vars := opts.Vars
	if vars == "" {
		vars = filepath.Join(dir, "vars.fd")
	}
	if !exists(vars) {
		fresh := firmwareVars
		if opts.SecureBoot {
			fresh = secureVars
		}
		if err := copyFile(fresh, vars, 0o600); err != nil {
			return nil, err
		}
	}
	tpmEnd, tpmQEMU, err := socketPair()
	if err != nil {
		return nil, err
	}
	defer tpmEnd.Close()
	defer tpmQEMU.Close()
	qmpEnd, qmpQEMU, err := socketPair()
	if err != nil {
		return nil, err
	}
	defer qmpEnd.Close()
	defer qmpQEMU.Close()
	if g.monitor, err = newMonitor(qmpEnd); err != nil {
		return nil, err
	}
	if g.tpm, err = opts.TPM.start(ctx, tpmEnd); err != nil {
		return nil, fmt.Errorf("start TPM: %w", err)
	}

	args, err := opts.arguments(vars)
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, qemu, args...)
	cmd.ExtraFiles = []*os.File{tpmQEMU, qmpQEMU} // as 3 and 4
	if g.input, err = cmd.StdinPipe(); err != nil {
		return nil, err
	}
	output, consoleEnd, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer consoleEnd.Close()
	cmd.Stdout = consoleEnd
	g.console = newConsole(time.Now(), opts.Console)
	if g.qemu, err = startProcess(cmd); err != nil {
		output.Close()
		return nil, fmt.Errorf("start qemu: %w", err)
	}
	g.following = make(chan struct{})
	go func() {
		defer close(g.following)
		defer output.Close()
		g.console.follow(output)
	}()
	return g, nil
}

// arguments returns QEMU's command line. Whatever firmware can see, and would
// measure, is fixed here and not left to a default.
func (o *Options) arguments(vars string) ([]string, error) {
	code, machine := firmwareCode, "q35"
	if o.SecureBoot {
		code, machine = secureCode, "q35,smm=on"
	}
	args := []string{
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-accel", "tcg,thread=multi", "-machine", machine, "-cpu", "max,-erms,-fsrm", // the kernel's `rep stosb` is slow where it is emulated

		"-smp", strconv.Itoa(o.CPUs), "-m", strconv.Itoa(o.Memory),
		"-uuid", "6b657961-6765-6e74-8000-000000000001",
		"-drive", "if=pflash,format=raw,unit=0,readonly=on,file=" + comma(code),
		"-drive", "if=pflash,format=raw,unit=1,file=" + comma(vars),
		"-chardev", "socket,id=tpm,fd=3", "-tpmdev", "emulator,id=tpm0,chardev=tpm", "-device", "tpm-crb,tpmdev=tpm0",
		"-chardev", "socket,id=monitor,fd=4", "-mon", "chardev=monitor,mode=control",
		"-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console",
	}
	if o.SecureBoot {
		args = append(args, "-global", "driver=cfi.pflash01,property=secure,value=on")
	}
	if !o.Clock.IsZero() {
		args = append(args, "-rtc", "base="+o.Clock.UTC().Format("2006-01-02T15:04:05"))
	}
	disk := func(name, file, extra string) {
		args = append(args,
			"-drive", "if=none,format=raw,id="+name+",file="+comma(file)+extra,
			"-device", "virtio-blk-pci,drive="+name+",serial="+name)
	}
	disk("esp", o.ESP, ",snapshot=on")
	args[len(args)-1] += ",bootindex=1"
	if o.Data != "" {
		disk("data", o.Data, ",cache=writeback")
	}
	if o.Root != "" {
		disk("root", o.Root, ",snapshot=on")
	}
	network := "user,id=net,net=10.0.2.0/24,restrict=on,ipv6=off"
	for _, f := range o.Forward {
		socat, err := tool("socat")
		if err != nil {
			return nil, err
		}
		// What socat says goes nowhere: QEMU would send it into the guest.
		// With a command QEMU starts one process for each connection; the form
		// without one would put all of the guest's connections into a single one.
		network += fmt.Sprintf(",guestfwd=tcp:%s-cmd:%s -lf /dev/null - TCP:%s", f.Guest, socat, f.Host)
	}
	// No option ROM: firmware would read it, measure it, and offer to boot from it.
	return append(args, "-netdev", network, "-device", "virtio-net-pci,netdev=net,romfile=,mac=52:54:00:12:34:56"), nil
}

// comma escapes a file name for QEMU's option lists.
func comma(path string) string { return strings.ReplaceAll(path, ",", ",,") }

// release ends what boot started and frees what it made.
func (g *Guest) release() {
	if g.cancel != nil {
		g.cancel()
	}
	for _, p := range []*process{g.qemu, g.tpm} {
		if p != nil {
			<-p.done
		}
	}
	if g.monitor != nil {
		g.monitor.close()
	}
	if g.following != nil {
		<-g.following
	}
	os.RemoveAll(g.dir)
}

var _ io.Closer = (*Guest)(nil)
