package facts

// Facts of a TDX quote. Text is hex, and empty where the field is all zero.
const (
	TDXQuoteVersion   Fact[uint64] = "quote_version"
	TDXTEETCBSVN      Fact[string] = "tee_tcb_svn"
	TDXTEETCBSVN2     Fact[string] = "tee_tcb_svn_2"
	TDXAttributes     Fact[string] = "td_attributes"
	TDXXFAM           Fact[string] = "xfam"
	TDXMRSEAM         Fact[string] = "mr_seam"
	TDXMRSignerSEAM   Fact[string] = "mr_signer_seam"
	TDXSEAMAttributes Fact[string] = "seam_attributes"
	TDXMRConfigID     Fact[string] = "mr_config_id"
	TDXMROwner        Fact[string] = "mr_owner"
	TDXMROwnerConfig  Fact[string] = "mr_owner_config"
	TDXMRServiceTD    Fact[string] = "mr_service_td"
	TDXQESVN          Fact[uint64] = "qe_svn"
)

// Bits of a TD's attributes.
const (
	TDXSEPTVEDisable Fact[bool] = "sept_ve_disable"
	TDXMigratable    Fact[bool] = "migratable"
	TDXPKS           Fact[bool] = "pks"
	TDXKeyLocker     Fact[bool] = "key_locker"
	TDXPerfmon       Fact[bool] = "perfmon"
)

// Facts of the platform's certificate.
const (
	TDXFMSPC           Fact[string] = "fmspc"
	TDXPPID            Fact[string] = "ppid"
	TDXPIID            Fact[string] = "piid"
	TDXPCEID           Fact[string] = "pce_id"
	TDXCPUSVN          Fact[string] = "cpu_svn"
	TDXPCESVN          Fact[uint64] = "pce_svn"
	TDXCA              Fact[string] = "ca"
	TDXDynamicPlatform Fact[bool]   = "dynamic_platform"
	TDXCachedKeys      Fact[bool]   = "cached_keys"
	TDXSMTEnabled      Fact[bool]   = "smt_enabled"
)

// Facts of Intel's word on the platform's firmware.
const (
	TDXTCBStatus       Fact[string]   = "tcb_status"
	TDXModuleTCBStatus Fact[string]   = "module_tcb_status"
	TDXQETCBStatus     Fact[string]   = "qe_tcb_status"
	TDXTCBDate         Fact[string]   = "tcb_date"
	TDXTCBEvaluation   Fact[uint64]   = "tcb_evaluation_number"
	TDXAdvisories      Fact[[]string] = "advisories"
)
