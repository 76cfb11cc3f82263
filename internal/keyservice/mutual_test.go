package keyservice

import (
	"net"
	"testing"
	"time"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/atls"
	"github.com/keyagent/keyagent/attestation/kinds"
	"github.com/keyagent/keyagent/internal/policysource"
	"github.com/keyagent/keyagent/test/sim/swtpm"
)

// Case 82. Strangers who demand the service's evidence and then say nothing keep
// nobody else from it: its TPM is taken when there is a challenge, and not before.
func TestASilentStrangerDoesNotHoldTheServicesTPM(t *testing.T) {
	w := newWorld(t)
	own := world{t: t, tpm: swtpm.New(t, w.tpm.Authority)}
	own.extend(4)
	w.cfg.TPM = &kinds.TPMConfig{Device: own.tpm.Device}
	w.restart()
	source, err := policysource.New(w.cfg.Policy, w.server.log)
	if err != nil {
		t.Fatal(err)
	}
	peers, err := source.Peers(nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	mutual := func() error {
		id, err := atls.NewIdentity()
		if err != nil {
			return err
		}
		raw, err := net.Dial("tcp", w.at())
		if err != nil {
			return err
		}
		c, err := atls.Client(t.Context(), raw, &atls.ClientConfig{
			ServerName: "127.0.0.1", RootCAs: w.pki.Pool(), Identity: id, Server: peers,
			Issuers: []attestation.Issuer{w.issuer}, Timeout: 20 * time.Second,
		})
		if err != nil {
			return err
		}
		return c.Close()
	}
	if err := mutual(); err != nil {
		t.Fatal(err)
	}
	open := encoded(t, &attestv1.Frame{Body: &attestv1.Frame_Open{Open: &attestv1.Open{Version: 1, HasEvidence: true, WantsEvidence: true}}})
	for range 8 {
		c, err := w.encrypted()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		// Its Open, the service's Open and Hello, and not a word more.
		if !w.hostile(c, [][]byte{open}, nil) {
			t.Fatal("the stranger was not answered")
		}
	}
	if err := mutual(); err != nil {
		t.Errorf("beside silent strangers: %v", err)
	}
}
