package certificate_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"math/big"
	"testing"
	"time"

	"github.com/keyagent/keyagent/attestation/certificate"
)

func must[T any](t testing.TB) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

type issuer struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newIssuer(t testing.TB) issuer {
	key := must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	c := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "maker"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	der := must[[]byte](t)(x509.CreateCertificate(rand.Reader, c, c, key.Public(), key))
	return issuer{must[*x509.Certificate](t)(x509.ParseCertificate(der)), key}
}

// issue signs a certificate whose serial number has these very bytes.
func (i issuer) issue(t testing.TB, serial []byte, pub any) []byte {
	t.Helper()
	plain := must[[]byte](t)(x509.CreateCertificate(rand.Reader, &x509.Certificate{SerialNumber: big.NewInt(7), Subject: pkix.Name{CommonName: "TPM"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}, i.cert, pub, i.key))
	return i.resign(t, plain, func(tbs []asn1.RawValue) {
		tbs[1] = asn1.RawValue{Tag: asn1.TagInteger, Bytes: serial}
	})
}

// resign changes the fields of a certificate and signs it again.
func (i issuer) resign(t testing.TB, der []byte, change func(tbs []asn1.RawValue)) []byte {
	t.Helper()
	var parts, tbs []asn1.RawValue
	must[[]byte](t)(asn1.Unmarshal(der, &parts))
	must[[]byte](t)(asn1.Unmarshal(parts[0].FullBytes, &tbs))
	change(tbs)
	parts[0] = asn1.RawValue{FullBytes: must[[]byte](t)(asn1.Marshal(tbs))}
	sum := sha256.Sum256(parts[0].FullBytes)
	signature := must[[]byte](t)(i.key.Sign(rand.Reader, sum[:], crypto.SHA256))
	parts[2] = asn1.RawValue{FullBytes: must[[]byte](t)(asn1.Marshal(asn1.BitString{Bytes: signature, BitLength: 8 * len(signature)}))}
	return must[[]byte](t)(asn1.Marshal(parts))
}

func TestSerialNumbersAsMakersWriteThem(t *testing.T) {
	m, stranger := newIssuer(t), newIssuer(t)
	for name, tc := range map[string]struct {
		serial []byte
		want   int64
		strict bool // crypto/x509 reads it too
	}{
		"plain":           {[]byte{0x12, 0x34}, 0x1234, true},
		"padded":          {[]byte{0x00, 0x00, 0x12, 0x34}, 0x1234, false},
		"negative":        {[]byte{0xED, 0xCC}, -0x1234, false},
		"padded negative": {[]byte{0xFF, 0xFF, 0xED, 0xCC}, -0x1234, false},
	} {
		t.Run(name, func(t *testing.T) {
			der := m.issue(t, tc.serial, m.key.Public())
			if _, err := x509.ParseCertificate(der); (err == nil) != tc.strict {
				t.Fatalf("crypto/x509 says %v", err)
			}
			c, err := certificate.Parse(der)
			if err != nil {
				t.Fatal(err)
			}
			if c.SerialNumber.Int64() != tc.want || !bytes.Equal(c.Raw, der) {
				t.Errorf("serial number %v", c.SerialNumber)
			}
			if err := c.CheckSignatureFrom(m.cert); err != nil {
				t.Errorf("the maker's signature: %v", err)
			}
			if c.CheckSignatureFrom(stranger.cert) == nil {
				t.Error("a stranger's signature is good")
			}
			pool := x509.NewCertPool()
			pool.AddCert(m.cert)
			if _, err := c.Verify(x509.VerifyOptions{Roots: pool, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
				t.Errorf("the chain: %v", err)
			}
			forged := bytes.Clone(der)
			forged[bytes.Index(der, []byte("TPM"))] ^= 1
			if f, err := certificate.Parse(forged); err == nil && f.CheckSignatureFrom(m.cert) == nil {
				t.Error("another name is covered by the signature")
			}
		})
	}
	for name, serial := range map[string][]byte{"no serial number": {}, "one without an end": make([]byte, 65)} {
		if _, err := certificate.Parse(m.issue(t, serial, m.key.Public())); err == nil {
			t.Errorf("%s is read", name)
		}
	}
}

func TestAnRSAKeyThatIsMarkedForOAEPIsRead(t *testing.T) {
	m := newIssuer(t)
	key := must[*rsa.PrivateKey](t)(rsa.GenerateKey(rand.Reader, 2048))
	oaep := m.resign(t, m.issue(t, []byte{7}, key.Public()), func(tbs []asn1.RawValue) {
		var spki []asn1.RawValue
		must[[]byte](t)(asn1.Unmarshal(tbs[6].FullBytes, &spki))
		spki[0] = asn1.RawValue{FullBytes: must[[]byte](t)(asn1.Marshal([]asn1.ObjectIdentifier{{1, 2, 840, 113549, 1, 1, 7}}))}
		tbs[6] = asn1.RawValue{FullBytes: must[[]byte](t)(asn1.Marshal(spki))}
	})
	c, err := certificate.Parse(oaep)
	if err != nil || !key.PublicKey.Equal(c.PublicKey) {
		t.Fatalf("%v, %T", err, c.PublicKey)
	}
}

func TestUnwrapTakesACertificateOutOfItsIndex(t *testing.T) {
	m := newIssuer(t)
	der := m.cert.Raw
	size := []byte{byte(len(der) >> 8), byte(len(der))}
	larger := []byte{byte((len(der) + 2) >> 8), byte(len(der) + 2)}
	for name, nv := range map[string][]byte{
		"alone":                    der,
		"filled with zeros":        append(bytes.Clone(der), make([]byte, 100)...),
		"filled with ff":           append(bytes.Clone(der), bytes.Repeat([]byte{0xFF}, 100)...),
		"filled with 11":           append(bytes.Clone(der), bytes.Repeat([]byte{0x11}, 700)...),
		"with a header":            append(append([]byte{0x10, 0x01, 0x00}, size...), der...),
		"with both headers":        append(append(append([]byte{0x10, 0x01, 0x00}, larger...), 0x10, 0x02), der...),
		"with a header and filled": append(append(append([]byte{0x10, 0x01, 0x00}, size...), der...), bytes.Repeat([]byte{0x11}, 9)...),
	} {
		if got := certificate.Unwrap(nv); !bytes.Equal(got, der) {
			t.Errorf("%s: %d bytes of %d", name, len(got), len(der))
		}
	}
	for name, nv := range map[string][]byte{
		"followed by something": append(bytes.Clone(der), 1, 2, 3),
		"cut":                   der[:100],
		"empty":                 {},
		"a header alone":        {0x10, 0x01, 0x00, 0xFF, 0xFF},
	} {
		if got := certificate.Unwrap(nv); bytes.Equal(got, der) {
			t.Errorf("%s gives a certificate", name)
		}
	}
}

func TestSplitTakesConcatenatedCertificatesApart(t *testing.T) {
	a, b := newIssuer(t).cert, newIssuer(t).cert
	both := append(bytes.Clone(a.Raw), b.Raw...)
	for name, nv := range map[string][]byte{"exactly": both, "filled": append(bytes.Clone(both), make([]byte, 50)...)} {
		all, err := certificate.Split(nv, 2)
		if err != nil || len(all) != 2 || !all[0].Equal(a) || !all[1].Equal(b) {
			t.Errorf("%s: %d, %v", name, len(all), err)
		}
	}
	if all, err := certificate.Split(nil, 2); err != nil || len(all) != 0 {
		t.Error(all, err)
	}
	for name, nv := range map[string][]byte{"too many": append(bytes.Clone(both), a.Raw...), "cut": both[:len(both)-1], "with a tail": append(bytes.Clone(both), 1, 2)} {
		if _, err := certificate.Split(nv, 2); err == nil {
			t.Errorf("%s is read", name)
		}
	}
}

func FuzzCertificate(f *testing.F) {
	m := newIssuer(f)
	f.Add(m.issue(f, []byte{0, 0, 1}, m.key.Public()))
	f.Add(m.issue(f, []byte{0xED, 0xCC}, m.key.Public()))
	f.Add(append([]byte{0x10, 0x01, 0x00, 0x03, 0xF8}, m.cert.Raw...))
	f.Fuzz(func(t *testing.T, data []byte) {
		if c, err := certificate.Parse(data); err == nil && !bytes.Equal(c.Raw, data) {
			t.Error("another certificate came out")
		}
		if got := certificate.Unwrap(data); !bytes.Contains(data, got) {
			t.Error("other bytes came out")
		}
		if all, err := certificate.Split(data, 4); err == nil && len(all) > 4 {
			t.Error("too many")
		}
	})
}
