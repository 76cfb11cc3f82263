package tpm

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"strings"
	"testing"
)

// Case 86: a stranger's certificates cost a bounded time, and a bounded line.
func TestACarriedCertificateHasAKeyThatMakersUse(t *testing.T) {
	curve := func(c elliptic.Curve) any {
		return must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(c, rand.Reader)).Public()
	}
	wide := new(big.Int).Lsh(big.NewInt(1), maxRSABits)
	for name, tt := range map[string]struct {
		key any
		ok  bool
	}{
		"P-256":          {curve(elliptic.P256()), true},
		"P-384":          {curve(elliptic.P384()), true},
		"RSA":            {&rsa.PublicKey{N: new(big.Int).Lsh(big.NewInt(1), 2047), E: 65537}, true},
		"P-521":          {curve(elliptic.P521()), false},
		"P-224":          {curve(elliptic.P224()), false},
		"Ed25519":        {must[ed25519.PublicKey](t)(func() (ed25519.PublicKey, error) { k, _, err := ed25519.GenerateKey(nil); return k, err }()), false},
		"a wide modulus": {&rsa.PublicKey{N: wide, E: 65537}, false},
		"an exponent":    {&rsa.PublicKey{N: big.NewInt(15), E: maxRSAExponent + 2}, false},
		"none":           {nil, false},
	} {
		if err := checkCarried(&x509.Certificate{PublicKey: tt.key}); (err == nil) != tt.ok || err != nil && !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v", name, err)
		}
	}
	long := pkix.Name{CommonName: strings.Repeat("x", 7<<10)}
	if s := shown(long); len(s) > maxName+8 {
		t.Errorf("%d bytes of a name", len(s))
	}
}
