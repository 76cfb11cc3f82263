package snp_test

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/google/go-sev-guest/abi"
	"github.com/google/go-sev-guest/proto/sevsnp"
	library "github.com/google/go-sev-guest/verify"
	"github.com/google/go-sev-guest/verify/trust"

	"github.com/keyagent/keyagent/attestation/snp"
	"github.com/keyagent/keyagent/test/sim/amd"
)

// byLibrary is what go-sev-guest says of the same evidence, with every option of
// its set: roots, time, and nothing from the network. The list is not looked at.
func byLibrary(roots []snp.Root, ev *evidence, now time.Time) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v", p)
		}
	}()
	trusted := map[string][]*trust.AMDRootCerts{}
	for _, r := range roots {
		trusted[r.Product] = append(trusted[r.Product], &trust.AMDRootCerts{ProductLine: r.Product,
			ProductCerts: &trust.ProductCerts{Ark: r.ARK, Ask: r.ASK, Asvk: r.ASVK}})
	}
	if len(ev.GetReport()) != abi.ReportSize {
		return errors.New("size")
	}
	report, err := abi.ReportToProto(ev.GetReport())
	if err != nil {
		return err
	}
	chain := &sevsnp.CertificateChain{VcekCert: ev.GetCertificate()}
	if (report.GetSignerInfo()>>2)&7 == uint32(abi.VlekReportSigner) {
		chain = &sevsnp.CertificateChain{VlekCert: ev.GetCertificate()}
	}
	return library.SnpAttestationContext(context.Background(), &sevsnp.Attestation{Report: report, CertificateChain: chain},
		&library.Options{TrustedRoots: trusted, Now: now, DisableCertFetching: true})
}

// purposes are what this package refuses and the library does not.
var purposes = []struct {
	why  string
	errs []error
}{
	{"the library's verification compares neither chip nor TCB, which it leaves to its policy", []error{snp.ErrChip, snp.ErrTCB}},
	{"reserved fields, VMPLs and versions that are not shipped are refused", []error{snp.ErrMalformed}},
	{"a certificate has exactly the extensions of its product line", []error{snp.ErrCertificate}},
	{"a report of version 3 or later must name its product line", []error{snp.ErrProduct}},
}

// beyond says why the library refuses what this package accepts.
func beyond(product string, cert *x509.Certificate, report []byte) string {
	switch {
	case product == "Turin":
		return "the library knows no FMC and no short chip ID, and so no certificate of Turin"
	case report[0x40]&0x40 != 0 || report[0x41] != 0:
		return "the library refuses bits of the platform that have no name in it, and genuine reports of Turin have one"
	case report[0x0B]&0xFC != 0:
		return "the library refuses bits of the guest's policy that have no name in it"
	case report[0x48]&0xE0 != 0 || report[0x49] != 0:
		return "the library refuses bits beside the signing key that have no name in it"
	case report[0] == 2 && bytes.Contains(cert.Raw, []byte("\x16\x05Genoa")):
		return "the library wants a stepping in the product name, which newer certificates have not"
	}
	return ""
}

func TestALibraryOfOthersAgrees(t *testing.T) {
	type entry struct {
		name  string
		roots []snp.Root
		ev    *evidence
		at    time.Time
	}
	var corpus []entry
	for _, g := range genuineReports {
		corpus = append(corpus, entry{g.name, snp.AMD(), g.evidence(t), g.at})
	}
	for _, product := range []string{"Milan", "Genoa", "Turin"} {
		chip, other := newChip(t, product), newChip(t, product)
		otherTCB := must[*amd.Chip](t)(chip.Authority.Chip(amd.ChipOptions{ID: chip.ID, TCB: amd.TCB{Bootloader: 1}}))
		forged := must[*amd.Chip](t)(must[*amd.Authority](t)(amd.New(amd.Options{Product: product, Forged: true})).Chip(amd.ChipOptions{}))
		roots := []snp.Root{chip.Root("lab")}
		for _, version := range []uint32{2, 3, 5} {
			for _, vlek := range []bool{false, true} {
				name := fmt.Sprintf("%s version %d VLEK %v", product, version, vlek)
				r := amd.Report{Version: version, VLEK: vlek, Data: testBinder}
				ev := must[*evidence](t)(chip.Evidence(r))
				corpus = append(corpus, entry{name, roots, ev, time.Now()},
					entry{name + " forged", roots, must[*evidence](t)(forged.Evidence(r)), time.Now()},
					entry{name + " too early", roots, ev, time.Now().AddDate(-10, 0, 0)},
					entry{name + " too late", roots, ev, time.Now().AddDate(10, 0, 0)},
					entry{name + " other chip", roots, clone(ev, func(e *evidence) { e.Certificate = other.VCEK.Raw }), time.Now()},
					entry{name + " other provider", roots, clone(ev, func(e *evidence) { e.Certificate = other.VLEK.Raw }), time.Now()},
					entry{name + " other TCB", roots, clone(ev, func(e *evidence) { e.Certificate = otherTCB.VCEK.Raw }), time.Now()})
				for at, value := range map[int]byte{0: 4, 0x0A: 0, 0x30: 3, 0x31: 1, 0x34: 2, 0x40: 0x40, 0x48: 2, 0x188: 0x17, 0x189: 0xA0, 0x1F8: 1, 0x300: 1, 0x49F: 1, 0x4C: 1} {
					r.Edit = func(b []byte) { b[at] = value }
					corpus = append(corpus, entry{fmt.Sprintf("%s, byte %#x is %#x and signed", name, at, value), roots, must[*evidence](t)(chip.Evidence(r)), time.Now()})
				}
			}
		}
	}
	// Single bits of reports and certificates.
	for _, e := range corpus[:len(genuineReports)] {
		for bit := range abi.ReportSize * 8 {
			if bit%149 == 0 {
				corpus = append(corpus, entry{fmt.Sprintf("%s, bit %d", e.name, bit), e.roots,
					clone(e.ev, func(e *evidence) { e.Report[bit/8] ^= 1 << (bit % 8) }), e.at})
			}
		}
		for bit := range len(e.ev.GetCertificate()) * 8 {
			if bit%401 == 0 {
				corpus = append(corpus, entry{fmt.Sprintf("%s, certificate bit %d", e.name, bit), e.roots,
					clone(e.ev, func(e *evidence) { e.Certificate[bit/8] ^= 1 << (bit % 8) }), e.at})
			}
		}
	}
	accepted, stricter, wider := 0, 0, 0
	for _, e := range corpus {
		_, ours := snp.VerifyWithoutCRL(e.roots, e.ev, e.at)
		theirs := byLibrary(e.roots, e.ev, e.at)
		switch {
		case ours == nil && theirs == nil:
			accepted++
		case ours == nil:
			if beyond(e.roots[len(e.roots)-1].Product, parse(t, e.ev.GetCertificate()), e.ev.GetReport()) == "" && !bytes.Equal(e.ev.GetReport()[0x188:0x18A], []byte{0x19, 0xA0}) {
				t.Errorf("%s: we accept, the library says %v", e.name, theirs)
			}
			wider++
		case theirs == nil:
			purpose := false
			for _, p := range purposes {
				for _, err := range p.errs {
					purpose = purpose || errors.Is(ours, err)
				}
			}
			if !purpose {
				t.Errorf("%s: the library accepts, we say %v", e.name, ours)
			}
			stricter++
		}
	}
	t.Logf("%d entries: both accept %d, we alone refuse %d, the library alone refuses %d, both refuse the rest", len(corpus), accepted, stricter, wider)
	if accepted < len(genuineReports)+10 || stricter == 0 {
		t.Error("the corpus shows nothing")
	}
}
