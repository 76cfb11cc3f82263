// Package nitro attests an EC2 instance with AWS's NitroTPM: what booted on it, as
// the Nitro hypervisor says.
//
// # What the evidence is
//
// One attestation document: the SHA-384 PCRs of the instance's TPM, signed by its
// hypervisor under AWS's Nitro attestation PKI, whose nonce is the connection's
// binder, all 64 bytes of it. The instance asks for it through a vendor command of
// its TPM.
//
// # What the verifier never does
//
// It never takes a root from the document, and never accepts the document of a
// Nitro enclave, which the same PKI signs: an enclave's operator is somebody who
// the instance's owner did not choose. It decides nothing about PCRs. A NitroTPM
// says nothing of memory encryption: who trusts it trusts AWS's hypervisor.
//
// The format is specified in docs/spec/nitro-evidence.md. The document's is that of
// the EC2 user guide, "Validate a NitroTPM Attestation Document".
package nitro

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"

	_ "embed"

	"github.com/keyagent/keyagent/attestation"
)

// The bounds of what a peer may send.
const (
	maxDocument     = 16 << 10 // bytes
	maxCertificate  = 2 << 10
	maxCertificates = 8 // of the bundle
)

// Each refusal has its own error; all wrap [attestation.ErrRefused].
var (
	ErrMalformed   = refusal("malformed NitroTPM attestation document")
	ErrNotNitroTPM = refusal("document is not of a NitroTPM")
	ErrUntrusted   = refusal("document's certificate does not chain to a configured root")
	ErrExpired     = refusal("document's certificate is outside its validity")
	ErrCertificate = refusal("document's certificate is not one that signs documents")
	ErrSignature   = refusal("document's signature does not verify")
	ErrNonce       = refusal("document does not cover this connection")
)

// ErrConfiguration means that a verifier was asked to work without trust roots:
// unset means refused.
var ErrConfiguration = errors.New("nitro verifier is not configured")

func refusal(text string) error { return fmt.Errorf("%w: %s", attestation.ErrRefused, text) }

// Trust is what a verifier believes in. The zero value believes in nothing, and a
// verifier refuses to verify with it.
type Trust struct {
	Roots []Root
}

// Root is a named root of an attestation PKI.
type Root struct {
	Name        string
	Certificate *x509.Certificate
}

func (t Trust) check() error {
	if len(t.Roots) == 0 {
		return fmt.Errorf("%w: no root", ErrConfiguration)
	}
	for _, r := range t.Roots {
		if r.Name == "" || r.Certificate == nil {
			return fmt.Errorf("%w: root %q needs a name and a certificate", ErrConfiguration, r.Name)
		}
	}
	return nil
}

//go:embed root-g1.pem
var rootG1 []byte

// AWS returns the root of AWS's Nitro attestation PKI, G1, named "aws". AWS
// publishes it at
//
//	https://aws-nitro-enclaves.amazonaws.com/AWS_NitroEnclaves_Root-G1.zip
//
// and its fingerprint in the user guide of Nitro Enclaves. A test compares them.
func AWS() []Root {
	block, _ := pem.Decode(rootG1)
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		panic(fmt.Sprintf("embedded root: %v", err)) // a test parses it
	}
	return []Root{{Name: "aws", Certificate: cert}}
}
