package amd

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha512"
	"encoding/binary"
	"time"

	"github.com/google/go-sev-guest/abi"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
)

// Report is what a report is to say. Unset fields are zero in it, except those
// with a stated default.
type Report struct {
	Version     uint32 // Default 3.
	VLEK        bool   // signed by the VLEK
	Data        [64]byte
	Measurement [48]byte
	HostData    [32]byte
	ReportID    [32]byte // Default ones.
	VMPL        uint32
	Policy      abi.SnpPolicy
	Platform    uint64
	// Edit changes the report before it is signed.
	Edit func(report []byte)
}

// models are family, model and stepping by product line.
var models = map[string][3]byte{"Milan": {0x19, 0x01, 1}, "Genoa": {0x19, 0x11, 1}, "Turin": {0x1A, 0x02, 1}}

// Sign makes a report of this chip.
func (c *Chip) Sign(r Report) ([]byte, error) {
	if r.Version == 0 {
		r.Version = 3
	}
	if r.ReportID == ([32]byte{}) {
		for i := range r.ReportID {
			r.ReportID[i] = 1
		}
	}
	b := make([]byte, abi.ReportSize)
	u32, u64 := binary.LittleEndian.PutUint32, binary.LittleEndian.PutUint64
	u32(b, r.Version)
	u64(b[0x08:], abi.SnpPolicyToBytes(r.Policy))
	u32(b[0x30:], r.VMPL)
	u32(b[0x34:], abi.SignEcdsaP384Sha384)
	u64(b[0x40:], r.Platform)
	info := abi.SignerInfo{SigningKey: abi.VcekReportSigner}
	if r.VLEK {
		info.SigningKey = abi.VlekReportSigner
	}
	u32(b[0x48:], abi.ComposeSignerInfo(info))
	copy(b[0x50:], r.Data[:])
	copy(b[0x90:], r.Measurement[:])
	copy(b[0xC0:], r.HostData[:])
	copy(b[0x140:], r.ReportID[:])
	for _, at := range []int{0x38, 0x180, 0x1E0, 0x1F0} {
		u64(b[at:], c.TCB.Version(c.Product))
	}
	if r.Version >= 3 {
		m := models[c.Product]
		copy(b[0x188:], m[:])
	}
	copy(b[0x1A0:], c.ID[:])
	copy(b[0x1E8:], []byte{7, 55, 1, 0, 6, 55, 1})
	if r.Edit != nil {
		r.Edit(b)
	}
	return b, c.SignAgain(b, r.VLEK)
}

// SignAgain replaces the signature of a report.
func (c *Chip) SignAgain(report []byte, vlek bool) error {
	key := c.vcek
	if vlek {
		key = c.vlek
	}
	digest := sha512.Sum384(abi.SignedComponent(report))
	x, y, err := ecdsa.Sign(rand.Reader, key, digest[:])
	if err != nil {
		return err
	}
	return abi.SetSignature(x, y, report)
}

// Evidence is a report with all its endorsements; the revocation list is valid for
// a year from the authority's beginning.
func (c *Chip) Evidence(r Report) (*attestv1.SNPEvidence, error) {
	report, err := c.Sign(r)
	if err != nil {
		return nil, err
	}
	crl, err := c.FreshCRL()
	if err != nil {
		return nil, err
	}
	ev := &attestv1.SNPEvidence{Report: report, Certificate: c.VCEK.Raw, Crl: crl}
	if r.VLEK {
		ev.Certificate = c.VLEK.Raw
	}
	return ev, nil
}

// FreshCRL revokes nothing, for a year from the authority's beginning.
func (a *Authority) FreshCRL() ([]byte, error) {
	return a.CRL(a.ARK.NotBefore, a.ARK.NotBefore.Add(365*24*time.Hour))
}
