package setup

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/google/go-tpm/tpm2/transport"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/azure"
	"github.com/keyagent/keyagent/attestation/azure/maa"
	"github.com/keyagent/keyagent/attestation/endorsement"
	"github.com/keyagent/keyagent/attestation/nitro"
	"github.com/keyagent/keyagent/attestation/snp"
	"github.com/keyagent/keyagent/attestation/svsm"
	"github.com/keyagent/keyagent/attestation/tdx"
	"github.com/keyagent/keyagent/attestation/tpm"
)

// IssuerOptions configure [Issuers].
type IssuerOptions struct {
	// Kinds, if set, are exactly the evidence to give. Empty: the strongest that
	// this machine has.
	Kinds []attestation.Kind
	TPM   tpm.IssuerOptions
	// Metadata is the base URL of Azure's metadata service. Default Azure's own.
	Metadata string
	// Attestation is the URL of a Microsoft Attestation service. Empty: no token is
	// ever asked for.
	Attestation string
	// Endorsements has what the platform does not hand over. Nil: evidence goes
	// without.
	Endorsements endorsement.Source
	// Log hears of endorsements that evidence goes without. Default nobody.
	Log func(msg string, err error)
}

// Finding says of one kind whether this machine has it, and whether it is used.
type Finding struct {
	Kind  attestation.Kind `json:"kind"`
	Found bool             `json:"found"`
	Used  bool             `json:"used"`
	Why   string           `json:"why"`
}

func (f Finding) String() string {
	switch {
	case f.Used:
		return fmt.Sprintf("%s: used, %s", f.Kind, f.Why)
	case f.Found:
		return fmt.Sprintf("%s: there, not used, %s", f.Kind, f.Why)
	}
	return fmt.Sprintf("%s: not there, %s", f.Kind, f.Why)
}

// builder makes and looks for one kind.
type builder struct {
	kind   attestation.Kind
	build  func() (attestation.Issuer, error)
	detect func(ctx context.Context) (how string, err error)
}

func (o IssuerOptions) builders() []builder {
	if o.TPM.Log == nil {
		o.TPM.Log = o.Log
	}
	snpOpts := snp.IssuerOptions{Endorsements: o.Endorsements, Log: o.Log}
	tdxOpts := tdx.IssuerOptions{Endorsements: o.Endorsements, Log: o.Log}
	// The TPM of an SVSM has an RSA key by that specification, and no certificate
	// that would say which of its keys is meant.
	svsmTPM := o.TPM
	svsmTPM.AK = tpm.AKOwn
	if svsmTPM.EK == "" || svsmTPM.EK == tpm.EKAuto {
		svsmTPM.EK = tpm.EKRSA2048
	}
	azureOpts := azure.IssuerOptions{Device: o.TPM.Device, EventLog: o.TPM.EventLog, IMDS: o.Metadata, Endorsements: o.Endorsements, Log: o.Log}
	nitroOpts := nitro.IssuerOptions{Open: o.openTPM}
	return []builder{
		{attestation.Azure, func() (attestation.Issuer, error) { return newAzure(azureOpts, o.Attestation) }, func(context.Context) (string, error) {
			below, err := azure.Detect(azureOpts)
			return fmt.Sprintf("the vTPM has a report of Azure's, with %s below", below), err
		}},
		{attestation.SVSM, func() (attestation.Issuer, error) { return newSVSM(snpOpts, svsmTPM) }, func(ctx context.Context) (string, error) {
			s, err := snp.NewIssuer(snpOpts)
			if err != nil {
				return "", err
			}
			return "an SVSM answers through configfs-tsm", svsm.Detect(ctx, s)
		}},
		{attestation.SNP, func() (attestation.Issuer, error) { return snp.NewIssuer(snpOpts) }, func(context.Context) (string, error) {
			how, err := snp.Detect(snpOpts)
			return "reports through " + how, err
		}},
		{attestation.TDX, func() (attestation.Issuer, error) { return tdx.NewIssuer(tdxOpts) }, func(context.Context) (string, error) {
			how, err := tdx.Detect(tdxOpts)
			return "quotes through " + how, err
		}},
		{attestation.Nitro, func() (attestation.Issuer, error) { return nitro.NewIssuer(nitroOpts) }, func(ctx context.Context) (string, error) {
			i, err := nitro.NewIssuer(nitroOpts)
			if err != nil {
				return "", err
			}
			a, err := i.Begin(ctx)
			if err != nil {
				return "", err
			}
			return "the TPM is AWS's NitroTPM", a.Close()
		}},
		{attestation.TPM, func() (attestation.Issuer, error) { return tpm.NewIssuer(o.TPM) }, func(context.Context) (string, error) {
			t, err := o.openTPM()
			if err != nil {
				return "", err
			}
			return "a TPM at " + o.device(), t.Close()
		}},
	}
}

func (o IssuerOptions) device() string {
	if o.TPM.Device == "" {
		return tpm.DefaultDevice
	}
	return o.TPM.Device
}

func (o IssuerOptions) openTPM() (transport.TPMCloser, error) { return tpm.OpenDevice(o.device()) }

func newAzure(opts azure.IssuerOptions, attestationURL string) (attestation.Issuer, error) {
	if attestationURL != "" {
		var err error
		if opts.Token, err = maa.New(maa.Options{URL: attestationURL}); err != nil {
			return nil, err
		}
	}
	return azure.NewIssuer(opts)
}

func newSVSM(s snp.IssuerOptions, t tpm.IssuerOptions) (attestation.Issuer, error) {
	si, err := snp.NewIssuer(s)
	if err != nil {
		return nil, err
	}
	ti, err := tpm.NewIssuer(t)
	if err != nil {
		return nil, err
	}
	return svsm.NewIssuer(si, ti)
}

// Issuers returns the issuers of this machine's evidence, and what it found on
// the way. Without any hardware the error wraps [attestation.ErrNoDevice].
func Issuers(ctx context.Context, o IssuerOptions) ([]attestation.Issuer, []Finding, error) {
	all := o.builders()
	if len(o.Kinds) > 0 {
		return pinned(all, o.Kinds)
	}
	findings := make([]Finding, len(all))
	for n, b := range all {
		how, err := b.detect(ctx)
		findings[n] = Finding{Kind: b.kind, Found: err == nil, Why: how}
		if err != nil {
			findings[n].Why = strings.TrimPrefix(err.Error(), attestation.ErrNoDevice.Error()+": ")
		}
	}
	choose(findings)
	var issuers []attestation.Issuer
	for n, b := range all {
		if !findings[n].Used {
			continue
		}
		i, err := b.build()
		if err != nil {
			return nil, findings, err
		}
		issuers = append(issuers, i)
	}
	if len(issuers) == 0 {
		return nil, findings, fmt.Errorf("%w: looked for %s", attestation.ErrNoDevice, strings.Join(kindNames(all), ", "))
	}
	return issuers, findings, nil
}

// carriers are the kinds whose evidence ties a vTPM to the hardware below it.
// They say all that their parts would say, and more.
var carriers = map[attestation.Kind][]attestation.Kind{
	attestation.Azure: {attestation.SNP, attestation.TDX, attestation.TPM},
	attestation.SVSM:  {attestation.SNP, attestation.TPM},
}

// choose takes what is strongest: a carrier instead of its parts, else all that
// was found.
func choose(findings []Finding) {
	for n := range findings {
		f := &findings[n]
		f.Used = f.Found
		for carrier, parts := range carriers {
			has := slices.ContainsFunc(findings, func(o Finding) bool { return o.Kind == carrier && o.Found })
			if f.Used && has && slices.Contains(parts, f.Kind) {
				f.Used = false
				f.Why += fmt.Sprintf("; %s evidence has it, tied to the hardware", carrier)
			}
		}
	}
}

// pinned makes exactly the evidence that the operator names.
func pinned(all []builder, kinds []attestation.Kind) ([]attestation.Issuer, []Finding, error) {
	var issuers []attestation.Issuer
	var findings []Finding
	for _, k := range kinds {
		n := slices.IndexFunc(all, func(b builder) bool { return b.kind == k })
		if n < 0 {
			return nil, nil, fmt.Errorf("%q is no kind of evidence (hint: %s)", k, strings.Join(kindNames(all), ", "))
		}
		i, err := all[n].build()
		if err != nil {
			return nil, nil, err
		}
		issuers = append(issuers, i)
		findings = append(findings, Finding{Kind: k, Found: true, Used: true, Why: "the configuration names it"})
	}
	return issuers, findings, nil
}

func kindNames(all []builder) []string {
	var names []string
	for _, b := range all {
		names = append(names, string(b.kind))
	}
	return names
}

// ParseKinds reads a list such as "snp,tpm".
func ParseKinds(list []string) ([]attestation.Kind, error) {
	var kinds []attestation.Kind
	known := kindNames(IssuerOptions{}.builders())
	for _, name := range list {
		k := attestation.Kind(strings.TrimSpace(name))
		if !slices.Contains(known, string(k)) || slices.Contains(kinds, k) {
			return nil, fmt.Errorf("%q is no kind of evidence, or is named twice (hint: %s)", name, strings.Join(known, ", "))
		}
		kinds = append(kinds, k)
	}
	return kinds, nil
}
