package tpm

import (
	"crypto"
	"crypto/sha256"
	"fmt"

	"github.com/google/go-tpm/tpm2"
)

// AK is the public half of an attestation key with fit attributes. Whether it
// is in any TPM is another question.
type AK struct {
	Key  crypto.PublicKey // *ecdsa.PublicKey over P-256, or *rsa.PublicKey of 2048 bits or more
	Name []byte           // TPM2B_NAME contents

	public *tpm2.TPMTPublic
}

// ParseAK parses a TPMT_PUBLIC and demands a key that only a TPM can hold and
// that signs only what the TPM itself made: SHA-256 names, ECDSA over P-256 or
// RSASSA of at least 2048 bits, with SHA-256.
func ParseAK(public []byte) (AK, error) {
	pub, err := parse[tpm2.TPMTPublic]("attestation key", public, maxPublic)
	if err != nil {
		return AK{}, err
	}
	if pub.NameAlg != tpm2.TPMAlgSHA256 {
		return AK{}, fmt.Errorf("%w: only keys with SHA-256 names are accepted", ErrAKUnfit)
	}
	// The name of an object is the digest of its public area, which is canonical
	// here: TPM 2.0 Library part 1, section 16.
	sum := sha256.Sum256(public)
	ak := AK{Name: append([]byte{0x00, 0x0B}, sum[:]...), public: pub}
	ak.Key, err = checkAK(pub)
	return ak, err
}

func checkAK(pub *tpm2.TPMTPublic) (crypto.PublicKey, error) {
	a := pub.ObjectAttributes
	for _, attr := range []struct {
		name string
		ok   bool
	}{
		{"fixedTPM is not set", a.FixedTPM},
		{"fixedParent is not set", a.FixedParent},
		{"sensitiveDataOrigin is not set", a.SensitiveDataOrigin},
		{"restricted is not set", a.Restricted},
		{"sign is not set", a.SignEncrypt},
		{"decrypt is set", !a.Decrypt},
		// A key from outside has no secret in the TPM, but may have a policy
		// that authorises the activation of credentials.
		{"it has a policy", len(pub.AuthPolicy.Buffer) == 0},
	} {
		if !attr.ok {
			return nil, fmt.Errorf("%w: %s", ErrAKUnfit, attr.name)
		}
	}
	switch pub.Type {
	case tpm2.TPMAlgECC:
		return checkECC(pub)
	case tpm2.TPMAlgRSA:
		return checkRSA(pub)
	}
	return nil, fmt.Errorf("%w: neither an ECC nor an RSA key", ErrAKUnfit)
}

func checkECC(pub *tpm2.TPMTPublic) (crypto.PublicKey, error) {
	parms, err := pub.Parameters.ECCDetail()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrAKUnfit, err)
	}
	scheme, err := parms.Scheme.Details.ECDSA()
	if err != nil || parms.Scheme.Scheme != tpm2.TPMAlgECDSA || scheme.HashAlg != tpm2.TPMAlgSHA256 || parms.CurveID != tpm2.TPMECCNistP256 {
		return nil, fmt.Errorf("%w: of ECC keys only ECDSA over P-256 with SHA-256 is accepted", ErrAKUnfit)
	}
	point, err := pub.Unique.ECC()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrAKUnfit, err)
	}
	key, err := tpm2.ECDSAPub(parms, point)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrAKUnfit, err)
	}
	if _, err := key.ECDH(); err != nil { // refuses a point off the curve
		return nil, fmt.Errorf("%w: %w", ErrAKUnfit, err)
	}
	return key, nil
}

// The RSA keys that clouds put into their vTPMs have 2048 bits; larger ones
// than these are only work for a verifier.
const (
	minRSABits = 2048
	maxRSABits = 4096
)

func checkRSA(pub *tpm2.TPMTPublic) (crypto.PublicKey, error) {
	parms, err := pub.Parameters.RSADetail()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrAKUnfit, err)
	}
	scheme, err := parms.Scheme.Details.RSASSA()
	if err != nil || parms.Scheme.Scheme != tpm2.TPMAlgRSASSA || scheme.HashAlg != tpm2.TPMAlgSHA256 {
		return nil, fmt.Errorf("%w: of RSA keys only RSASSA with SHA-256 is accepted", ErrAKUnfit)
	}
	modulus, err := pub.Unique.RSA()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrAKUnfit, err)
	}
	key, err := tpm2.RSAPub(parms, modulus)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrAKUnfit, err)
	}
	if bits := key.N.BitLen(); bits < minRSABits || bits > maxRSABits || bits != int(parms.KeyBits) || key.E != 65537 {
		return nil, fmt.Errorf("%w: RSA key of %d bits with exponent %d", ErrAKUnfit, bits, key.E)
	}
	return key, nil
}
