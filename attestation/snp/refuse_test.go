package snp_test

import (
	"bytes"
	"context"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/binary"
	"errors"
	"fmt"
	"math/big"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/snp"
	"github.com/keyagent/keyagent/test/sim/amd"
)

// clone is evidence with a change.
func clone(ev *evidence, change func(*evidence)) *evidence {
	out := proto.Clone(ev).(*evidence)
	change(out)
	return out
}

func TestEvidenceOfAnotherSourceIsRefused(t *testing.T) {
	for _, product := range []string{"Milan", "Genoa", "Turin"} {
		for _, vlek := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s VLEK %v", product, vlek), func(t *testing.T) {
				chip := newChip(t, product)
				a := chip.Authority
				good := must[*evidence](t)(chip.Evidence(amd.Report{VLEK: vlek, Data: testBinder}))
				forger := must[*amd.Authority](t)(amd.New(amd.Options{Product: product, Forged: true}))
				forged := must[*amd.Chip](t)(forger.Chip(amd.ChipOptions{ID: chip.ID}))
				sameKeysOtherLine := newChip(t, map[string]string{"Milan": "Genoa", "Genoa": "Turin", "Turin": "Milan"}[product])
				otherTCB := must[*amd.Chip](t)(a.Chip(amd.ChipOptions{ID: chip.ID, TCB: amd.TCB{Bootloader: 4, TEE: 1, SNP: 24, Microcode: 218}}))
				other := must[*amd.Chip](t)(a.Chip(amd.ChipOptions{}))
				leaf := func(c *amd.Chip) []byte {
					if vlek {
						return c.VLEK.Raw
					}
					return c.VCEK.Raw
				}
				otherWay := chip.VLEK.Raw
				if vlek {
					otherWay = chip.VCEK.Raw
				}
				otherChip := snp.ErrChip
				if vlek { // a VLEK is of no chip, but of one key
					otherChip = snp.ErrSignature
				}
				for name, tc := range map[string]struct {
					ev   *evidence
					want error
				}{
					"forged roots with the same names":   {must[*evidence](t)(forged.Evidence(amd.Report{VLEK: vlek, Data: testBinder})), snp.ErrUntrusted},
					"forged certificate, genuine list":   {clone(good, func(e *evidence) { e.Certificate = leaf(forged) }), snp.ErrUntrusted},
					"genuine certificate, forged list":   {clone(good, func(e *evidence) { e.Crl = must[[]byte](t)(forger.FreshCRL()) }), snp.ErrCRL},
					"roots of another product line":      {must[*evidence](t)(sameKeysOtherLine.Evidence(amd.Report{VLEK: vlek, Data: testBinder})), snp.ErrUntrusted},
					"certificate of another chip":        {clone(good, func(e *evidence) { e.Certificate = leaf(other) }), otherChip},
					"certificate of another TCB":         {clone(good, func(e *evidence) { e.Certificate = leaf(otherTCB) }), snp.ErrTCB},
					"certificate of the other kind":      {clone(good, func(e *evidence) { e.Certificate = otherWay }), snp.ErrCertificate},
					"the root in place of a certificate": {clone(good, func(e *evidence) { e.Certificate = a.ARK.Raw }), snp.ErrCertificate},
					"an intermediate in its place":       {clone(good, func(e *evidence) { e.Certificate = a.ASK.Raw }), snp.ErrCertificate},
					"garbage in its place":               {clone(good, func(e *evidence) { e.Certificate = []byte("\x30\x82garbage") }), snp.ErrMalformed},
					"a certificate with a tail":          {clone(good, func(e *evidence) { e.Certificate = append(e.Certificate, 0) }), snp.ErrMalformed},
					"too large a certificate":            {clone(good, func(e *evidence) { e.Certificate = make([]byte, 8<<10+1) }), snp.ErrMalformed},
					"garbage in place of the list":       {clone(good, func(e *evidence) { e.Crl = []byte("garbage") }), snp.ErrCRL},
					"too large a list":                   {clone(good, func(e *evidence) { e.Crl = make([]byte, 64<<10+1) }), snp.ErrMalformed},
					"no list":                            {clone(good, func(e *evidence) { e.Crl = nil }), snp.ErrEndorsementMissing},
					"no certificate":                     {clone(good, func(e *evidence) { e.Certificate = nil }), snp.ErrEndorsementMissing},
					"other report data":                  {must[*evidence](t)(chip.Evidence(amd.Report{VLEK: vlek})), snp.ErrReportData},
					"no report":                          {clone(good, func(e *evidence) { e.Report = nil }), snp.ErrMalformed},
				} {
					_, err := verify(t.Context(), lab(t, a), tc.ev)
					if !errors.Is(err, tc.want) {
						t.Errorf("%s: got %v, want %v", name, err, tc.want)
					}
					refused(t, err, tc.want)
				}
				// The forger is believed by nobody even if it is right about everything
				// and both are trusted for other lines.
				v := lab(t, a, trusting(sameKeysOtherLine.Root("other"), a.Root("lab")))
				if c, err := verify(t.Context(), v, good); err != nil || c.Trust != "root:lab" {
					t.Errorf("%v, %q", err, c.Trust)
				}
			})
		}
	}
}

func TestEveryChangedBitOfAReportIsRefused(t *testing.T) {
	chip := newChip(t, "Milan")
	v := lab(t, chip.Authority)
	// Of version 2 one bit of each byte, since a signature takes its time.
	for version, step := range map[uint32]int{2: 9, 5: 1} {
		good := must[*evidence](t)(chip.Evidence(amd.Report{Version: version, Data: testBinder}))
		if _, err := verify(t.Context(), v, good); err != nil {
			t.Fatal(err)
		}
		signature := 0
		for bit := 0; bit < snp.ReportSize*8; bit += step {
			_, err := verify(t.Context(), v, clone(good, func(e *evidence) { e.Report[bit/8] ^= 1 << (bit % 8) }))
			if !errors.Is(err, attestation.ErrRefused) {
				t.Fatalf("version %d, bit %d of byte %#x: %v", version, bit%8, bit/8, err)
			}
			if errors.Is(err, snp.ErrSignature) {
				signature++
			} else if bit/8 >= 0x50 && bit/8 < 0x180 {
				t.Errorf("byte %#x: %v", bit/8, err) // what the guest and its owner chose
			}
		}
		if signature < 2800/step {
			t.Errorf("version %d: only %d bits are refused for the signature", version, signature)
		}
	}
}

func TestAMaskedChipIsRefused(t *testing.T) {
	chip := newChip(t, "Milan")
	masked := amd.Report{Data: testBinder, Edit: func(b []byte) { clear(b[0x1A0:0x1E0]) }}
	_, err := verify(t.Context(), lab(t, chip.Authority), must[*evidence](t)(chip.Evidence(masked)))
	refused(t, err, snp.ErrChip)
	_, err = verify(t.Context(), lab(t, chip.Authority), clone(must[*evidence](t)(chip.Evidence(masked)), func(e *evidence) { e.Certificate = nil }))
	refused(t, err, snp.ErrChip)
	// A provider's key does not depend on the chip.
	masked.VLEK = true
	if c, err := verify(t.Context(), lab(t, chip.Authority), must[*evidence](t)(chip.Evidence(masked))); err != nil || c.Facts["chip_id"] != "" {
		t.Error(err)
	}
}

func TestReportsThatAreNotUnderstoodAreRefused(t *testing.T) {
	chip := newChip(t, "Milan")
	u32 := func(at int, v uint32) func([]byte) {
		return func(b []byte) { binary.LittleEndian.PutUint32(b[at:], v) }
	}
	set := func(at int, v byte) func([]byte) { return func(b []byte) { b[at] = v } }
	for name, tc := range map[string]struct {
		version uint32
		edit    func([]byte)
		want    error
	}{
		"version 0":                       {3, u32(0, 0), snp.ErrMalformed},
		"version 1":                       {3, u32(0, 1), snp.ErrMalformed},
		"version 4":                       {3, u32(0, 4), snp.ErrMalformed},
		"version 6":                       {3, u32(0, 6), snp.ErrMalformed},
		"another signature algorithm":     {3, u32(0x34, 2), snp.ErrMalformed},
		"no signing key":                  {3, u32(0x48, 7<<2), snp.ErrMalformed},
		"a reserved signing key":          {3, u32(0x48, 2<<2), snp.ErrMalformed},
		"VMPL 4":                          {3, u32(0x30, 4), snp.ErrMalformed},
		"policy without its reserved bit": {3, set(0x0A, 0), snp.ErrMalformed},
		"model in version 2":              {2, set(0x188, 0x19), snp.ErrMalformed},
		"reserved after the model":        {3, set(0x18B, 1), snp.ErrMalformed},
		"mitigations in version 3":        {3, set(0x1F8, 1), snp.ErrMalformed},
		"reserved before the signature":   {5, set(0x208, 1), snp.ErrMalformed},
		"reserved after the signature":    {5, set(0x49F, 1), snp.ErrMalformed},
		"unknown family":                  {3, set(0x188, 0x17), snp.ErrProduct},
		"unknown model":                   {3, set(0x189, 0x50), snp.ErrProduct},
		"no model":                        {3, func(b []byte) { clear(b[0x188:0x18B]) }, snp.ErrProduct},
	} {
		ev := must[*evidence](t)(chip.Evidence(amd.Report{Version: tc.version, Data: testBinder, Edit: tc.edit}))
		_, err := verify(t.Context(), lab(t, chip.Authority), ev)
		if !errors.Is(err, tc.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, size := range []int{0, 1, snp.ReportSize - 1, snp.ReportSize + 1, 1 << 20} {
		_, err := snp.Parse(make([]byte, size))
		refused(t, err, snp.ErrMalformed)
	}
}

func TestCertificatesThatAreNotOfAReportsKeyAreRefused(t *testing.T) {
	a := must[*amd.Authority](t)(amd.New(amd.Options{}))
	oid := func(n ...int) asn1.ObjectIdentifier {
		return append(asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 3704, 1}, n...)
	}
	replace := func(id asn1.ObjectIdentifier, value []byte) func(*x509.Certificate) {
		return func(c *x509.Certificate) {
			for i := range c.ExtraExtensions {
				if c.ExtraExtensions[i].Id.Equal(id) {
					c.ExtraExtensions[i].Value = value
				}
			}
		}
	}
	remove := func(id asn1.ObjectIdentifier) func(*x509.Certificate) {
		return func(c *x509.Certificate) {
			var left []pkix.Extension
			for _, e := range c.ExtraExtensions {
				if !e.Id.Equal(id) {
					left = append(left, e)
				}
			}
			c.ExtraExtensions = left
		}
	}
	add := func(id asn1.ObjectIdentifier, critical bool) func(*x509.Certificate) {
		return func(c *x509.Certificate) {
			c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: id, Critical: critical, Value: []byte{2, 1, 0}})
		}
	}
	for name, tc := range map[string]struct {
		edit func(*x509.Certificate)
		want error
	}{
		"unknown product":           {replace(oid(2), []byte("\x16\x04Rome")), snp.ErrProduct},
		"product of another type":   {replace(oid(2), []byte("\x0c\x05Milan")), snp.ErrCertificate},
		"no product":                {remove(oid(2)), snp.ErrProduct},
		"no microcode":              {remove(oid(3, 8)), snp.ErrCertificate},
		"no reserved part":          {remove(oid(3, 5)), snp.ErrCertificate},
		"no structure":              {remove(oid(1)), snp.ErrCertificate},
		"structure 2":               {replace(oid(1), []byte{2, 1, 2}), snp.ErrCertificate},
		"a part that is no byte":    {replace(oid(3, 1), []byte{2, 2, 1, 0}), snp.ErrCertificate},
		"a negative part":           {replace(oid(3, 1), []byte{2, 1, 0xFF}), snp.ErrCertificate},
		"a part with a tail":        {replace(oid(3, 1), []byte{2, 1, 4, 0}), snp.ErrCertificate},
		"a reserved part that is 1": {replace(oid(3, 5), []byte{2, 1, 1}), snp.ErrTCB},
		"an FMC of Milan":           {add(oid(3, 9), false), snp.ErrCertificate},
		"a part nobody knows":       {add(oid(3, 10), false), snp.ErrCertificate},
		"an extension nobody knows": {add(oid(9), false), snp.ErrCertificate},
		"a critical one of others":  {add(asn1.ObjectIdentifier{1, 2, 3}, true), snp.ErrCertificate},
		"no chip":                   {remove(oid(4)), snp.ErrCertificate},
		"half a chip":               {replace(oid(4), make([]byte, 32)), snp.ErrCertificate},
		"no chip but 64 zeros":      {replace(oid(4), make([]byte, 64)), snp.ErrChip},
		"chip and provider": {func(c *x509.Certificate) {
			c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: oid(5), Value: []byte("\x16\x01x")})
		}, snp.ErrCertificate},
		"another name":               {func(c *x509.Certificate) { c.Subject = amd.Name("SEV-XCEK") }, snp.ErrCertificate},
		"an authority's":             {func(c *x509.Certificate) { c.IsCA, c.BasicConstraintsValid = true, true }, snp.ErrCertificate},
		"signed with another scheme": {func(c *x509.Certificate) { c.SignatureAlgorithm = x509.SHA256WithRSA }, snp.ErrCertificate},
	} {
		var chip *amd.Chip
		if name == "chip and provider" { // a VLEK would have the extension twice
			chip = must[*amd.Chip](t)(a.Chip(amd.ChipOptions{Edit: func(c *x509.Certificate) {
				if c.Subject.CommonName == "SEV-VCEK" {
					tc.edit(c)
				}
			}}))
		} else {
			chip = must[*amd.Chip](t)(a.Chip(amd.ChipOptions{Edit: tc.edit}))
		}
		_, err := verify(t.Context(), lab(t, a), must[*evidence](t)(chip.Evidence(amd.Report{Data: testBinder})))
		if !errors.Is(err, tc.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// An extension of others that is not critical, and a chip ID with its type, do no harm.
	for name, edit := range map[string]func(*x509.Certificate){
		"another's": add(asn1.ObjectIdentifier{1, 2, 3}, false),
		"typed":     func(c *x509.Certificate) { typed(c, oid(4)) },
	} {
		chip := must[*amd.Chip](t)(a.Chip(amd.ChipOptions{Edit: edit}))
		if _, err := verify(t.Context(), lab(t, a), must[*evidence](t)(chip.Evidence(amd.Report{Data: testBinder}))); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func typed(c *x509.Certificate, id asn1.ObjectIdentifier) {
	for i, e := range c.ExtraExtensions {
		if e.Id.Equal(id) {
			c.ExtraExtensions[i].Value, _ = asn1.Marshal(e.Value)
		}
	}
}

func TestWhatAMDTookBackIsRefused(t *testing.T) {
	chip := newChip(t, "Genoa")
	begin := chip.ARK.NotBefore
	year := func(revoked ...*big.Int) []byte {
		return must[[]byte](t)(chip.CRL(begin, begin.AddDate(1, 0, 0), revoked...))
	}
	for name, tc := range map[string]struct {
		vlek bool
		crl  []byte
		want error
	}{
		"ASK":                       {false, year(amd.ASKSerial), snp.ErrRevoked},
		"ASVK":                      {true, year(amd.ASVKSerial), snp.ErrRevoked},
		"VCEK":                      {false, year(chip.VCEK.SerialNumber), snp.ErrRevoked},
		"ARK":                       {false, year(chip.ARK.SerialNumber), snp.ErrRevoked},
		"among others":              {false, year(big.NewInt(77), amd.ASKSerial, big.NewInt(78)), snp.ErrRevoked},
		"the other's intermediate":  {true, year(amd.ASKSerial), nil},
		"somebody else":             {false, year(big.NewInt(77)), nil},
		"list that ended":           {false, must[[]byte](t)(chip.CRL(begin, begin.Add(time.Hour))), snp.ErrCRL},
		"list that is not yet":      {false, must[[]byte](t)(chip.CRL(begin.AddDate(1, 0, 0), begin.AddDate(2, 0, 0))), snp.ErrCRL},
		"list with a critical rest": {false, must[[]byte](t)(chip.CRLWith(begin, begin.AddDate(1, 0, 0), pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 28}, Critical: true, Value: []byte{0x30, 0}})), snp.ErrCRL},
	} {
		ev := must[*evidence](t)(chip.Evidence(amd.Report{VLEK: tc.vlek, Data: testBinder}))
		ev.Crl = tc.crl
		_, err := verify(t.Context(), lab(t, chip.Authority), ev)
		if tc.want == nil && err != nil || !errors.Is(err, tc.want) {
			t.Errorf("%s: %v", name, err)
		}
		if errors.Is(err, snp.ErrCRL) && tc.want == snp.ErrCRL && strings.Contains(name, "that") && !strings.Contains(err.Error(), "clock says") {
			t.Errorf("%s: the clock is not named: %v", name, err)
		}
	}
}

// A clock that is ten years off is named in the refusal, and what was known before
// does not outlive its validity.
func TestAWrongClockIsNamed(t *testing.T) {
	chip := newChip(t, "Milan")
	now := time.Now()
	v := lab(t, chip.Authority, func(o *snp.VerifierOptions) { o.Now = func() time.Time { return now } })
	ev := must[*evidence](t)(chip.Evidence(amd.Report{Data: testBinder}))
	ev.Crl = must[[]byte](t)(chip.CRL(chip.ARK.NotBefore, chip.ARK.NotBefore.AddDate(20, 0, 0)))
	if _, err := verify(t.Context(), v, ev); err != nil || v.Known() != 1 {
		t.Fatal(err)
	}
	start := now
	for _, years := range []int{-10, 10, 50} {
		now = start.AddDate(years, 0, 0)
		_, err := verify(t.Context(), v, ev)
		refused(t, err, snp.ErrExpired)
		if err != nil && !strings.Contains(err.Error(), "this machine's clock says "+now.Format(time.RFC3339)) {
			t.Error(err)
		}
	}
	// The list alone ends as well.
	now = start
	ev.Crl = must[[]byte](t)(chip.CRL(chip.ARK.NotBefore, start.Add(time.Hour)))
	if _, err := verify(t.Context(), v, ev); err != nil {
		t.Fatal(err)
	}
	now = start.Add(2 * time.Hour)
	_, err := verify(t.Context(), v, ev)
	refused(t, err, snp.ErrCRL)
}

func TestUnsetMeansRefused(t *testing.T) {
	if _, err := snp.NewVerifier(snp.VerifierOptions{}); !errors.Is(err, snp.ErrConfiguration) {
		t.Error(err)
	}
	chip := newChip(t, "Milan")
	ev := must[*evidence](t)(chip.Evidence(amd.Report{Data: testBinder}))
	root := chip.Root("lab")
	for name, roots := range map[string][]snp.Root{
		"no root":          nil,
		"no name":          {{Product: root.Product, ARK: root.ARK, ASK: root.ASK}},
		"unknown product":  {{Name: "x", Product: "Rome", ARK: root.ARK, ASK: root.ASK}},
		"no ARK":           {{Name: "x", Product: root.Product, ASK: root.ASK}},
		"no intermediates": {{Name: "x", Product: root.Product, ARK: root.ARK}},
		"one of two":       {root, {}},
	} {
		v := lab(t, chip.Authority, trusting(roots...))
		if _, err := v.Begin(t.Context(), nil); !errors.Is(err, snp.ErrConfiguration) || errors.Is(err, attestation.ErrRefused) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := v.VerifyReport(t.Context(), ev, testBinder); !errors.Is(err, snp.ErrConfiguration) {
			t.Errorf("%s: %v", name, err)
		}
	}
	v := lab(t, chip.Authority, trusting(snp.Root{Name: "x", Product: "Milan", ARK: root.ARK, ASVK: root.ASVK}))
	_, err := verify(t.Context(), v, ev)
	refused(t, err, snp.ErrUntrusted)
	_, err = lab(t, chip.Authority).Begin(t.Context(), []byte("an offer"))
	refused(t, err, snp.ErrMalformed)
}

// What a removed root vouched for is not remembered.
func TestARemovedRootIsBelievedNoLonger(t *testing.T) {
	chip, other := newChip(t, "Milan"), newChip(t, "Genoa")
	roots := []snp.Root{chip.Root("lab")}
	v := must[*snp.Verifier](t)(snp.NewVerifier(snp.VerifierOptions{Trust: func() snp.Trust { return snp.Trust{Roots: roots} }}))
	ev := must[*evidence](t)(chip.Evidence(amd.Report{Data: testBinder}))
	if _, err := verify(t.Context(), v, ev); err != nil {
		t.Fatal(err)
	}
	roots = []snp.Root{other.Root("lab")}
	_, err := verify(context.Background(), v, ev)
	refused(t, err, snp.ErrUntrusted)
	// One that is known has the list looked at all the same.
	roots = []snp.Root{chip.Root("lab")}
	revoked := clone(ev, func(e *evidence) {
		e.Crl = must[[]byte](t)(chip.CRL(chip.ARK.NotBefore, chip.ARK.NotBefore.AddDate(1, 0, 0), amd.ASKSerial))
	})
	_, err = verify(t.Context(), v, revoked)
	refused(t, err, snp.ErrRevoked)
	if bytes.Equal(revoked.GetCrl(), ev.GetCrl()) {
		t.Error("the lists are the same")
	}
}
