package snp

import (
	"context"
	"crypto/sha512"
	"fmt"

	"github.com/google/go-configfs-tsm/report"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
)

// serviceProvider is how the kernel names an SVSM in its configfs.
const serviceProvider = "svsm"

// ServiceReportData is what a report covers that an SVSM made for one of its
// services: SHA-512 over the nonce and the service's manifest, by AMD's "Secure
// VM Service Module for SEV-SNP Guests" (publication 58019), attestation protocol.
func ServiceReportData(nonce [64]byte, manifest []byte) [64]byte {
	return sha512.Sum512(append(append([]byte(nil), nonce[:]...), manifest...))
}

// CollectService asks the SVSM below this guest for a report over nonce and the
// manifest of the service with this GUID. A machine without an SVSM gives an
// error that wraps [attestation.ErrNoDevice].
func (i *Issuer) CollectService(ctx context.Context, nonce [64]byte, guid string) (ev *attestv1.SNPEvidence, manifest []byte, err error) {
	t, err := i.opts.tsm()
	if err != nil {
		return nil, nil, fmt.Errorf("%w: no SVSM: %w", attestation.ErrNoDevice, err)
	}
	rsp, err := get(t.client, report.Request{
		InBlob: nonce[:], ServiceProvider: serviceProvider, ServiceGuid: guid, ServiceManifestVersion: "0",
	})
	if err != nil {
		return nil, nil, fmt.Errorf("%w: SVSM: %w", attestation.ErrNoDevice, err)
	}
	ev, err = i.wrap(ctx, rsp.OutBlob, rsp.AuxBlob, ServiceReportData(nonce, rsp.ManifestBlob))
	return ev, rsp.ManifestBlob, err
}
