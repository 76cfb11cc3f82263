package measure

import (
	"encoding/hex"
	"fmt"

	"github.com/google/gce-tcb-verifier/sev"
	"github.com/google/gce-tcb-verifier/tdx"
	"github.com/google/go-sev-guest/kds"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/policy"
	"github.com/keyagent/keyagent/internal/evidence"
	"github.com/keyagent/keyagent/internal/failure"
)

// maxFirmware bounds a firmware file in bytes.
const maxFirmware = 64 << 20

// fromFirmware computes what the hardware measures of a firmware file before it
// runs, as Google Compute Engine loads it. Other hosts load it differently, and
// their values come from evidence.
func (m *Request) fromFirmware(p *policy.Profile) error {
	fw, err := evidence.ReadBounded(m.Firmware, maxFirmware)
	if err != nil {
		return err
	}
	if m.Product == "" {
		mrtd, err := tdx.MRTD(tdx.LaunchOptionsDefault(""), fw)
		if err != nil {
			return failure.New(failure.Usage, fmt.Errorf("%s: %w", m.Firmware, err), "is it firmware for TDX? --product says that SNP is meant")
		}
		if p.TDX() == nil {
			p.Set(attestation.TDX, &policy.TDXProfile{Trust: []string{"root:intel"}})
		}
		return m.computed(&p.TDX().MRTD, mrtd[:])
	}
	product, err := kds.ParseProductLine(m.Product)
	if err != nil || m.VCPUs == 0 || m.VCPUs > 1024 {
		return failure.Newf(failure.Usage, "--product Milan --vcpus 4", "product %q with %d processors", m.Product, m.VCPUs)
	}
	digest, err := sev.LaunchDigest(&sev.LaunchOptions{Vcpus: int(m.VCPUs), Product: product.GetName()}, fw)
	if err != nil {
		return failure.New(failure.Usage, fmt.Errorf("%s: %w", m.Firmware, err), "is it firmware for SEV-SNP?")
	}
	if p.SNP() == nil {
		p.Set(attestation.SNP, &policy.SNPProfile{Trust: []string{"root:amd"}, Products: []string{m.Product}})
	}
	return m.computed(&p.SNP().Measurement, digest)
}

// computed replaces a measurement. One that a trusted machine says otherwise is
// an error: either the file or the machine is not what it is taken for.
func (m *Request) computed(v *policy.Values, digest []byte) error {
	value := hex.EncodeToString(digest)
	if len(v.Accept) == 1 && v.Accept[0] != value {
		return failure.Newf(failure.EvidenceRefused, "the machine runs other firmware, or its host loads it in another way",
			"%s gives %s, the evidence says %s", m.Firmware, value, v.Accept[0])
	}
	*v = policy.Values{Accept: []string{value}, Source: "computed from " + m.Firmware}
	return nil
}
