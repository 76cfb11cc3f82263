package lab

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"time"
)

// CA is the maker of software TPMs: a root and, below it, the authority that
// signs endorsement key certificates. Two CAs have nothing in common, so a TPM
// of one is a stranger to anyone who trusts the other.
type CA struct {
	dir string
}

// NewCA makes a CA in dir, with the configuration that swtpm_setup needs to use
// it, or opens the one that is there.
func NewCA(dir, name string) (*CA, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("make CA %q: %w", name, err)
	}
	ca := &CA{dir: dir}
	if exists(ca.RootCert()) {
		return ca, nil
	}
	if err := ca.make(name); err != nil {
		return nil, fmt.Errorf("make CA %q: %w", name, err)
	}
	return ca, nil
}

// RootCert is the path of the root's certificate (PEM): what a policy trusts.
func (ca *CA) RootCert() string { return ca.path("root-cert.pem") }

// IssuerCert is the path of the certificate (PEM) of the intermediate authority
// that signs EK certificates. A TPM does not carry it.
func (ca *CA) IssuerCert() string { return ca.path("issuer-cert.pem") }

func (ca *CA) path(name string) string { return filepath.Join(ca.dir, name) }

func (ca *CA) make(name string) error {
	if err := os.MkdirAll(ca.dir, 0o700); err != nil {
		return err
	}
	rootKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return err
	}
	issuerKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return err
	}
	root := authority(name+" root CA", 1)
	rootDER, err := x509.CreateCertificate(rand.Reader, root, root, rootKey.Public(), rootKey)
	if err != nil {
		return err
	}
	if root, err = x509.ParseCertificate(rootDER); err != nil {
		return err
	}
	issuer := authority(name+" EK CA", 2)
	issuer.MaxPathLen, issuer.MaxPathLenZero = 0, true
	issuerDER, err := x509.CreateCertificate(rand.Reader, issuer, root, issuerKey.Public(), rootKey)
	if err != nil {
		return err
	}
	files := []struct{ name, text string }{
		{"issuer-key.pem", encodePEM("RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(issuerKey))},
		{"issuer-cert.pem", encodePEM("CERTIFICATE", issuerDER)},
		{"localca.conf", "statedir = " + ca.dir + "\nsigningkey = " + ca.path("issuer-key.pem") +
			"\nissuercert = " + ca.IssuerCert() + "\ncertserial = " + ca.path("serial") + "\n"},
		{"localca.options", "--platform-manufacturer keyagent\n--platform-version 1\n--platform-model bed\n"},
		{"setup.conf", "create_certs_tool = swtpm_localca\ncreate_certs_tool_config = " + ca.path("localca.conf") +
			"\ncreate_certs_tool_options = " + ca.path("localca.options") + "\n"},
		// The root last: a CA is there when its root is.
		{"root-cert.pem", encodePEM("CERTIFICATE", rootDER)},
	}
	for _, f := range files {
		if err := os.WriteFile(ca.path(f.name), []byte(f.text), 0o600); err != nil {
			return err
		}
	}
	return nil
}

func authority(name string, serial int64) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber:          big.NewInt(serial),
		Subject:               pkix.Name{CommonName: name},
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().AddDate(10, 0, 0),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
	}
}

func encodePEM(kind string, der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
}
