package kinds

import (
	"crypto/x509"
	"encoding/pem"
	"fmt"

	"github.com/keyagent/keyagent/attestation/certificate"
	"github.com/keyagent/keyagent/attestation/tpm"
	"github.com/keyagent/keyagent/internal/config"
)

// TPMConfig names the TPM of a machine, in the configuration of nodes and of the key
// service.
type TPMConfig struct {
	Device   string `yaml:"device,omitempty"`
	AK       string `yaml:"ak,omitempty"` // auto, own or cloud
	EK       string `yaml:"ek,omitempty"` // auto, rsa-2048 or ecc-p384
	EKPin    string `yaml:"ek_pin,omitempty"`
	EventLog string `yaml:"event_log,omitempty"`
	// EKIntermediates and AKIntermediates are files with certificates, in PEM or DER, that
	// lead from this machine's TPM to a root. What the TPM itself has need not be here.
	EKIntermediates []string `yaml:"ek_intermediates,omitempty"`
	AKIntermediates []string `yaml:"ak_intermediates,omitempty"`
}

// Options reads the files that the section names.
func (c TPMConfig) Options() (tpm.IssuerOptions, error) {
	o := tpm.IssuerOptions{Device: c.Device, AK: tpm.AKType(c.AK), EK: tpm.EKType(c.EK), EKPin: c.EKPin, EventLog: c.EventLog}
	var err error
	if o.EKIntermediates, err = intermediates(c.EKIntermediates); err != nil {
		return o, fmt.Errorf("ek_intermediates: %w", err)
	}
	if o.AKIntermediates, err = intermediates(c.AKIntermediates); err != nil {
		return o, fmt.Errorf("ak_intermediates: %w", err)
	}
	_, err = tpm.NewIssuer(o)
	return o, err
}

// The bounds of files with intermediate certificates.
const (
	maxIntermediateFile = 1 << 20
	maxIntermediates    = 256
)

func intermediates(files []string) (all []*x509.Certificate, err error) {
	for _, path := range files {
		data, err := config.ReadPublicFile(path, maxIntermediateFile)
		if err != nil {
			return nil, err
		}
		var der []byte
		for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
			if block.Type == "CERTIFICATE" {
				der = append(der, block.Bytes...)
			}
		}
		if der == nil {
			der = data
		}
		some, err := certificate.Split(der, maxIntermediates)
		if err == nil && len(some) == 0 {
			err = fmt.Errorf("it holds no certificate")
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		all = append(all, some...)
	}
	return all, nil
}
