package facts

// Facts of a TPM's quote.
const (
	TPMEK           Fact[string] = "ek" // SHA-256 of the endorsement key
	TPMEKIssuer     Fact[string] = "ek_issuer"
	TPMAK           Fact[string] = "ak" // of a TPM that is named by its attestation key
	TPMAKIssuer     Fact[string] = "ak_issuer"
	TPMFirmware     Fact[string] = "firmware"
	TPMResetCount   Fact[uint64] = "reset_count"
	TPMRestartCount Fact[uint64] = "restart_count"
)

// Facts that Google's certificate of an attestation key says of the instance.
const (
	GCEProjectID     Fact[string] = "gce_project_id"
	GCEProjectNumber Fact[uint64] = "gce_project_number"
	GCEZone          Fact[string] = "gce_zone"
	GCEInstanceName  Fact[string] = "gce_instance_name"
	GCEInstanceID    Fact[uint64] = "gce_instance_id"
	GCEProduction    Fact[bool]   = "gce_production"
)
