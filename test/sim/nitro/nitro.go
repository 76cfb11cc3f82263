// Package nitro is a synthetic AWS for tests: an attestation PKI, documents, and a
// NitroTPM that gives them. Nothing that it signs is accepted by a verifier that
// trusts AWS.
package nitro

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha512"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"time"

	"github.com/fxamacker/cbor/v2"

	"github.com/keyagent/keyagent/attestation/nitro"
)

// Module is the name of an instance's TPM.
const Module = "i-0123456789abcdef0-tpm0000000000000000"

// Authority is a root, an intermediate, and the key of one hypervisor.
type Authority struct {
	Root, Middle, Leaf *x509.Certificate
	key                *ecdsa.PrivateKey
}

// New makes an authority whose certificates are valid from an hour before now; the
// hypervisor's for three hours, as AWS's are. edit changes its template.
func New(now time.Time, edit func(leaf *x509.Certificate)) (*Authority, error) {
	a := &Authority{}
	var parent *x509.Certificate
	var signer *ecdsa.PrivateKey
	for _, c := range []struct {
		name string
		life time.Duration
		ca   bool
		to   **x509.Certificate
	}{
		{"aws.nitro-enclaves", 30 * 365 * 24 * time.Hour, true, &a.Root},
		{"zone.us-east-1.aws.nitro-enclaves", 20 * 24 * time.Hour, true, &a.Middle},
		{"i-0123456789abcdef0-tpm0000000000000000.us-east-1.aws", 3 * time.Hour, false, &a.Leaf},
	} {
		key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
		if err != nil {
			return nil, err
		}
		t := &x509.Certificate{
			SerialNumber: big.NewInt(7), Subject: pkix.Name{Organization: []string{"Amazon"}, OrganizationalUnit: []string{"AWS"}, CommonName: c.name},
			NotBefore: now.Add(-time.Hour), NotAfter: now.Add(c.life), IsCA: c.ca, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature,
		}
		if c.ca {
			t.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageCRLSign | x509.KeyUsageDigitalSignature
		} else if edit != nil {
			edit(t)
		}
		if parent == nil {
			parent, signer = t, key
		}
		der, err := x509.CreateCertificate(rand.Reader, t, parent, key.Public(), signer)
		if err != nil {
			return nil, err
		}
		if *c.to, err = x509.ParseCertificate(der); err != nil {
			return nil, err
		}
		parent, signer, a.key = *c.to, key, key
	}
	return a, nil
}

// Trust is in this authority alone, under the name "lab".
func (a *Authority) Trust() nitro.Trust {
	return nitro.Trust{Roots: []nitro.Root{{Name: "lab", Certificate: a.Root}}}
}

// Payload is what a document says, by the names of its fields.
func (a *Authority) Payload(now time.Time, nonce []byte) map[string]any {
	pcrs := map[uint64][]byte{}
	for n := range uint64(24) {
		pcrs[n] = make([]byte, 48)
		pcrs[n][0] = byte(n)
	}
	return map[string]any{
		"module_id": Module, "digest": "SHA384", "timestamp": uint64(now.UnixMilli()), "nitrotpm_pcrs": pcrs,
		"certificate": a.Leaf.Raw, "cabundle": [][]byte{a.Root.Raw, a.Middle.Raw},
		"public_key": nil, "user_data": nil, "nonce": nonce,
	}
}

// Protected is the header of a document: ES384.
var Protected = []byte{0xA1, 0x01, 0x38, 0x22}

// Sign signs a payload: encoded CBOR, or something to encode.
func (a *Authority) Sign(payload any) ([]byte, error) {
	body, ok := payload.([]byte)
	if !ok {
		var err error
		if body, err = cbor.Marshal(payload); err != nil {
			return nil, err
		}
	}
	toSign, err := cbor.Marshal([]any{"Signature1", Protected, []byte{}, body})
	if err != nil {
		return nil, err
	}
	digest := sha512.Sum384(toSign)
	r, s, err := ecdsa.Sign(rand.Reader, a.key, digest[:])
	if err != nil {
		return nil, err
	}
	signature := make([]byte, 96)
	r.FillBytes(signature[:48])
	s.FillBytes(signature[48:])
	return cbor.Marshal([]any{Protected, map[int]int{}, body, signature})
}

// Document is a document over a nonce.
func (a *Authority) Document(now time.Time, nonce []byte) ([]byte, error) {
	return a.Sign(a.Payload(now, nonce))
}
