package facts

// Facts of a confidential VM of Azure.
const (
	AzureVMID            Fact[string] = "vm_id"
	AzureHCLVersion      Fact[uint64] = "hcl_version"
	AzureIsolation       Fact[string] = "isolation"
	AzureSecureBoot      Fact[bool]   = "secure_boot"
	AzureTPMEnabled      Fact[bool]   = "tpm_enabled"
	AzureTPMPersisted    Fact[bool]   = "tpm_persisted"
	AzureConsoleEnabled  Fact[bool]   = "console_enabled"
	AzureRootThumbprint  Fact[string] = "root_cert_thumbprint"
	AzureTokenVerified   Fact[bool]   = "token_verified"
	AzureTokenIssuer     Fact[string] = "token_issuer"
	AzureTokenCompliance Fact[string] = "token_compliance"
	AzureTokenPolicyHash Fact[string] = "token_policy_hash"
)

// Facts of an AWS NitroTPM.
const (
	NitroModuleID   Fact[string] = "module_id"
	NitroInstanceID Fact[string] = "instance_id"
	NitroTimestamp  Fact[uint64] = "timestamp" // milliseconds since 1970
)
