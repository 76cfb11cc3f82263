package policy

import (
	"slices"

	"go.yaml.in/yaml/v3"

	"github.com/keyagent/keyagent/attestation"
)

// Kind is what a policy can say of one kind of evidence. [Builtin] has those of this
// package; attestation/kinds puts each beside its verifier.
type Kind struct {
	Name attestation.Kind
	// Carries are the kinds whose claims come inside this evidence, tied to one another.
	// A profile with a section for this kind demands no evidence of theirs.
	Carries []attestation.Kind
	// Trust makes an empty part of the trust section. Nil: the kind has none.
	Trust func() Trust
	// Section makes an empty section of a profile.
	Section func() Section
	// Reference makes a section that accepts exactly what claims say. source says to
	// people where the values come from.
	Reference func(c attestation.Claims, source string) (Section, error)
}

// Section is a profile's part about one kind of claims. It is decoded from YAML
// strictly.
type Section interface {
	// Check says whether the section is good, when the file is read.
	Check(c *Checker, pr *Profile, at Path)
	// Compare notes how verified claims differ from the section.
	Compare(d *Differences, claims attestation.Claims)
}

// Trust says who vouches for one kind of hardware. It is decoded from YAML strictly.
type Trust interface {
	// Check says whether it is good, and reads the files that it names.
	Check(c *Checker, at Path)
	// Vouchers counts those who vouch.
	Vouchers() int
	// Raw is what files and PEM in it say, in a fixed order: it is part of the policy's
	// hash.
	Raw() [][]byte
}

// Builtin are the kinds of this package, in the order in which profiles show them.
func Builtin() []Kind {
	return []Kind{
		{Name: attestation.Azure, Carries: []attestation.Kind{attestation.SNP, attestation.TDX, attestation.TPM},
			Trust: func() Trust { return &AzureTrust{} }, Section: func() Section { return &AzureProfile{} }, Reference: azureReference},
		{Name: attestation.SVSM, Carries: []attestation.Kind{attestation.SNP, attestation.TPM},
			Section: func() Section { return &SVSMProfile{} }, Reference: svsmReference},
		{Name: attestation.SNP, Trust: func() Trust { return &SNPTrust{} }, Section: func() Section { return &SNPProfile{} }, Reference: snpReference},
		{Name: attestation.TDX, Trust: func() Trust { return &TDXTrust{} }, Section: func() Section { return &TDXProfile{} }, Reference: tdxReference},
		{Name: attestation.Nitro, Trust: func() Trust { return &NitroTrust{} }, Section: func() Section { return &NitroProfile{} }, Reference: nitroReference},
		{Name: attestation.TPM, Trust: func() Trust { return &TPMTrust{} }, Section: func() Section { return &TPMProfile{} }, Reference: tpmReference},
	}
}

// kindOf finds a kind by its name.
func kindOf(kinds []Kind, name attestation.Kind) *Kind {
	if n := slices.IndexFunc(kinds, func(k Kind) bool { return k.Name == name }); n >= 0 {
		return &kinds[n]
	}
	return nil
}

// later is a part of the file that is decoded once it is known as what, as strictly as
// the rest of it.
type later struct{ decode func(any) error }

// UnmarshalYAML implements yaml's interface that hands over a function, because that one
// goes on refusing unknown fields; a yaml.Node would not.
func (l *later) UnmarshalYAML(decode func(any) error) error {
	l.decode = decode
	return nil
}

// MarshalYAML writes a profile as it is read, its sections in their order.
func (pr *Profile) MarshalYAML() (any, error) {
	out := &yaml.Node{Kind: yaml.MappingNode}
	add := func(name string, value any) error {
		var k, v yaml.Node
		k.SetString(name)
		if err := v.Encode(value); err != nil {
			return err
		}
		out.Content = append(out.Content, &k, &v)
		return nil
	}
	if err := add("name", pr.Name); err != nil {
		return nil, err
	}
	if pr.ShowMismatch {
		if err := add("show_mismatch", true); err != nil {
			return nil, err
		}
	}
	for _, p := range pr.parts {
		if err := add(string(p.kind.Name), p.section); err != nil {
			return nil, err
		}
	}
	return out, nil
}
