package policy

import (
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/facts"
)

// AzureProfile says which confidential VMs of Azure are meant. What the report
// inside and the vTPM say is compared with the profile's snp or tdx section and
// its tpm section.
type AzureProfile struct {
	VMs   []string `yaml:"vms,omitempty"` // vmUniqueId
	AnyVM bool     `yaml:"any_vm,omitempty"`
	// Token is "required" if Microsoft Attestation has to agree as well.
	Token string   `yaml:"token,omitempty"`
	Allow []string `yaml:"allow,omitempty"`
}

var azureWeaknesses = []weakness{
	{"no-secure-boot", facts.AzureSecureBoot, true},
	{"console", facts.AzureConsoleEnabled, false},
}

// Check implements Section.
func (a *AzureProfile) Check(c *Checker, pr *Profile, at Path) {
	c.Demand((pr.SNP() == nil) != (pr.TDX() == nil), "azure has either SNP or TDX below it: exactly one of snp and tdx must be there", at...)
	c.ListOrAny(a.VMs, a.AnyVM, "any_vm", at.To("vms"))
	c.Filled(a.VMs, at.To("vms"))
	c.OneOf(a.Allow, words(azureWeaknesses), at.To("allow"))
	c.Demand(a.Token == "" || a.Token == "required", "must be required, or left out", at.To("token")...)
	c.Demand(a.Token == "" || c.trust.Azure().Issuer != "", "needs trust.azure, which says whose tokens", at.To("token")...)
}

// Compare implements Section.
func (a *AzureProfile) Compare(d *Differences, _ attestation.Claims) {
	if !a.AnyVM {
		d.Text("azure.vm", facts.AzureVMID, a.VMs)
	}
	if a.Token == "required" {
		d.Flag("azure.token", facts.AzureTokenVerified, true)
	}
	d.weaknesses("azure", azureWeaknesses, a.Allow)
}

// SVSMProfile says that a vTPM below SNP is meant, which the report vouches for.
// The snp section says which SVSM, the tpm section what booted on it.
type SVSMProfile struct{}

// Check implements Section.
func (*SVSMProfile) Check(c *Checker, pr *Profile, at Path) {
	c.Demand(pr.SNP() != nil && pr.TDX() == nil, "an SVSM is below SNP: it needs an snp section and no tdx section", at...)
}

func svsmReference(attestation.Claims, string) (Section, error) { return &SVSMProfile{}, nil }

// Compare implements Section: what the SVSM brings is compared by the snp and tpm sections.
func (*SVSMProfile) Compare(*Differences, attestation.Claims) {}

// NitroProfile holds reference values of an AWS NitroTPM.
type NitroProfile struct {
	Trust       []string `yaml:"trust"`               // "root:NAME"
	Instances   []string `yaml:"instances,omitempty"` // EC2 instance IDs
	AnyInstance bool     `yaml:"any_instance,omitempty"`
	PCRs        []PCR    `yaml:"pcrs"` // SHA-384
}

// Check implements Section.
func (n *NitroProfile) Check(c *Checker, _ *Profile, at Path) {
	c.Vouchers(n.Trust, namesOf("root:", c.trust.Nitro().Roots), at.To("trust"))
	c.ListOrAny(n.Instances, n.AnyInstance, "any_instance", at.To("instances"))
	c.Filled(n.Instances, at.To("instances"))
	c.checkPCRs(n.PCRs, 48, at.To("pcrs"))
}

// Compare implements Section.
func (n *NitroProfile) Compare(d *Differences, _ attestation.Claims) {
	d.Trust("nitro.trust", n.Trust)
	if !n.AnyInstance {
		d.Text("nitro.instance", facts.NitroInstanceID, n.Instances)
	}
	d.pcrs("nitro.", n.PCRs)
}

// Allowed says what the section leaves open.
func (a *AzureProfile) Allowed() (string, []string) { return every("VM", a.AnyVM), a.Allow }

func azureReference(c attestation.Claims, _ string) (Section, error) {
	return &AzureProfile{AnyVM: true, Allow: seen(c, azureWeaknesses)}, nil
}

// Allowed says what the section leaves open.
func (n *NitroProfile) Allowed() (string, []string) { return every("instance", n.AnyInstance), nil }

// WarnOnly names the registers that only warn.
func (n *NitroProfile) WarnOnly() []string { return warnOnly("nitro.pcr", n.PCRs) }

func nitroReference(c attestation.Claims, source string) (Section, error) {
	return &NitroProfile{Trust: []string{trustOr(c, "root:aws")}, AnyInstance: true, PCRs: pcrReferences(c, source)}, nil
}
