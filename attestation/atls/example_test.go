package atls_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http/httptest"
	"time"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/atls"
)

// A machine proves itself over a connection, and gets a secret that no other opens.
func ExampleClient() {
	ctx := context.Background()
	certificate, roots := serverCertificate()
	near, far := net.Pipe()
	go func() {
		conn, err := atls.Server(ctx, far, &atls.ServerConfig{
			Certificate: func() (*tls.Certificate, error) { return certificate, nil },
			// Programs take verifiers from attestation/kinds, and a policy as appraiser.
			Clients: &atls.Peers{Verifiers: []attestation.Verifier{verifier{}}, Appraiser: everybody{}},
		})
		if err != nil {
			return
		}
		defer conn.Close()
		dek, err := atls.NewSecret([]byte("0123456789abcdef"))
		if err != nil {
			return
		}
		defer dek.Close()
		sealed, err := conn.Channel().Seal([]byte("dek of data"), dek)
		if err != nil {
			return
		}
		_, _ = conn.Write(sealed)
	}()

	identity, err := atls.NewIdentity()
	if err != nil {
		fmt.Println(err)
		return
	}
	conn, err := atls.Client(ctx, near, &atls.ClientConfig{
		ServerName: "example.com", RootCAs: roots, Identity: identity, Issuers: []attestation.Issuer{issuer{}},
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer conn.Close()
	sealed, err := io.ReadAll(conn)
	if err != nil {
		fmt.Println(err)
		return
	}
	dek, err := conn.Channel().Open([]byte("dek of data"), sealed)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer dek.Close()
	fmt.Println(dek, dek.Len())
	// Output: [secret] 16
}

// issuer and verifier are of a made-up kind: its evidence is the binder, and no
// hardware stands behind it.
type (
	issuer   struct{}
	attempt  struct{}
	verifier struct{}
	question struct{}
)

func (issuer) Kind() attestation.Kind                             { return "toy" }
func (issuer) Begin(context.Context) (attestation.Attempt, error) { return attempt{}, nil }

func (attempt) Offer() []byte { return nil }
func (attempt) Close() error  { return nil }
func (attempt) Evidence(_ context.Context, _ []byte, binder attestation.Binder) ([]byte, error) {
	return binder[:], nil
}

func (verifier) Kind() attestation.Kind { return "toy" }
func (verifier) Begin(context.Context, []byte) (attestation.Question, error) {
	return question{}, nil
}

func (question) Ask() []byte { return nil }
func (question) Verify(_ context.Context, evidence []byte, binder attestation.Binder) ([]attestation.Claims, error) {
	if !bytes.Equal(evidence, binder[:]) {
		return nil, attestation.ErrRefused
	}
	return []attestation.Claims{{Kind: "toy", Identity: "machine-7"}}, nil
}

type everybody struct{}

func (everybody) Appraise(context.Context, *attestation.Verified) (time.Duration, error) {
	return time.Hour, nil
}

// serverCertificate borrows the one of net/http's tests, for example.com.
func serverCertificate() (*tls.Certificate, *x509.CertPool) {
	s := httptest.NewTLSServer(nil)
	defer s.Close()
	roots := x509.NewCertPool()
	roots.AddCert(s.Certificate())
	return &s.TLS.Certificates[0], roots
}
