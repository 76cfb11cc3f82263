package facts

// Facts of an SEV-SNP report.
const (
	SNPProduct       Fact[string] = "product" // Milan, Genoa, Turin
	SNPReportVersion Fact[uint64] = "report_version"
	SNPSigner        Fact[string] = "signer" // vcek, vlek
	SNPChipID        Fact[string] = "chip_id"
	SNPCSP           Fact[string] = "csp_id" // of a VLEK
	SNPFamilyID      Fact[string] = "family_id"
	SNPImageID       Fact[string] = "image_id"
	SNPHostData      Fact[string] = "host_data"
	SNPIDKey         Fact[string] = "id_key_digest"
	SNPAuthorKey     Fact[string] = "author_key_digest"
	SNPReportID      Fact[string] = "report_id"
	SNPReportIDMA    Fact[string] = "report_id_ma"
	SNPVMPL          Fact[uint64] = "vmpl"
	SNPGuestSVN      Fact[uint64] = "guest_svn"
	SNPABIMajor      Fact[uint64] = "abi_major"
	SNPABIMinor      Fact[uint64] = "abi_minor"
	// Versions of the firmware, MAJOR.MINOR.BUILD.
	SNPVersionCurrent   Fact[string] = "version_current"
	SNPVersionCommitted Fact[string] = "version_committed"
	// Mitigation vectors, of reports from version 5 on.
	SNPLaunchMitigations  Fact[uint64] = "launch_mitigations"
	SNPCurrentMitigations Fact[uint64] = "current_mitigations"
	// Bits that have no name here: of the guest's policy, of the platform, and of what
	// the report says of its key. SNPUnknownBits says whether there are any.
	SNPPolicyUnknown   Fact[uint64] = "policy_unknown_bits"
	SNPPlatformUnknown Fact[uint64] = "platform_unknown_bits"
	SNPKeyUnknown      Fact[uint64] = "key_unknown_bits"
	SNPUnknownBits     Fact[bool]   = "unknown_bits"
)

// Bits of the guest's policy.
const (
	SNPSMTAllowed               Fact[bool] = "smt_allowed"
	SNPMigrationAgent           Fact[bool] = "migration_agent"
	SNPSingleSocket             Fact[bool] = "single_socket"
	SNPCXLAllowed               Fact[bool] = "cxl_allowed"
	SNPXTSRequired              Fact[bool] = "aes256_xts_required"
	SNPRAPLOffRequired          Fact[bool] = "rapl_must_be_off"
	SNPCiphertextHidingRequired Fact[bool] = "ciphertext_hiding_required"
	SNPPageSwapDisabled         Fact[bool] = "page_swap_disabled"
)

// Bits of the platform, and of what the report says of its key.
const (
	SNPPlatformSMT              Fact[bool] = "platform_smt"
	SNPPlatformTSME             Fact[bool] = "platform_tsme"
	SNPPlatformECC              Fact[bool] = "platform_ecc"
	SNPPlatformRAPLDisabled     Fact[bool] = "platform_rapl_disabled"
	SNPPlatformCiphertextHiding Fact[bool] = "platform_ciphertext_hiding"
	SNPPlatformAliasCheck       Fact[bool] = "platform_alias_check_complete"
	SNPPlatformIOMMUWriteSafe   Fact[bool] = "platform_iommu_write_safe"
	SNPPlatformTIO              Fact[bool] = "platform_tio"
	SNPAuthorKeyEnabled         Fact[bool] = "author_key_enabled"
	SNPMaskChipKey              Fact[bool] = "mask_chip_key"
)

// SNPGuarantees are the bits that a profile may demand: each that is set says that
// something is protected, or was made sure of.
var SNPGuarantees = []Fact[bool]{
	SNPXTSRequired, SNPRAPLOffRequired, SNPCiphertextHidingRequired, SNPPageSwapDisabled,
	SNPPlatformTSME, SNPPlatformECC, SNPPlatformIOMMUWriteSafe, SNPAuthorKeyEnabled,
}

// SNPTCB is the security version of one part of the firmware: fmc, bootloader, tee, snp
// or microcode; as it is current, reported, committed, or was at launch.
func SNPTCB(when, part string) Fact[uint64] { return Fact[uint64]("tcb_" + when + "_" + part) }
