package atls_test

import (
	"context"
	"crypto/x509"
	"log"
	"net"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/atls"
)

// A machine proves itself over a connection, and gets a verdict for a while.
func ExampleClient() {
	ctx := context.Background()
	var issuers []attestation.Issuer // of this machine, see attestation/kinds
	identity, err := atls.NewIdentity()
	if err != nil {
		log.Fatal(err)
	}
	raw, err := (&net.Dialer{}).DialContext(ctx, "tcp", "keys.example:8443")
	if err != nil {
		log.Fatal(err)
	}
	conn, err := atls.Client(ctx, raw, &atls.ClientConfig{
		ServerName: "keys.example", RootCAs: x509.NewCertPool(), Identity: identity, Issuers: issuers,
	})
	if err != nil {
		log.Fatal(err)
	}
	defer conn.Close()
	log.Print(conn.Channel().Verdict().Expires)
}
