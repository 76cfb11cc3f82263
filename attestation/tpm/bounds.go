package tpm

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"fmt"
)

// maxRSAExponent, maxRSABits and the curves bound the work of one signature by a
// certificate that a stranger sends: a chain of four whose every link takes a tenth of
// a second is easily made.
const maxRSAExponent = 65537

// checkCarried refuses an intermediate certificate whose key no maker's intermediate
// has. Roots are the operator's choice.
func checkCarried(c *x509.Certificate) error {
	switch key := c.PublicKey.(type) {
	case *rsa.PublicKey:
		if key.N.BitLen() > maxRSABits || key.E > maxRSAExponent {
			return fmt.Errorf("%w: intermediate certificate with a key of %d bits and exponent %d", ErrMalformed, key.N.BitLen(), key.E)
		}
	case *ecdsa.PublicKey:
		if key.Curve != elliptic.P256() && key.Curve != elliptic.P384() {
			return fmt.Errorf("%w: intermediate certificate with a key on %s; P-256 and P-384 are accepted", ErrMalformed, key.Curve.Params().Name)
		}
	default:
		return fmt.Errorf("%w: intermediate certificate with a key of type %T", ErrMalformed, key)
	}
	return nil
}

// maxName bounds what is shown of a name in a certificate, which strangers choose.
const maxName = 256

func shown(name fmt.Stringer) string {
	s := name.String()
	if len(s) > maxName {
		return s[:maxName] + "…"
	}
	return s
}
