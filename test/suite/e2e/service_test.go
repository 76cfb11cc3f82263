//go:build linux && amd64

package e2e

import (
	"context"
	"errors"
	"fmt"
	"github.com/keyagent/keyagent/attestation/tpm"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/keyclient"
	"github.com/keyagent/keyagent/internal/lab/pki"
	nodeconfig "github.com/keyagent/keyagent/internal/node"
	"github.com/keyagent/keyagent/test/sim/swtpm"
	"github.com/keyagent/keyagent/test/suite/e2e/inject"
)

// site is a machine with a TPM, and everything that a key service for it needs but
// a process: that may end and begin again, always on the same port.
type site struct {
	tpm     *swtpm.TPM
	address string
}

func newSite(t *testing.T) *site {
	t.Helper()
	l := &site{tpm: swtpm.New(t, nil)}
	dev, err := tpm.OpenDevice(l.tpm.Device)
	must(t, err)
	defer dev.Close()
	_, err = tpm2.PCRExtend{
		PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(4), Auth: tpm2.PasswordAuth(nil)},
		Digests:   tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: make([]byte, 32)}}},
	}.Execute(dev)
	must(t, err)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	l.address = listener.Addr().String()
	must(t, listener.Close())
	return l
}

const labPolicy = `version: 1
lifetime: 1h
trust:
  tpm:
    roots: [{name: lab, file: %s}]
profiles:
  - name: guest
    tpm:
      trust: ["root:lab"]
      bank: sha256
      event_log: optional
      # One extension by zeros, which is what the lab measures.
      pcrs: [{pcr: 4, accept: ["f5a5fd42d16a20302798ef6ed309979b43003d2320d9f0e8ea9831a92759fb4b"]}]
grants:
  - {name: data, profiles: [guest], volumes: ["data"], operations: [open, format]}
`

const labService = `listen: %s
tls: {certificate: server.pem, key: server.key}
policy: policy.yaml
kms: kms://cluster-kms?file=master.secret
storage: storage://file?dir=records
audit: audit.log
`

const labAgent = `servers: [{address: "%s", name: 127.0.0.1, ca: ca.pem}]
tpm: {device: "%s", event_log: /nonexistent}
socket: %s
callers: [{uid: 0, operations: [status], volumes: ["*"]}]
retry: {budget: 20s, first: 20ms, max: 100ms}
volumes: [{id: data, device: /dev/null}]
`

// folder makes the files of a service that never ran, and of its agent.
func (l *site) folder(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	ca, err := pki.NewAuthority()
	must(t, err)
	cert, err := ca.Server("127.0.0.1")
	must(t, err)
	must(t, ca.Write(dir, cert))
	for name, text := range map[string]string{
		"serve.yaml":  fmt.Sprintf(labService, l.address),
		"policy.yaml": fmt.Sprintf(labPolicy, l.tpm.Authority.IssuerPath()),
		"agent.yaml":  fmt.Sprintf(labAgent, l.address, l.tpm.Device, filepath.Join(dir, "agent.sock")),
	} {
		must(t, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600))
	}
	return dir
}

func keyagentIn(dir string, args ...string) *exec.Cmd {
	cmd := exec.Command(program, args...)
	cmd.Dir = dir
	return cmd
}

// serve runs the service until it is told to stop, and kills it at the n-th call
// that writes.
func (l *site) serve(t *testing.T, dir string, n int) *inject.Process {
	t.Helper()
	log, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	must(t, err)
	defer log.Close()
	cmd := keyagentIn(dir, "serve", "--config", "serve.yaml", "--init-master-secret")
	cmd.Stderr = log
	p, err := inject.Start(cmd, n)
	must(t, err)
	return p
}

// Show 6, case 40: the service is killed at each call that writes, from its very
// first start to the confirmation of its first volume. The agent, which only tries
// again, gets one key, and the service has one record.
func TestAKilledServiceConverges(t *testing.T) {
	l := newSite(t)
	total := 0
	for n := 1; ; n++ {
		res := l.killAt(t, n)
		if !res.Killed {
			total = len(res.Calls)
			t.Logf("killed at each of %d calls that write:\n%s", n-1, strings.Join(res.Calls, "\n"))
			break
		}
	}
	if total < 20 {
		t.Errorf("a first start and a first volume write %d times: the calls are not followed (hint: only root sees what an undumpable process writes to)", total)
	}
}

// killAt tells the story once, with a service that is killed at call n.
func (l *site) killAt(t *testing.T, n int) inject.Result {
	t.Helper()
	dir := l.folder(t)
	client := newClient(t, dir)
	defer client.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	first := l.serve(t, dir, n)
	story := make(chan error, 1)
	go func() { story <- provision(ctx, client) }()
	select {
	case <-first.Done(): // another one takes its place
		second := l.serve(t, dir, 0)
		if err := <-story; err != nil {
			res, _ := first.Wait()
			t.Fatalf("killed at call %d, %s: %v", n, res.Calls[len(res.Calls)-1], err)
		}
		stop(t, second)
	case err := <-story:
		must(t, err)
		must(t, first.Signal(syscall.SIGTERM))
	}
	res, err := first.Wait()
	must(t, err)
	if !res.Killed && res.ExitCode != 0 {
		t.Fatalf("the service ended with %d", res.ExitCode)
	}
	at := fmt.Sprintf("killed at call %d, %s", n, res.Calls[len(res.Calls)-1])
	if out, err := keyagentIn(dir, "audit", "verify", "audit.log").CombinedOutput(); err != nil {
		t.Errorf("%s: %v: %s", at, err, out)
	}
	if records := filesBelow(t, filepath.Join(dir, "records/volumes")); len(records) != 1 {
		t.Errorf("%s: there are the records %q", at, records)
	}
	return res
}

func newClient(t *testing.T, dir string) *keyclient.Client {
	t.Helper()
	cfg, err := nodeconfig.Load(filepath.Join(dir, "agent.yaml"))
	must(t, err)
	client, _, err := cfg.KeyClient(slog.New(slog.DiscardHandler), nil)
	must(t, err)
	return client
}

// provision is what an agent does with a new volume, without the disk.
func provision(ctx context.Context, client *keyclient.Client) error {
	first, err := create(ctx, client, "data", someMACs)
	if err != nil {
		return err
	}
	defer first.Close()
	second, err := client.GetKey(ctx, keyclient.Request{Volume: "data"})
	if err != nil {
		return fmt.Errorf("second key: %w", err)
	}
	defer second.Close()
	if !first.DEK.Equal(second.DEK) || first.UUID != second.UUID || first.Generation != second.Generation || second.MACs != someMACs {
		return fmt.Errorf("the volume was %s with %v, and is %s with %v", first.UUID, someMACs, second.UUID, second.MACs)
	}
	return nil
}

// someMACs stand for a header.
var someMACs = keyclient.MACs{Header: [32]byte{1}, Copies: [2][32]byte{{2}, {3}}}

// create carries a first format. A step whose connection broke begins it again, as
// an agent does that is restarted.
func create(ctx context.Context, client *keyclient.Client, volume string, macs keyclient.MACs) (*keyclient.Key, error) {
	defer client.Hold()()
	for {
		key, err := client.GetKey(ctx, keyclient.Request{Volume: volume, Format: true})
		if err != nil {
			return nil, fmt.Errorf("first key: %w", err)
		}
		if key.State == keyclient.Pending {
			if _, err = client.BeginFormat(ctx, key, macs); err == nil {
				err = client.HeaderStands(ctx, key)
			}
		}
		if err == nil && key.State != keyclient.Active {
			err = client.Confirm(ctx, key)
		}
		if err == nil {
			return key, nil
		}
		if class := failure.Of(err).Class; ctx.Err() != nil || class != failure.Unreachable && class != failure.EvidenceRefused {
			return nil, fmt.Errorf("create: %w", errors.Join(err, key.Close()))
		}
		_ = key.Close()
	}
}

func stop(t *testing.T, p *inject.Process) {
	t.Helper()
	must(t, p.Signal(syscall.SIGTERM))
	if res, err := p.Wait(); err != nil || res.ExitCode != 0 {
		t.Errorf("the service ended with %d, %v", res.ExitCode, err)
	}
}

// An agent whose key service is not there yet when the machine boots waits, asks
// systemd for the time that this takes, and goes on when the service is there.
func TestAnAgentWaitsForItsServiceAndTellsSystemd(t *testing.T) {
	l := newSite(t)
	dir := l.folder(t)
	path := filepath.Join(dir, "notify")
	socket, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	must(t, err)
	defer socket.Close()
	must(t, socket.SetReadDeadline(time.Now().Add(time.Minute)))

	var stderr strings.Builder
	cmd := keyagentIn(dir, "agent", "--config", "agent.yaml")
	cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+path)
	cmd.Stderr = &stderr
	must(t, cmd.Start())
	defer cmd.Process.Kill()
	for waits := 0; waits < 3; {
		buf := make([]byte, 4096)
		n, err := socket.Read(buf)
		must(t, err)
		said := string(buf[:n])
		t.Logf("to systemd: %q", said)
		if strings.Contains(said, "READY=1") {
			t.Fatal("ready, without a volume")
		}
		_, extend, _ := strings.Cut(said, "EXTEND_TIMEOUT_USEC=")
		var usec int64
		if _, err := fmt.Sscan(extend, &usec); err != nil || usec < time.Minute.Microseconds() {
			t.Errorf("it asks for no time: %q", said)
		}
		switch {
		case strings.Contains(said, "STATUS=waiting for the key service"):
			waits++
		case !strings.Contains(said, "STATUS=asking the key service"):
			t.Errorf("while it waits it says %q", said)
		}
	}
	// systemd reads on: an agent whose socket is full would wait for it.
	must(t, socket.SetReadDeadline(time.Time{}))
	go func() { _, _ = io.Copy(io.Discard, socket) }() // until the socket is closed
	service := l.serve(t, dir, 0)
	defer stop(t, service)
	// The volume was never made, and the agent may not make it: an answer, and a
	// final one.
	err = cmd.Wait()
	if code := cmd.ProcessState.ExitCode(); code != failure.ExitCode(failure.NotFound) || !strings.Contains(stderr.String(), "not found") {
		t.Errorf("the agent ended with %d, %v: %s", code, err, stderr.String())
	}
}
