//go:build umlguest

package hardware

import (
	"bytes"
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	kmsapi "k8s.io/kms/apis/v2"

	"github.com/keyagent/keyagent/test/sim/amd"
)

// plugin starts the Kubernetes plugin of a control-plane node, whose KEK comes from
// the key service by attestation.
func (m *machine) plugin(args ...string) (socket string, stop func()) {
	m.t.Helper()
	socket = filepath.Join(m.dir, "kms.sock")
	cmd := exec.Command(os.Getenv("KEYAGENT_TEST_PROGRAM"), append([]string{"kubekms", "--agent-config", "agent.yaml", "--volume", "data",
		"--endpoint", "unix://" + socket}, args...)...)
	var log bytes.Buffer
	cmd.Dir, cmd.Stderr = m.dir, &log
	check(m.t, cmd.Start())
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	deadline := time.Now().Add(30 * time.Second)
	for {
		if c, err := net.Dial("unix", socket); err == nil {
			c.Close()
			break
		}
		select {
		case err := <-done:
			m.t.Fatalf("the plugin ended: %v\n%s\nthe service said:\n%s", err, log.String(), m.log.String())
		case <-time.After(20 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			m.t.Fatalf("the plugin does not serve:\n%s", log.String())
		}
	}
	return socket, func() {
		check(m.t, cmd.Process.Signal(os.Interrupt))
		if err := <-done; err != nil {
			m.t.Errorf("the plugin ends with %v:\n%s", err, log.String())
		}
	}
}

func dialPlugin(t testing.TB, socket string) kmsapi.KeyManagementServiceClient {
	t.Helper()
	c := must[*grpc.ClientConn](t)(grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials())))
	t.Cleanup(func() { c.Close() })
	return kmsapi.NewKeyManagementServiceClient(c)
}

// A control-plane node attests, gets its KEK from the key service and serves a
// client on the socket, also after a restart; with one bit of its report changed
// it gets none and serves nobody.
func TestGuestControlPlane(t *testing.T) {
	m, chip := newMachine(t), newChip(t)
	m.amdTrust(chip)
	m.mirror("amd", amd.NewKDS(chip))
	s := &spoiler{Client: guestOn(chip).TSM(), at: 0x90}
	m.hardware(s)
	m.measure()
	m.serve()
	m.disk() // which makes the agent's configuration

	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	socket, stop := m.plugin("--init")
	client := dialPlugin(t, socket)
	status := must[*kmsapi.StatusResponse](t)(client.Status(ctx, &kmsapi.StatusRequest{}))
	if status.Healthz != "ok" || status.Version != "v2" || status.KeyId == "" {
		t.Errorf("%v", status)
	}
	plain := []byte("0123456789abcdef0123456789abcdef")
	sealed := must[*kmsapi.EncryptResponse](t)(client.Encrypt(ctx, &kmsapi.EncryptRequest{Plaintext: plain, Uid: "1"}))
	if sealed.KeyId != status.KeyId || bytes.Contains(sealed.Ciphertext, plain) {
		t.Errorf("%v", sealed)
	}
	stop()

	socket, stop = m.plugin()
	opened := must[*kmsapi.DecryptResponse](t)(dialPlugin(t, socket).Decrypt(ctx, &kmsapi.DecryptRequest{
		Ciphertext: sealed.Ciphertext, KeyId: sealed.KeyId, Annotations: sealed.Annotations, Uid: "2"}))
	if !bytes.Equal(opened.Plaintext, plain) {
		t.Errorf("%q", opened.Plaintext)
	}
	stop()

	s.spoiled.Store(true)
	out, code := m.run("kubekms", "--agent-config", "agent.yaml", "--volume", "data", "--endpoint", "unix://"+socket)
	if code != 6 {
		t.Errorf("exit code %d, want 6\n%s", code, out)
	}
	if _, err := net.Dial("unix", socket); err == nil {
		t.Error("somebody serves on the socket")
	}
}
