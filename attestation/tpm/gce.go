package tpm

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"embed"
	"encoding/asn1"
	"encoding/pem"
	"fmt"
	"slices"

	"github.com/keyagent/keyagent/attestation/certificate"
	"github.com/keyagent/keyagent/attestation/facts"
)

// Google's authorities for the attestation keys of vTPMs, as they are published
// for verification in google/go-tpm-tools (server/ca-certs): the one in use since
// 2022, which has a second intermediate since May 2026, and the one before, whose
// certificates live until 2051. SHA-256 of the roots: 594759594b9b61524f6c8ef668f7177f7b9066bc0674f2f49fe9e052be78beb2 and
// 9bd5285f8fb18502a7947e621ffd470266f49fcd3b73e19a190f690ad32a7caf.
//
//go:embed google/*.pem
var googleCertificates embed.FS

// Google returns the roots, all named "google", of the certificates that vTPMs of
// Google Compute Engine have for their attestation keys, with the intermediates
// in use. Such a certificate says which instance the vTPM belongs to.
func Google() []Root {
	return []Root{
		{Name: "google", Certificate: embedded("ek-ak-ca-root"), Intermediates: []*x509.Certificate{embedded("ek-ak-ca-intermediate-v3"), embedded("ek-ak-ca-intermediate-2026")}},
		{Name: "google", Certificate: embedded("cloud-host-root"), Intermediates: []*x509.Certificate{embedded("cloud-host-signer-2020"), embedded("cloud-host-signer-2021")}},
	}
}

// embedded parses what is part of the program; a test parses all of them.
func embedded(name string) *x509.Certificate {
	text, err := googleCertificates.ReadFile("google/" + name + ".pem")
	if err != nil {
		panic(err)
	}
	block, _ := pem.Decode(text)
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		panic(err)
	}
	return c
}

// tcg-kp-AIKCertificate of the TCG's credential profiles. Google's certificates
// of attestation keys have tcg-kp-EKCertificate instead; what they may be used
// for is said by the root that the policy names for attestation keys.
var oidAKCertificate = asn1.ObjectIdentifier{2, 23, 133, 8, 3}

// oidInstance is the extension with an instance's identity, documented by
// google/go-tpm-tools as cloudComputeInstanceIdentifier.
var oidInstance = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 11129, 2, 1, 21}

// vouchAK demands a certificate of exactly the offered AK under a root for AKs.
func (v *Verifier) vouchAK(trust Trust, o offer) (hardware, error) {
	if len(trust.AKRoots) == 0 {
		return hardware{}, fmt.Errorf("%w: its certificate is offered, and no root for attestation keys is configured (hint: trust.tpm.ak_roots, or set the node's tpm.ak to own)", ErrAKUntrusted)
	}
	if len(o.akCertificate) > maxCertificate {
		return hardware{}, fmt.Errorf("%w: certificate of %d bytes", ErrMalformed, len(o.akCertificate))
	}
	leaf, err := certificate.Parse(o.akCertificate)
	if err != nil {
		return hardware{}, fmt.Errorf("%w: certificate: %w", ErrMalformed, err)
	}
	// As with EKs, crypto/x509 leaves a critical name of the directory to its caller.
	leaf.UnhandledCriticalExtensions = slices.DeleteFunc(leaf.UnhandledCriticalExtensions,
		func(oid asn1.ObjectIdentifier) bool { return oid.Equal(oidSubjectAltName) && hasDirectoryName(leaf) })
	switch {
	case len(leaf.UnhandledCriticalExtensions) > 0:
		return hardware{}, fmt.Errorf("%w: unknown critical extension %v", ErrAKCertificate, leaf.UnhandledCriticalExtensions[0])
	case leaf.IsCA:
		return hardware{}, fmt.Errorf("%w: it is a certificate authority's", ErrAKCertificate)
	case len(leaf.ExtKeyUsage)+len(leaf.UnknownExtKeyUsage) > 0 && !slices.ContainsFunc(leaf.UnknownExtKeyUsage, isTPMUsage):
		return hardware{}, fmt.Errorf("%w: its extended key usage is not a TPM's", ErrAKCertificate)
	case !samePublicKey(*o.ak.public, leaf):
		return hardware{}, fmt.Errorf("%w: it is another key's", ErrAKCertificate)
	}
	root, until, err := v.chain(trust.AKRoots, leaf, o.akIntermediates, akChainErrors)
	if err != nil {
		return hardware{}, err
	}
	digest, err := EKDigest(o.ak.Key)
	if err != nil {
		return hardware{}, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	hw := hardware{identity: digest, trust: "ak-root:" + root, until: until, facts: map[string]any{}}
	facts.TPMAK.Put(hw.facts, digest)
	facts.TPMAKIssuer.Put(hw.facts, leaf.Issuer.String())
	return hw, instanceFacts(leaf, hw.facts)
}

func isTPMUsage(oid asn1.ObjectIdentifier) bool {
	return oid.Equal(oidAKCertificate) || oid.Equal(oidEKCertificate)
}

// instance is the extension's content, as google/go-tpm-tools gives it.
type instance struct {
	Zone          string `asn1:"utf8"`
	ProjectNumber int64
	ProjectID     string `asn1:"utf8"`
	InstanceID    int64
	InstanceName  string             `asn1:"utf8"`
	Security      instanceProperties `asn1:"explicit,optional"`
}

type instanceProperties struct {
	Version    int64 `asn1:"explicit,tag:0,optional"`
	Production bool  `asn1:"explicit,tag:1,optional"`
}

// instanceFacts adds what the certificate says of an instance, if it does.
func instanceFacts(leaf *x509.Certificate, set map[string]any) error {
	n := slices.IndexFunc(leaf.Extensions, func(e pkix.Extension) bool { return e.Id.Equal(oidInstance) })
	if n < 0 {
		return nil
	}
	var i instance
	rest, err := asn1.Unmarshal(leaf.Extensions[n].Value, &i)
	if err != nil || len(rest) > 0 {
		return fmt.Errorf("%w: instance identity: %v", ErrAKCertificate, err)
	}
	if i.ProjectNumber < 0 || i.InstanceID < 0 {
		return fmt.Errorf("%w: instance identity with negative numbers", ErrAKCertificate)
	}
	facts.GCEZone.Put(set, i.Zone)
	facts.GCEProjectID.Put(set, i.ProjectID)
	facts.GCEInstanceName.Put(set, i.InstanceName)
	facts.GCEProjectNumber.Put(set, uint64(i.ProjectNumber))
	facts.GCEInstanceID.Put(set, uint64(i.InstanceID))
	facts.GCEProduction.Put(set, i.Security.Production)
	return nil
}
