package tpm

import (
	"crypto/x509"
	"fmt"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/keyagent/keyagent/attestation/certificate"
)

// AKType chooses the attestation key that an issuer uses.
type AKType string

// An attestation key of our own is tied to the TPM by its EK. One that the cloud
// provisioned has a certificate, which says whose instance it is. Auto takes the
// cloud's where there is one.
const (
	AKAuto  AKType = "auto"
	AKOwn   AKType = "own"
	AKCloud AKType = "cloud"
)

// cloudAKs are the NV indices where Google Compute Engine keeps the certificate
// and the template of an attestation key (google/go-tpm-tools, client/handles.go).
// ECC comes first: its signatures are faster.
var cloudAKs = []struct{ certificate, template tpm2.TPMHandle }{
	{0x01c10002, 0x01c10003},
	{0x01c10000, 0x01c10001},
}

// loadCloudAK makes the cloud's AK from its template. A TPM without one gives no
// certificate and no error.
func loadCloudAK(t transport.TPM) (object, *x509.Certificate, error) {
	for _, k := range cloudAKs {
		der, err := readNV(t, k.certificate)
		if err != nil {
			return object{}, nil, err
		}
		template, err := readNV(t, k.template)
		if err != nil {
			return object{}, nil, err
		}
		if der == nil || template == nil {
			continue
		}
		cert, err := certificate.Parse(certificate.Unwrap(der))
		if err != nil {
			return object{}, nil, fmt.Errorf("attestation key certificate at NV index %#x: %w", uint32(k.certificate), err)
		}
		public, err := tpm2.Unmarshal[tpm2.TPMTPublic](template)
		if err != nil {
			return object{}, nil, fmt.Errorf("attestation key template at NV index %#x: %w", uint32(k.template), err)
		}
		o, err := createPrimary(t, *public)
		if err != nil {
			return object{}, nil, fmt.Errorf("make the cloud's attestation key: %w", err)
		}
		if !samePublicKey(o.public, cert) {
			o.flush(t)
			return object{}, nil, fmt.Errorf("the cloud's attestation key is not the one in its certificate (hint: was the TPM cleared? ak: own uses another)")
		}
		return o, cert, nil
	}
	return object{}, nil, nil
}
