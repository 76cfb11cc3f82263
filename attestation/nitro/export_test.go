package nitro

import "time"

// VerifyEnclave is a verification of the document of an enclave, which the package
// itself refuses: what AWS's PKI and signatures are like is the same.
func VerifyEnclave(trust Trust, data []byte, now time.Time) (module string, err error) {
	s, d, err := parse(data)
	if s == nil || d == nil {
		return "", err
	}
	cert, key, err := d.certificate()
	if err != nil {
		return "", err
	}
	if _, _, err := chain(trust, cert, d.Bundle, now); err != nil {
		return "", err
	}
	if !s.verify(key) {
		return "", ErrSignature
	}
	return d.ModuleID, nil
}

// DocumentOf and Request are the module's messages.
var (
	DocumentOf = documentOf
	Request    = request
)
