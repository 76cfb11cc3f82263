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

func (*AzureProfile) kind() attestation.Kind { return attestation.Azure }

func (a *AzureProfile) check(c *checker, _ *Profile, at path) {
	c.listOrAny(a.VMs, a.AnyVM, "any_vm", at.to("vms"))
	c.filled(a.VMs, at.to("vms"))
	c.oneOf(a.Allow, words(azureWeaknesses), at.to("allow"))
	c.demand(a.Token == "" || a.Token == "required", "must be required, or left out", at.to("token")...)
	c.demand(a.Token == "" || c.file.Trust.Azure.Issuer != "", "needs trust.azure, which says whose tokens", at.to("token")...)
}

func (a *AzureProfile) compare(d *differences, _ attestation.Claims) {
	if !a.AnyVM {
		d.text("azure.vm", facts.AzureVMID, a.VMs)
	}
	if a.Token == "required" {
		d.flag("azure.token", facts.AzureTokenVerified, true)
	}
	d.weaknesses("azure", azureWeaknesses, a.Allow)
}

// SVSMProfile says that a vTPM below SNP is meant, which the report vouches for.
// The snp section says which SVSM, the tpm section what booted on it.
type SVSMProfile struct{}

func (*SVSMProfile) kind() attestation.Kind { return attestation.SVSM }

func (*SVSMProfile) check(*checker, *Profile, path) {}

func (*SVSMProfile) compare(*differences, attestation.Claims) {}

// NitroProfile holds reference values of an AWS NitroTPM.
type NitroProfile struct {
	Trust       []string `yaml:"trust"`               // "root:NAME"
	Instances   []string `yaml:"instances,omitempty"` // EC2 instance IDs
	AnyInstance bool     `yaml:"any_instance,omitempty"`
	PCRs        []PCR    `yaml:"pcrs"` // SHA-384
}

func (*NitroProfile) kind() attestation.Kind { return attestation.Nitro }

func (n *NitroProfile) check(c *checker, _ *Profile, at path) {
	c.vouchers(n.Trust, namesOf("root:", c.file.Trust.Nitro.Roots), at.to("trust"))
	c.listOrAny(n.Instances, n.AnyInstance, "any_instance", at.to("instances"))
	c.filled(n.Instances, at.to("instances"))
	c.checkPCRs(n.PCRs, 48, at.to("pcrs"))
}

func (n *NitroProfile) compare(d *differences, _ attestation.Claims) {
	d.trust("nitro.trust", n.Trust)
	if !n.AnyInstance {
		d.text("nitro.instance", facts.NitroInstanceID, n.Instances)
	}
	d.pcrs("nitro.", n.PCRs)
}
