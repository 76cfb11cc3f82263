package snp

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"slices"

	"github.com/google/go-sev-guest/abi"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/facts"
)

// ReportSize is the size of a report in bytes.
const ReportSize = abi.ReportSize

// versions of a report that are understood. 4 was never shipped.
var versions = []uint32{2, 3, 5}

// Report is a parsed report. Nothing in it is verified.
type Report struct {
	Version     uint32
	VMPL        uint32
	ReportData  [64]byte
	Measurement [48]byte
	HostData    [32]byte
	ReportID    [32]byte
	ChipID      [64]byte
	// Product is the product line, or empty in a report of version 2, which does
	// not say.
	Product string
	// ReportedTCB is the version that the signing key's certificate is for.
	ReportedTCB uint64

	raw    [ReportSize]byte
	signer abi.ReportSigner
}

// The reserved ranges by version, which must be zero: a field that this package
// does not know may say what a policy would have to look at.
func reserved(version uint32) [][2]int {
	r := [][2]int{{0x4C, 0x50}, {0x1EB, 0x1EC}, {0x1EF, 0x1F0}, {0x208, 0x2A0}, {0x2A0 + abi.EcdsaP384Sha384SignatureSize, ReportSize}}
	switch version {
	case 2:
		return append(r, [2]int{0x188, 0x1A0}, [2]int{0x1F8, 0x208})
	case 3:
		return append(r, [2]int{0x18B, 0x1A0}, [2]int{0x1F8, 0x208})
	default:
		return append(r, [2]int{0x18B, 0x1A0})
	}
}

// Parse reads a report strictly: its size, a known version, a known signature
// algorithm, and zeros where nothing is defined.
func Parse(report []byte) (*Report, error) {
	if len(report) != ReportSize {
		return nil, fmt.Errorf("%w: report of %d bytes, not %d", ErrMalformed, len(report), ReportSize)
	}
	r := &Report{raw: [ReportSize]byte(report)}
	b := r.raw[:]
	u32 := func(at int) uint32 { return binary.LittleEndian.Uint32(b[at:]) }
	r.Version = u32(0)
	if !slices.Contains(versions, r.Version) {
		return nil, fmt.Errorf("%w: report of version %d, not one of %v", ErrMalformed, r.Version, versions)
	}
	for _, span := range reserved(r.Version) {
		if !zero(b[span[0]:span[1]]) {
			return nil, fmt.Errorf("%w: bytes %#x to %#x of a version %d report are not zero", ErrMalformed, span[0], span[1], r.Version)
		}
	}
	if algorithm := abi.SignatureAlgo(b); algorithm != abi.SignEcdsaP384Sha384 {
		return nil, fmt.Errorf("%w: signature algorithm %d", ErrMalformed, algorithm)
	}
	if r.u64(0x08)&policyAlwaysOne == 0 {
		return nil, fmt.Errorf("%w: bit 17 of its guest policy is zero", ErrMalformed)
	}
	if r.signer = abi.ReportSigner(u32(0x48) >> 2 & 7); r.signer != abi.VcekReportSigner && r.signer != abi.VlekReportSigner {
		return nil, fmt.Errorf("%w: it is signed by no key", ErrMalformed)
	}
	if r.VMPL = u32(0x30); r.VMPL > 3 {
		return nil, fmt.Errorf("%w: VMPL %d", ErrMalformed, r.VMPL)
	}
	var err error
	copy(r.ReportData[:], b[0x50:])
	copy(r.Measurement[:], b[0x90:])
	copy(r.HostData[:], b[0xC0:])
	copy(r.ReportID[:], b[0x140:])
	copy(r.ChipID[:], b[0x1A0:])
	r.ReportedTCB = r.u64(0x180)
	if r.Version >= 3 {
		if r.Product, err = productOf(b[0x188], b[0x189]); err != nil {
			return nil, err
		}
	}
	return r, nil
}

func (r *Report) u64(at int) uint64 { return binary.LittleEndian.Uint64(r.raw[at:]) }

// Claims are what the report says. They are not verified: for people, and for
// making reference values of a machine that its owner trusts.
func (r *Report) Claims() attestation.Claims { return r.claims(r.Product, "") }

// claims needs what the certificate says of the product line, if the report
// does not say, and of the cloud provider.
func (r *Report) claims(product, csp string) attestation.Claims {
	text := func(from, to int) string {
		if zero(r.raw[from:to]) {
			return ""
		}
		return hex.EncodeToString(r.raw[from:to])
	}
	signer := "vcek"
	// A VLEK is shared by a provider's machines, and its reports may hide the chip:
	// what stays the same is the guest, which the report ID names.
	named := r.raw[0x1A0:0x1E0]
	if r.signer == abi.VlekReportSigner {
		signer, named = "vlek", r.ReportID[:]
	}
	identity := sha256.Sum256(named)
	set := map[string]any{}
	facts.SNPProduct.Put(set, product)
	facts.SNPReportVersion.Put(set, uint64(r.Version))
	facts.SNPSigner.Put(set, signer)
	facts.SNPChipID.Put(set, text(0x1A0, 0x1E0))
	facts.SNPCSP.Put(set, csp)
	facts.SNPFamilyID.Put(set, text(0x10, 0x20))
	facts.SNPImageID.Put(set, text(0x20, 0x30))
	facts.SNPHostData.Put(set, text(0xC0, 0xE0))
	facts.SNPIDKey.Put(set, text(0xE0, 0x110))
	facts.SNPAuthorKey.Put(set, text(0x110, 0x140))
	facts.SNPReportID.Put(set, text(0x140, 0x160))
	facts.SNPReportIDMA.Put(set, text(0x160, 0x180))
	facts.SNPVMPL.Put(set, uint64(r.VMPL))
	facts.SNPGuestSVN.Put(set, uint64(binary.LittleEndian.Uint32(r.raw[0x04:])))
	facts.SNPABIMajor.Put(set, r.u64(0x08)>>8&0xFF)
	facts.SNPABIMinor.Put(set, r.u64(0x08)&0xFF)
	facts.SNPVersionCurrent.Put(set, r.version(0x1E8))
	facts.SNPVersionCommitted.Put(set, r.version(0x1EC))
	for _, f := range bitFields {
		f.read(r.u64(f.at), set)
	}
	if r.Version >= 5 {
		facts.SNPLaunchMitigations.Put(set, r.u64(0x1F8))
		facts.SNPCurrentMitigations.Put(set, r.u64(0x200))
	}
	for _, t := range []struct {
		name string
		at   int
	}{{"current", 0x38}, {"reported", 0x180}, {"committed", 0x1E0}, {"launch", 0x1F0}} {
		tcb := splitTCB(product, r.u64(t.at))
		facts.SNPTCB(t.name, "fmc").Put(set, uint64(tcb.fmc))
		facts.SNPTCB(t.name, "bootloader").Put(set, uint64(tcb.bootloader))
		facts.SNPTCB(t.name, "tee").Put(set, uint64(tcb.tee))
		facts.SNPTCB(t.name, "snp").Put(set, uint64(tcb.snp))
		facts.SNPTCB(t.name, "microcode").Put(set, uint64(tcb.microcode))
	}
	return attestation.Claims{
		Kind:           attestation.SNP,
		Identity:       hex.EncodeToString(identity[:]),
		Measurements:   map[string]attestation.Measurement{"measurement": {Value: bytes.Clone(r.Measurement[:])}},
		Facts:          set,
		Epoch:          hex.EncodeToString(r.ReportID[:]),
		EvidenceDigest: sha256.Sum256(r.raw[:]),
	}
}

// version of the firmware; its parts are in the order build, minor, major.
func (r *Report) version(at int) string {
	return fmt.Sprintf("%d.%d.%d", r.raw[at+2], r.raw[at+1], r.raw[at])
}

func zero(b []byte) bool {
	for _, x := range b {
		if x != 0 {
			return false
		}
	}
	return true
}
