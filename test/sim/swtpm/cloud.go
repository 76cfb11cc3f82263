package swtpm

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"math/big"
	"time"

	"github.com/google/go-tpm/tpm2"
)

// Cloud certifies the attestation keys of its vTPMs, as Google does.
type Cloud struct {
	Certificate *x509.Certificate
	key         *ecdsa.PrivateKey
}

// Instance is whose vTPM it is.
type Instance struct {
	Zone          string `asn1:"utf8"`
	ProjectNumber int64
	ProjectID     string `asn1:"utf8"`
	InstanceID    int64
	InstanceName  string     `asn1:"utf8"`
	Security      properties `asn1:"explicit,optional"`
}

type properties struct {
	Version    int64 `asn1:"explicit,tag:0,optional"`
	Production bool  `asn1:"explicit,tag:1,optional"`
}

// NewCloud makes an authority.
func NewCloud() (*Cloud, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "cloud"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	return &Cloud{cert, key}, err
}

// Certify makes the certificate of an attestation key of a production instance.
func (c *Cloud) Certify(public *tpm2.TPMTPublic, i Instance) ([]byte, error) {
	key, err := tpm2.Pub(*public)
	if err != nil {
		return nil, err
	}
	i.Security = properties{1, true}
	info, err := asn1.Marshal(i)
	if err != nil {
		return nil, err
	}
	return x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(2), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature, Subject: pkix.Name{CommonName: "vTPM"},
		UnknownExtKeyUsage: []asn1.ObjectIdentifier{{2, 23, 133, 8, 3}},
		ExtraExtensions:    []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 11129, 2, 1, 21}, Value: info}},
	}, c.Certificate, key, c.key)
}
