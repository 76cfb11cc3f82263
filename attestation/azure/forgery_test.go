package azure

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"google.golang.org/protobuf/proto"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/snp"
	"github.com/keyagent/keyagent/attestation/tdx"
	"github.com/keyagent/keyagent/attestation/tpm"
	"github.com/keyagent/keyagent/test/sim/amd"
	synthetic "github.com/keyagent/keyagent/test/sim/azurehcl"
)

// TestHalvesOfTwoMachinesAreRefused: attack 29. Both are genuine, on the same kind
// of hardware and by the same vendor.
func TestHalvesOfTwoMachinesAreRefused(t *testing.T) {
	for _, kind := range []attestation.Kind{attestation.SNP, attestation.TDX} {
		t.Run(string(kind), func(t *testing.T) {
			v := verifier(t)
			_, mine := shared(t, kind)
			theirs := newVM(t, kind).evidence(v)
			for name, c := range map[string]struct {
				change func(e *attestv1.AzureEvidence)
				want   error
			}{
				"their report, my quote": {func(e *attestv1.AzureEvidence) {
					e.HclReport, e.Snp, e.Tdx = theirs.HclReport, theirs.Snp, theirs.Tdx
				}, ErrKey},
				"their key": {func(e *attestv1.AzureEvidence) { e.AkPublic = theirs.AkPublic }, ErrKey},
				"their key and quote": {func(e *attestv1.AzureEvidence) {
					e.AkPublic, e.Quote = theirs.AkPublic, theirs.Quote
				}, ErrKey},
				"their quote": {func(e *attestv1.AzureEvidence) { e.Quote = theirs.Quote }, tpm.ErrSignature},
				"their hardware's report under my runtime data": {func(e *attestv1.AzureEvidence) {
					e.HclReport = bytes.Clone(e.HclReport)
					copy(e.HclReport[headerSize:headerSize+areaSize], theirs.HclReport[headerSize:headerSize+areaSize])
					e.Snp, e.Tdx = theirs.Snp, theirs.Tdx
				}, nil},
				"my hardware, their runtime data": {func(e *attestv1.AzureEvidence) {
					e.HclReport = bytes.Clone(theirs.HclReport)
					copy(e.HclReport[headerSize:headerSize+areaSize], mine.HclReport[headerSize:headerSize+areaSize])
					e.AkPublic, e.Quote = theirs.AkPublic, theirs.Quote
				}, nil},
			} {
				e := proto.Clone(mine).(*attestv1.AzureEvidence)
				c.change(e)
				want := c.want
				if want == nil {
					want = map[attestation.Kind]error{attestation.SNP: snp.ErrReportData, attestation.TDX: ErrMalformed}[kind]
				}
				t.Run(name, func(t *testing.T) {
					_, err := verify(t, v, e)
					wantErr(t, err, want)
				})
			}
			// The endorsements of another chip.
			e := proto.Clone(mine).(*attestv1.AzureEvidence)
			e.Snp, e.Tdx = theirs.Snp, theirs.Tdx
			_, err := verify(t, v, e)
			wantErr(t, err, map[attestation.Kind]error{attestation.SNP: snp.ErrChip, attestation.TDX: tdx.ErrReportData}[kind])
			if _, err := verify(t, v, mine); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestAReportThatTheGuestAskedForIsRefused: at its own privilege level a guest could
// have runtime data of its own making covered.
func TestAReportThatTheGuestAskedForIsRefused(t *testing.T) {
	m := newVM(t, attestation.SNP, func(m *synthetic.Machine) { m.SNPReport.VMPL = 2 })
	v := verifier(t)
	_, err := verify(t, v, m.evidence(v))
	wantErr(t, err, ErrVMPL)
}

func TestAKeyThatSignsAnythingIsRefused(t *testing.T) {
	m := provision(t, hardware(t, attestation.SNP), func(p *tpm2.TPMTPublic) { p.ObjectAttributes.Restricted = false })
	v := verifier(t)
	_, err := verify(t, v, m.evidence(v))
	wantErr(t, err, tpm.ErrAKUnfit)
}

// TestAQuoteOfSomethingElseIsRefused: attacks 18, 19 and 27.
func TestAQuoteOfSomethingElseIsRefused(t *testing.T) {
	v := verifier(t)
	_, genuine := shared(t, attestation.SNP)
	for name, c := range map[string]struct {
		change func(e *attestv1.AzureEvidence)
		want   error
	}{
		"a value that is not covered": {func(e *attestv1.AzureEvidence) { e.Quote.PcrValues[1] = make([]byte, 32); e.Quote.PcrValues[1][0] = 1 }, tpm.ErrPCRDigest},
		"a value less":                {func(e *attestv1.AzureEvidence) { e.Quote.PcrValues = e.Quote.PcrValues[1:] }, tpm.ErrPCRDigest},
		"another signature":           {func(e *attestv1.AzureEvidence) { e.Quote.Signature[20] ^= 1 }, tpm.ErrSignature},
		"another structure":           {func(e *attestv1.AzureEvidence) { e.Quote.Attest[9] ^= 1 }, tpm.ErrSignature},
		"a log that is too large":     {func(e *attestv1.AzureEvidence) { e.Quote.EventLog = make([]byte, tpm.MaxEventLog+1) }, tpm.ErrEventLogTooLarge},
		"a credential":                {func(e *attestv1.AzureEvidence) { e.Quote.CredentialProof = make([]byte, 32) }, ErrMalformed},
		"no quote":                    {func(e *attestv1.AzureEvidence) { e.Quote = nil }, tpm.ErrMalformed},
		"no key":                      {func(e *attestv1.AzureEvidence) { e.AkPublic = nil }, tpm.ErrMalformed},
		"no report":                   {func(e *attestv1.AzureEvidence) { e.HclReport = nil }, ErrMalformed},
		"no certificate of the chip":  {func(e *attestv1.AzureEvidence) { e.Snp = nil }, snp.ErrEndorsementMissing},
		"a second report":             {func(e *attestv1.AzureEvidence) { e.Snp.Report = e.HclReport }, ErrMalformed},
		"evidence of other hardware":  {func(e *attestv1.AzureEvidence) { e.Tdx = &attestv1.TDXEvidence{} }, ErrMalformed},
	} {
		e := proto.Clone(genuine).(*attestv1.AzureEvidence)
		c.change(e)
		t.Run(name, func(t *testing.T) {
			_, err := verify(t, v, e)
			wantErr(t, err, c.want)
		})
	}
	q := must[attestation.Question](t)(v.Begin(t.Context(), nil))
	_, err := q.Verify(t.Context(), must[[]byte](t)(proto.Marshal(genuine)), attestation.Binder{9})
	wantErr(t, err, tpm.ErrBinder)
	other := verifier(t, func(o *VerifierOptions) { o.PCRs = func() []uint32 { return []uint32{0, 4, 11} } })
	_, err = verify(t, other, genuine)
	wantErr(t, err, tpm.ErrSelection)
	_, err = v.Begin(t.Context(), []byte{1})
	wantErr(t, err, ErrMalformed)
}

// TestAnHCLReportIsReadStrictly: each field of the layout, of both kinds.
func TestAnHCLReportIsReadStrictly(t *testing.T) {
	for _, path := range []string{"testdata/hcl-report-snp.bin", "testdata/hcl-report-tdx.bin"} {
		genuine := must[[]byte](t)(os.ReadFile(path))
		for name, change := range map[string]func(r []byte) []byte{
			"another signature":          func(r []byte) []byte { r[0]++; return r },
			"another size":               func(r []byte) []byte { r[8]++; return r },
			"another request":            func(r []byte) []byte { r[12]++; return r },
			"a failure":                  func(r []byte) []byte { r[16]++; return r },
			"reserved bytes":             func(r []byte) []byte { r[31]++; return r },
			"another size of the data":   func(r []byte) []byte { r[1216]++; return r },
			"another version":            func(r []byte) []byte { r[1220]++; return r },
			"a type that nobody knows":   func(r []byte) []byte { r[1224] = 3; return r },
			"a digest that nobody knows": func(r []byte) []byte { r[1228] = 4; return r },
			"no digest":                  func(r []byte) []byte { r[1228] = 0; return r },
			"runtime data without end":   func(r []byte) []byte { binary.LittleEndian.PutUint32(r[1232:], 1<<31); return r },
			"no runtime data":            func(r []byte) []byte { binary.LittleEndian.PutUint32(r[1232:], 0); return r },
			"runtime data that is cut":   func(r []byte) []byte { r[1232]--; return r },
			"something behind it":        func(r []byte) []byte { return append(r, 1) },
			"an end in the middle":       func(r []byte) []byte { return r[:1500] },
			"nothing but a header":       func(r []byte) []byte { return r[:32] },
			"nothing":                    func([]byte) []byte { return nil },
			"far too much":               func(r []byte) []byte { return append(r, make([]byte, maxReport)...) },
			"no JSON":                    func(r []byte) []byte { r[1236] = 'x'; return r },
			"another name of the key":    func(r []byte) []byte { return bytes.Replace(r, []byte("HCLAkPub"), []byte("HCLBkPub"), 1) },
			"another exponent":           func(r []byte) []byte { return bytes.Replace(r, []byte("AQAB"), []byte("AQAC"), 1) },
			"another type of key":        func(r []byte) []byte { return bytes.Replace(r, []byte(`"RSA"`), []byte(`"oct"`), 1) },
			"no configuration":           func(r []byte) []byte { return bytes.Replace(r, []byte("secure-boot"), []byte("secure-booo"), 1) },
			"no VM":                      func(r []byte) []byte { return bytes.Replace(r, []byte("vmUniqueId"), []byte("vmUniqueIX"), 1) },
		} {
			if _, err := Parse(change(bytes.Clone(genuine))); !errors.Is(err, ErrMalformed) {
				t.Errorf("%s: %s: %v", path, name, err)
			}
		}
	}
}

// TestAReportThatLiesAboutItselfIsRefused: what the layout says must fit what the
// hardware signed.
func TestAReportThatLiesAboutItselfIsRefused(t *testing.T) {
	v := verifier(t)
	for name, c := range map[string]struct {
		kind   attestation.Kind
		layout func(r []byte) []byte
		want   error
	}{
		"an SNP report as a TD's":    {attestation.SNP, func(r []byte) []byte { r[1224] = 4; return r }, ErrMalformed},
		"a TD report as an SNP's":    {attestation.TDX, func(r []byte) []byte { r[1224] = 2; return r }, ErrMalformed},
		"another digest":             {attestation.SNP, func(r []byte) []byte { r[1228] = 2; return r }, snp.ErrReportData},
		"another VM":                 {attestation.SNP, renamed, snp.ErrReportData},
		"another VM, by a TD":        {attestation.TDX, renamed, ErrMalformed},
		"SNP with a bit turned over": {attestation.SNP, func(r []byte) []byte { r[32+0x90] ^= 1; return r }, snp.ErrSignature},
	} {
		t.Run(name, func(t *testing.T) {
			m := hardware(t, c.kind)
			w := must[vendors](t)(theVendors())
			key := must[*Report](t)(Parse(must[[]byte](t)(os.ReadFile("testdata/hcl-report-tdx.bin")))).AK
			e := &attestv1.AzureEvidence{HclReport: c.layout(must[[]byte](t)(m.Report(key)))}
			if c.kind == attestation.SNP {
				e.Snp = &attestv1.SNPEvidence{Certificate: m.SNP.VCEK.Raw, Crl: w.crl}
			} else {
				e.Tdx = &attestv1.TDXEvidence{Quote: must[[]byte](t)(m.TDX.Quote(m.Fields)), Collateral: m.TDX.Collateral()}
			}
			_, err := verify(t, v, e)
			wantErr(t, err, c.want)
		})
	}
}

func renamed(r []byte) []byte { return bytes.Replace(r, []byte("D270E56B"), []byte("D270E56C"), 1) }

// TestHardwareOfAnotherVendorIsRefused: the hardware is somebody else's.
func TestHardwareOfAnotherVendorIsRefused(t *testing.T) {
	_, e := shared(t, attestation.SNP)
	stranger := must[*amd.Authority](t)(amd.New(amd.Options{Product: "Genoa", Forged: true}))
	v := verifier(t, func(o *VerifierOptions) {
		o.SNP = must[*snp.Verifier](t)(snp.NewVerifier(snp.VerifierOptions{Trust: stranger.Trust}))
	})
	if _, err := verify(t, v, e); !errors.Is(err, attestation.ErrRefused) {
		t.Error(err)
	}
}
