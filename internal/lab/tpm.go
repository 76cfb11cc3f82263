package lab

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// TPM is a software TPM that was manufactured: it has an endorsement key and,
// in its NV memory, the certificates of its maker (RSA-2048 and P-384).
type TPM struct {
	Dir string // its state; at most one boot at a time may use it
}

// TPMOptions are the rarely needed choices when a TPM is manufactured.
type TPMOptions struct {
	// Banks are the active PCR banks; nil: SHA-256 only. Each bank more makes the
	// firmware hash everything once more.
	Banks []string
}

// NewTPM manufactures a TPM whose state is kept in dir.
func (ca *CA) NewTPM(ctx context.Context, dir string, opts TPMOptions) (*TPM, error) {
	t, err := ca.newTPM(ctx, dir, opts)
	if err != nil {
		return nil, fmt.Errorf("manufacture TPM: %w", err)
	}
	return t, nil
}

func (ca *CA) newTPM(ctx context.Context, dir string, opts TPMOptions) (*TPM, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	banks := opts.Banks
	if len(banks) == 0 {
		banks = []string{"sha256"}
	}
	if _, err := run(ctx, "swtpm_setup", "--tpm2", "--tpmstate", dir, "--config", ca.path("setup.conf"),
		"--create-ek-cert", "--create-platform-cert", "--pcr-banks", strings.Join(banks, ",")); err != nil {
		return nil, err
	}
	return &TPM{Dir: dir}, nil
}

// Clone copies the state into dir: the same TPM, with the same keys, a second
// time. No clone may be made while a guest uses the TPM.
func (t *TPM) Clone(dir string) (*TPM, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("clone TPM: %w", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("clone TPM: %w", err)
	}
	files, err := os.ReadDir(t.Dir)
	if err != nil {
		return nil, fmt.Errorf("clone TPM: %w", err)
	}
	for _, file := range files {
		if !file.Type().IsRegular() || file.Name() == ".lock" {
			continue
		}
		if err := copyFile(filepath.Join(t.Dir, file.Name()), filepath.Join(dir, file.Name()), 0o600); err != nil {
			return nil, fmt.Errorf("clone TPM: %w", err)
		}
	}
	return &TPM{Dir: dir}, nil
}

// start runs the TPM for one guest. control is swtpm's end of the socket pair
// whose other end QEMU gets: no path in the file system, nothing to wait for,
// and swtpm ends by itself when QEMU does.
func (t *TPM) start(ctx context.Context, control *os.File) (*process, error) {
	path, err := tool("swtpm")
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, path, "socket", "--tpm2", "--tpmstate", "dir="+t.Dir,
		"--ctrl", "type=unixio,clientfd=3", "--terminate")
	cmd.ExtraFiles = []*os.File{control}
	return startProcess(cmd)
}

func copyFile(from, to string, mode fs.FileMode) error {
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, data, mode)
}
