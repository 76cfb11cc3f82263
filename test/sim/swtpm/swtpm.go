// Package swtpm gives tests a software TPM 2.0 with endorsement key
// certificates from a private certificate authority. It lives outside every
// production package: no configuration can select it.
package swtpm

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// Authority is a maker of TPMs: it signs endorsement key certificates.
type Authority struct {
	dir  string
	conf string
}

// NewAuthority makes a certificate authority in dir, which must exist. Its keys
// are made when the first TPM is.
func NewAuthority(dir string) (*Authority, error) {
	for _, tool := range []string{"swtpm", "swtpm_setup"} {
		if _, err := exec.LookPath(tool); err != nil {
			return nil, fmt.Errorf("%w (hint: make deps)", err)
		}
	}
	a := &Authority{dir: dir, conf: filepath.Join(dir, "setup.conf")}
	options := filepath.Join(dir, "localca.options")
	localca := filepath.Join(dir, "localca.conf")
	tool, err := exec.LookPath("swtpm_localca")
	if err != nil {
		return nil, fmt.Errorf("%w (hint: make deps)", err)
	}
	for path, text := range map[string]string{
		options: "--platform-manufacturer keyagent\n--platform-version 1\n--platform-model test\n",
		localca: fmt.Sprintf("statedir = %s\nsigningkey = %s\nissuercert = %s\ncertserial = %s\n", dir,
			filepath.Join(dir, "signkey.pem"), a.IssuerPath(), filepath.Join(dir, "serial")),
		a.conf: fmt.Sprintf("create_certs_tool=%s\ncreate_certs_tool_config=%s\ncreate_certs_tool_options=%s\nactive_pcr_banks=sha256\n",
			tool, localca, options),
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			return nil, err
		}
	}
	return a, nil
}

// IssuerPath is the certificate that signs endorsement keys, in PEM: what a
// policy trusts.
func (a *Authority) IssuerPath() string { return filepath.Join(a.dir, "issuercert.pem") }

// Issuer returns that certificate. A TPM must have been made.
func (a *Authority) Issuer() (*x509.Certificate, error) {
	data, err := os.ReadFile(a.IssuerPath())
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(data)
	if block == nil {
		return nil, errors.New("issuer certificate is not PEM")
	}
	return x509.ParseCertificate(block.Bytes)
}

// Manufacture makes the state of a new TPM in dir, with an RSA-2048 and a P-384
// endorsement key and their certificates.
func (a *Authority) Manufacture(dir string) error {
	cmd := exec.Command("swtpm_setup", "--tpm2", "--tpmstate", dir, "--config", a.conf,
		"--create-ek-cert", "--create-platform-cert", "--pcr-banks", "sha256", "--overwrite",
		"--logfile", filepath.Join(a.dir, "setup.log"))
	if out, err := cmd.CombinedOutput(); err != nil {
		log, _ := os.ReadFile(filepath.Join(a.dir, "setup.log"))
		return fmt.Errorf("swtpm_setup: %w: %s%s", err, out, log)
	}
	return nil
}

// Start runs a TPM on a unix socket until the returned stop is called. Its
// state folder keeps the keys; PCRs start anew, as after a power cycle.
func Start(state, socket string) (stop func(), err error) {
	cmd := exec.Command("swtpm", "socket", "--tpm2", "--tpmstate", "dir="+state,
		"--server", "type=unixio,path="+socket, "--flags", "not-need-init,startup-clear")
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	exited := make(chan struct{})
	go func() { _ = cmd.Wait(); close(exited) }()
	stop = func() { _ = cmd.Process.Kill(); <-exited }
	deadline := time.Now().Add(20 * time.Second)
	for {
		if c, err := net.Dial("unix", socket); err == nil {
			c.Close()
			return stop, nil
		}
		select {
		case <-exited:
			return nil, errors.New("swtpm exited at start")
		case <-time.After(5 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			stop()
			return nil, errors.New("swtpm did not open its socket within 20 s")
		}
	}
}

// TPM is a running software TPM of one test.
type TPM struct {
	Device    string // for tpm.IssuerOptions
	State     string
	Authority *Authority
	stop      func()
}

// New makes and starts a TPM by an authority of its own, or by a if given.
func New(t testing.TB, a *Authority) *TPM {
	t.Helper()
	// A socket's path is at most 107 bytes; t.TempDir can be longer.
	dir, err := os.MkdirTemp("", "swtpm")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if a == nil {
		ca := filepath.Join(dir, "ca")
		if err := os.Mkdir(ca, 0o700); err != nil {
			t.Fatal(err)
		}
		if a, err = NewAuthority(ca); err != nil {
			t.Fatal(err)
		}
	}
	tpm := &TPM{State: filepath.Join(dir, "state"), Device: "unix:" + filepath.Join(dir, "sock"), Authority: a}
	if err := os.Mkdir(tpm.State, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := a.Manufacture(tpm.State); err != nil {
		t.Fatal(err)
	}
	tpm.start(t)
	t.Cleanup(func() { tpm.stop() })
	return tpm
}

func (p *TPM) start(t testing.TB) {
	t.Helper()
	stop, err := Start(p.State, p.Device[len("unix:"):])
	if err != nil {
		t.Fatal(err)
	}
	p.stop = stop
}

// Restart is a power cycle: the PCRs are new and the reset count is higher.
func (p *TPM) Restart(t testing.TB) {
	t.Helper()
	p.stop()
	_ = os.Remove(p.Device[len("unix:"):])
	p.start(t)
}

// Snapshot keeps the TPM's state as it is now, for [TPM.RollBack].
func (p *TPM) Snapshot(t testing.TB) (snapshot string) {
	t.Helper()
	snapshot = filepath.Join(t.TempDir(), "state")
	if err := os.CopyFS(snapshot, os.DirFS(p.State)); err != nil {
		t.Fatal(err)
	}
	return snapshot
}

// RollBack is a power cycle in which somebody puts an earlier state back.
func (p *TPM) RollBack(t testing.TB, snapshot string) {
	t.Helper()
	p.stop()
	_ = os.Remove(p.Device[len("unix:"):])
	if err := errors.Join(os.RemoveAll(p.State), os.CopyFS(p.State, os.DirFS(snapshot))); err != nil {
		t.Fatal(err)
	}
	p.start(t)
}

// Dial opens a raw connection, for commands that the issuer never sends.
func (p *TPM) Dial(t testing.TB) net.Conn {
	t.Helper()
	c, err := net.Dial("unix", p.Device[len("unix:"):])
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}
