package atls

import (
	"context"
	"errors"
	"path/filepath"
	"testing"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/tpm"
	"github.com/keyagent/keyagent/test/sim/swtpm"
)

// withTPM puts a real issuer and verifier in the place of the fake ones.
func (w *world) withTPM(t testing.TB, p *swtpm.TPM) *world {
	t.Helper()
	issuer, err := tpm.NewIssuer(tpm.IssuerOptions{Device: p.Device, EventLog: filepath.Join(t.TempDir(), "no-log")})
	if err != nil {
		t.Fatal(err)
	}
	root, err := p.Authority.Issuer()
	if err != nil {
		t.Fatal(err)
	}
	trust := tpm.Trust{Roots: []tpm.Root{{Name: "lab", Certificate: root}}, PCRs: []uint32{0, 4}}
	verifier, err := tpm.NewVerifier(tpm.VerifierOptions{Trust: func() tpm.Trust { return trust }})
	if err != nil {
		t.Fatal(err)
	}
	w.client.Issuers = []attestation.Issuer{issuer}
	w.server.Clients = &Peers{Verifiers: []attestation.Verifier{verifier}, Appraiser: w.server.Clients.Appraiser}
	return w
}

// witness is an issuer whose evidence somebody keeps, and shows again.
type witness struct {
	attestation.Issuer
	kept []byte
}

func (w *witness) Begin(ctx context.Context) (attestation.Attempt, error) {
	a, err := w.Issuer.Begin(ctx)
	return &witnessed{a, w}, err
}

type witnessed struct {
	attestation.Attempt
	w *witness
}

func (a *witnessed) Evidence(ctx context.Context, ask []byte, b attestation.Binder) ([]byte, error) {
	if a.w.kept != nil {
		return a.w.kept, nil
	}
	data, err := a.Attempt.Evidence(ctx, ask, b)
	a.w.kept = data
	return data, err
}

// Cases 18 and 19 with a real quote.
func TestATPMIsNeitherRelayedNorReplayedNorReflected(t *testing.T) {
	p := swtpm.New(t, nil)

	t.Run("honest", func(t *testing.T) {
		_, s := newWorld(t).withTPM(t, p).mustMeet(t)
		if v, _, err := s.Channel().Peer(); err != nil || len(v.Identity()) != len("tpm:")+64 {
			t.Errorf("%v, %v", v, err)
		}
	})
	t.Run("relayed", func(t *testing.T) {
		w, victim := newWorld(t).withTPM(t, p), newWorld(t).withTPM(t, p)
		toService, service := w.rawTLS(t, nil)
		address, toVictim := listenTLS(t, victim.cert)
		node := make(chan error, 1)
		go func() {
			_, err := Client(t.Context(), dial(t, address), victim.client)
			node <- err
		}()
		relay(<-toVictim, toService)
		wantErr(t, (<-service).err, tpm.ErrBinder)
		var refusal *Refusal
		if err := <-node; !errors.As(err, &refusal) {
			t.Errorf("the genuine machine learns %v", err)
		}
	})
	t.Run("replayed", func(t *testing.T) {
		w := newWorld(t).withTPM(t, p)
		w.client.Issuers[0] = &witness{Issuer: w.client.Issuers[0]}
		w.mustMeet(t)
		_, s := w.meet(t)
		wantErr(t, s.err, tpm.ErrBinder)
	})
	t.Run("reflected", func(t *testing.T) {
		// Both ends have the same TPM, and the client shows what the server showed.
		w := newWorld(t).withTPM(t, p)
		service := &witness{Issuer: w.client.Issuers[0]}
		w.server.Issuers, w.client.Server = []attestation.Issuer{service}, w.server.Clients
		w.mustMeet(t)
		service.kept = nil
		w.client.Issuers = []attestation.Issuer{&mirror{w.client.Issuers[0], service}}
		_, s := w.meet(t)
		wantErr(t, s.err, tpm.ErrBinder)
	})
}

// mirror shows the evidence of another.
type mirror struct {
	attestation.Issuer
	of *witness
}

func (m *mirror) Begin(ctx context.Context) (attestation.Attempt, error) {
	a, err := m.Issuer.Begin(ctx)
	return &witnessed{a, m.of}, err
}
