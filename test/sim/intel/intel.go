// Package intel is a synthetic Intel for tests: its root and authorities, the
// platforms that they certify, the quoting enclave that signs quotes, and what the
// provisioning certification service says of them. Nothing here is Intel's; the
// formats are.
//
//	World    root, CAs, the key that signs TCB info (intel.go)
//	Machine  one platform: PCK certificate, quoting enclave, quotes (machine.go)
//	         TCB info, QE identity, revocation lists (collateral.go)
//	PCS      the service, as HTTP handler and as endorsement.Source (pcs.go)
//	TSM      the kernel's configfs of a TD (tsm.go)
package intel

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha1"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"time"
)

const rootCRL = "https://certificates.trustedservices.intel.com/IntelSGXRootCA.der"

// World is one Intel. Its certificates are valid from an hour before Now for
// twenty years, what it publishes for thirty days.
type World struct {
	Now                                time.Time
	Root, Platform, Processor, Signing Authority
}

// Authority is a certificate with its key.
type Authority struct {
	Certificate *x509.Certificate
	Key         *ecdsa.PrivateKey
}

// New makes a world whose documents are issued at now.
func New(now time.Time) (*World, error) {
	w := &World{Now: now.UTC().Truncate(time.Second)}
	for _, a := range []struct {
		into   *Authority
		name   string
		issuer *Authority
		ca     bool
	}{
		{&w.Root, "Intel SGX Root CA", &w.Root, true},
		{&w.Platform, "Intel SGX PCK Platform CA", &w.Root, true},
		{&w.Processor, "Intel SGX PCK Processor CA", &w.Root, true},
		{&w.Signing, "Intel SGX TCB Signing", &w.Root, false},
	} {
		var err error
		if *a.into, err = w.Issue(a.name, a.issuer, a.ca); err != nil {
			return nil, err
		}
	}
	return w, nil
}

// Issue makes a certificate as Intel's look. An issuer without a certificate
// signs itself.
func (w *World) Issue(name string, issuer *Authority, ca bool, extensions ...pkix.Extension) (Authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return Authority{}, err
	}
	serial := make([]byte, 16)
	rand.Read(serial)
	point, err := key.PublicKey.Bytes()
	if err != nil {
		return Authority{}, err
	}
	keyID := sha1.Sum(point)
	template := &x509.Certificate{
		SerialNumber: new(big.Int).SetBytes(serial),
		Subject: pkix.Name{CommonName: name, Organization: []string{"Intel Corporation"},
			Locality: []string{"Santa Clara"}, Province: []string{"CA"}, Country: []string{"US"}},
		NotBefore: w.Now.Add(-time.Hour), NotAfter: w.Now.AddDate(20, 0, 0),
		IsCA: ca, BasicConstraintsValid: true, SubjectKeyId: keyID[:], AuthorityKeyId: keyID[:],
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageContentCommitment, CRLDistributionPoints: []string{rootCRL},
		ExtraExtensions: extensions,
	}
	if ca {
		template.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageCRLSign
	}
	parent, signer := template, key
	if issuer.Certificate != nil {
		parent, signer = issuer.Certificate, issuer.Key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		return Authority{}, err
	}
	cert, err := x509.ParseCertificate(der)
	return Authority{cert, key}, err
}

// MarshalJSON keeps an authority for later.
func (a Authority) MarshalJSON() ([]byte, error) {
	key, err := x509.MarshalPKCS8PrivateKey(a.Key)
	if err != nil {
		return nil, err
	}
	return json.Marshal([][]byte{a.Certificate.Raw, key})
}

// UnmarshalJSON reads what MarshalJSON wrote.
func (a *Authority) UnmarshalJSON(data []byte) error {
	var parts [][]byte
	if err := json.Unmarshal(data, &parts); err != nil {
		return err
	}
	if len(parts) != 2 {
		return fmt.Errorf("%d parts, not certificate and key", len(parts))
	}
	var err error
	if a.Certificate, err = x509.ParseCertificate(parts[0]); err != nil {
		return err
	}
	key, err := x509.ParsePKCS8PrivateKey(parts[1])
	if err != nil {
		return err
	}
	var ok bool
	if a.Key, ok = key.(*ecdsa.PrivateKey); !ok {
		return fmt.Errorf("key is a %T", key)
	}
	return nil
}

// Save writes a machine with its world and all keys to a file.
func (m *Machine) Save(path string) error {
	data, err := json.Marshal(m)
	if err != nil {
		return err
	}
	return os.WriteFile(path, data, 0o600)
}

// Load reads what Save wrote.
func Load(path string) (*Machine, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	m := &Machine{}
	return m, json.Unmarshal(data, m)
}

// PEM encodes a chain.
func PEM(certs ...*x509.Certificate) []byte {
	var out []byte
	for _, c := range certs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return out
}
