package snp

import (
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/facts"
)

// policyAlwaysOne is bit 17 of a guest policy, which is always set.
const policyAlwaysOne = 1 << 17

// bitField is a field of a report whose bits are facts. AMD gives a meaning to more
// of them with newer firmware, in reports of the same version: what this package
// does not know is a fact as well, which a policy has to allow by name.
type bitField struct {
	at      int
	bits    map[uint]facts.Fact[bool]
	others  uint64             // what is neither a bit with a fact nor unknown
	unknown facts.Fact[uint64] // the fact with the bits that are not known
}

// The fields of publication 56860 revision 1.58, tables 10, 23 and 24. Bit 6 of the
// platform is IOMMU_WRITE_SAFE, which genuine Turin reports have set.
var bitFields = []bitField{
	{at: 0x08, others: 0xFFFF | policyAlwaysOne, unknown: facts.SNPPolicyUnknown, bits: map[uint]facts.Fact[bool]{
		16: facts.SNPSMTAllowed, 18: facts.SNPMigrationAgent, 19: facts.Debug, 20: facts.SNPSingleSocket, 21: facts.SNPCXLAllowed,
		22: facts.SNPXTSRequired, 23: facts.SNPRAPLOffRequired, 24: facts.SNPCiphertextHidingRequired, 25: facts.SNPPageSwapDisabled,
	}},
	{at: 0x40, unknown: facts.SNPPlatformUnknown, bits: map[uint]facts.Fact[bool]{
		0: facts.SNPPlatformSMT, 1: facts.SNPPlatformTSME, 2: facts.SNPPlatformECC, 3: facts.SNPPlatformRAPLDisabled, 4: facts.SNPPlatformCiphertextHiding,
		5: facts.SNPPlatformAliasCheck, 6: facts.SNPPlatformIOMMUWriteSafe, 7: facts.SNPPlatformTIO,
	}},
	// The upper half of these eight bytes is reserved, see Parse.
	{at: 0x48, others: 7 << 2, unknown: facts.SNPKeyUnknown, bits: map[uint]facts.Fact[bool]{0: facts.SNPAuthorKeyEnabled, 1: facts.SNPMaskChipKey}},
}

// read turns the field into facts. unknown_bits says whether any field has some.
func (f bitField) read(value uint64, set map[string]any) {
	rest := value &^ f.others
	for bit, fact := range f.bits {
		fact.Put(set, rest>>bit&1 == 1)
		rest &^= 1 << bit
	}
	f.unknown.Put(set, rest)
	before, _ := facts.SNPUnknownBits.Of(attestation.Claims{Facts: set})
	facts.SNPUnknownBits.Put(set, before || rest != 0)
}
