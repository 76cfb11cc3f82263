package kinds

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/endorsement"
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

// Issuers returns the issuers of this machine's evidence, and what it found on
// the way. Without any hardware the error wraps [attestation.ErrNoDevice].
func (t Table) Issuers(ctx context.Context, o IssuerOptions) ([]attestation.Issuer, []Finding, error) {
	if len(o.Kinds) > 0 {
		return t.pinned(o)
	}
	findings := make([]Finding, len(t))
	for n, k := range t {
		how, err := k.Detect(ctx, o)
		findings[n] = Finding{Kind: k.Name, Found: err == nil, Why: how}
		if err != nil {
			findings[n].Why = strings.TrimPrefix(err.Error(), attestation.ErrNoDevice.Error()+": ")
		}
	}
	t.choose(findings)
	var issuers []attestation.Issuer
	for n, k := range t {
		if !findings[n].Used {
			continue
		}
		i, err := k.Issuer(o)
		if err != nil {
			return nil, findings, err
		}
		issuers = append(issuers, i)
	}
	if len(issuers) == 0 {
		return nil, findings, fmt.Errorf("%w: looked for %s", attestation.ErrNoDevice, strings.Join(t.Names(), ", "))
	}
	return issuers, findings, nil
}

// choose takes what is strongest: a kind that carries others instead of those, since it
// says all that they would say and ties them together, else all that was found.
func (t Table) choose(findings []Finding) {
	for n := range findings {
		f := &findings[n]
		f.Used = f.Found
		for c, carrier := range t {
			if f.Used && findings[c].Found && slices.Contains(carrier.Carries, f.Kind) {
				f.Used = false
				f.Why += fmt.Sprintf("; %s evidence has it, tied to the hardware", carrier.Name)
			}
		}
	}
}

// pinned makes exactly the evidence that the operator names.
func (t Table) pinned(o IssuerOptions) ([]attestation.Issuer, []Finding, error) {
	var issuers []attestation.Issuer
	var findings []Finding
	for _, name := range o.Kinds {
		k, ok := t.find(name)
		if !ok {
			return nil, nil, fmt.Errorf("%q is no kind of evidence (hint: %s)", name, strings.Join(t.Names(), ", "))
		}
		i, err := k.Issuer(o)
		if err != nil {
			return nil, nil, err
		}
		issuers = append(issuers, i)
		findings = append(findings, Finding{Kind: name, Found: true, Used: true, Why: "the configuration names it"})
	}
	return issuers, findings, nil
}

// Parse reads a list of kinds such as "snp,tpm".
func (t Table) Parse(list []string) ([]attestation.Kind, error) {
	var kinds []attestation.Kind
	for _, name := range list {
		k := attestation.Kind(strings.TrimSpace(name))
		if _, ok := t.find(k); !ok || slices.Contains(kinds, k) {
			return nil, fmt.Errorf("%q is no kind of evidence, or is named twice (hint: %s)", name, strings.Join(t.Names(), ", "))
		}
		kinds = append(kinds, k)
	}
	return kinds, nil
}
