package keyservice

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/atls"
	"github.com/keyagent/keyagent/internal/failure"
)

// attested gets as far as a verdict and then never says a word.
func (w *world) attested() *atls.Conn {
	w.t.Helper()
	id, err := atls.NewIdentity()
	if err != nil {
		w.t.Fatal(err)
	}
	raw, err := net.Dial("tcp", w.at())
	if err != nil {
		w.t.Fatal(err)
	}
	c, err := atls.Client(w.t.Context(), raw, &atls.ClientConfig{
		ServerName: "127.0.0.1", RootCAs: w.pki.Pool(), Identity: id, Issuers: []attestation.Issuer{w.issuer},
	})
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { c.Close() })
	return c
}

// hungUp waits for the service to close the connection.
func hungUp(c net.Conn) error {
	_ = c.SetReadDeadline(time.Now().Add(20 * time.Second))
	b := make([]byte, 1<<10)
	for {
		if _, err := c.Read(b); err != nil {
			return err
		}
	}
}

// Case 81.
func TestASilentAttestedPeerIsCountedAndLetGo(t *testing.T) {
	w := newWorld(t)
	w.cfg.HandshakeTimeout = "1s"
	w.restart()
	c := w.attested()
	if now, _ := w.server.gate.Waiting(); now != 1 || w.server.gate.Attested() != 0 {
		t.Errorf("%d wait, %d do not", now, w.server.gate.Attested())
	}
	if err := hungUp(c); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("it is still open after its time")
	}
	m := w.machine()
	if _, _, err := w.get(m, "data-1", formatOp); err != nil {
		t.Fatal(err)
	}
	if now, _ := w.server.gate.Waiting(); now != 0 || w.server.gate.Attested() != 1 {
		t.Errorf("a machine that speaks: %d wait, %d do not", now, w.server.gate.Attested())
	}
}

// Case 81.
func TestASilentAttestedPeerDoesNotHoldUpTheEnd(t *testing.T) {
	w := newWorld(t)
	c := w.attested()
	started := time.Now()
	w.stop()
	if took := time.Since(started); took >= stopTimeout {
		t.Errorf("it took %s", took)
	}
	if err := hungUp(c); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("the connection is still open")
	}
}

// Case 81: one machine may reconnect as often as it likes, and has few connections.
func TestOneMachineHasFewConnections(t *testing.T) {
	w := newWorld(t)
	w.cfg.MaxConnectionsEach = 3
	w.restart()
	other := w.another()
	if _, _, err := w.get(other, "data-2", formatOp); err != nil {
		t.Fatal(err)
	}
	for range 6 {
		if _, _, err := w.get(w.machine(), "data-1", formatOp); err != nil {
			t.Error(err)
		}
	}
	if n := w.server.gate.Attested(); n != 4 {
		t.Errorf("%d connections", n)
	}
	if _, _, err := w.get(other, "data-2", formatOp); err != nil {
		t.Errorf("another machine: %v", err)
	}
}

// Case 83: a policy that trusts for a shorter time does so at once, verdicts that
// were given included.
func TestAShorterLifetimeCountsForVerdictsThatWereGiven(t *testing.T) {
	w := newWorld(t)
	m := w.machine()
	if _, _, err := w.get(m, "data-1", formatOp); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(w.dir, "policy.yaml")
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(strings.Replace(string(text), "lifetime: 1h", "lifetime: 1s", 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := w.server.Reload(); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(20 * time.Second)
	for {
		_, _, err := w.get(m, "data-1", formatOp)
		if failure.Of(err).Class == failure.EvidenceRefused {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the verdict of before still holds: %v", err)
		}
	}
	if _, _, err := w.get(w.machine(), "data-1", formatOp); err != nil {
		t.Errorf("one that attests itself now: %v", err)
	}
}
