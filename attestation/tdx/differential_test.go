package tdx

import (
	"crypto/x509"
	"errors"
	"strings"
	"testing"
	"time"

	testcases "github.com/google/go-tdx-guest/testing"
	"github.com/google/go-tdx-guest/verify"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/test/sim/intel"
)

// The purposes for which we decide otherwise than go-tdx-guest's verifier. A case
// of the differential test that differs must name one.
const (
	// The policy decides by name what is not up to date.
	statusIsForThePolicy = "every TCB status but Revoked is accepted as a fact"
	// The library knows the platform CA only.
	processorCA = "PCK certificates of the processor CA are accepted"
	// The library judges the signer of a module 1.5 by that of a module 1.0.
	moduleOfItsOwn = "a module 1.5 is judged by its own identity"
	// The library checks ends of validity alone.
	notBefore = "collateral before its issue date is refused"
	// The library leaves it to its package validate.
	reportData = "the report data is compared in the same step"
	// The library has only the platform's or the module's status, never both.
	bothCount = "platform and module count both"
	// The library lets what follows a quote pass.
	exactLength = "nothing but NULs may follow a quote"
)

// library asks go-tdx-guest, with everything on and the same collateral, root and
// time.
func (s *scene) library() error {
	c := s.ev.Collateral
	header := func(name string, chain []byte) map[string][]string {
		return map[string][]string{name: {intel.Escape(chain)}}
	}
	getter := &testcases.Getter{Responses: map[string]testcases.HTTPResponse{}}
	chain := s.m.Chain()
	if q, err := Parse(s.ev.Quote); err == nil {
		chain = q.chain
	}
	p, err := parsePCK(chain)
	if err != nil {
		return err
	}
	requests := p.requests(nil)
	for i, d := range documents(c) {
		getter.Responses[requests[i].URL] = testcases.HTTPResponse{Header: header(requests[i].ChainHeader, d.Chain), Body: d.Body}
	}
	roots := x509.NewCertPool()
	for _, r := range s.trust.Roots {
		roots.AddCert(r.Certificate)
	}
	return verify.RawTdxQuote(s.ev.Quote, &verify.Options{
		CheckRevocations: true, GetCollateral: true, Getter: getter, TrustedRoots: roots,
		Now: &verify.TimeSet{PckCertChain: s.now, PckCrl: s.now, RootCaCrl: s.now, TcbInfo: s.now, QeIdentity: s.now},
	})
}

// TestWeAgreeWithTheLibrary verifies each case twice. Where the two differ, the
// case says for what purpose.
func TestWeAgreeWithTheLibrary(t *testing.T) {
	levels := func(status string) func(*scene) {
		return func(s *scene) {
			s.tcbInfo(func(o intel.Object) { o["tcbLevels"] = []intel.Object{intel.Level(status, 0, [16]byte{}, [16]byte{})} })
		}
	}
	flip := func(part string) func(*scene) {
		return func(s *scene) {
			for _, r := range regions(s.ev.Quote) {
				if r.name == part {
					s.ev.Quote[(r.from+r.to)/2] ^= 1
				}
			}
		}
	}
	module10 := func(s *scene) { s.fields.TCBSVN = [16]byte{5, 0, 6}; s.quote() }
	for name, c := range map[string]struct {
		change  func(s *scene)
		purpose string
	}{
		"genuine":                 {func(*scene) {}, ""},
		"a module 1.0":            {module10, ""},
		"SWHardeningNeeded":       {levels("SWHardeningNeeded"), ""},
		"out of date module 1.0":  {func(s *scene) { module10(s); levels("OutOfDate")(s) }, statusIsForThePolicy},
		"SWHardening, module 1.0": {func(s *scene) { module10(s); levels("SWHardeningNeeded")(s) }, statusIsForThePolicy},
		"Configuration, 1.0":      {func(s *scene) { module10(s); levels("ConfigurationNeeded")(s) }, statusIsForThePolicy},
		"revoked level, 1.0":      {func(s *scene) { module10(s); levels("Revoked")(s) }, ""},
		"revoked level, 1.5":      {levels("Revoked"), bothCount},
		"module 1.5 out of date":  {func(s *scene) { s.fields.TCBSVN[0] = 3; s.quote() }, statusIsForThePolicy},
		"module 1.5 unknown":      {func(s *scene) { s.fields.TCBSVN[1] = 7; s.quote() }, ""},
		"module 1.5 too old":      {func(s *scene) { s.fields.TCBSVN[0] = 1; s.quote() }, ""},
		"QE out of date":          {func(s *scene) { s.m.QE.SVN = 4; s.quote() }, statusIsForThePolicy},
		"QE too old":              {func(s *scene) { s.m.QE.SVN = 1; s.quote() }, ""},
		"QE of another product":   {func(s *scene) { s.m.QE.ProdID = 9; s.quote() }, ""},
		"QE in debug mode":        {func(s *scene) { s.m.QE.Attributes[0] |= 2; s.quote() }, ""},
		"QE of another signer":    {func(s *scene) { s.m.QE.MRSigner[3]++; s.quote() }, ""},
		"signer of a module 1.0":  {func(s *scene) { module10(s); s.fields.Signer[0] = 1; s.quote() }, ""},
		"signer of a module 1.5": {func(s *scene) {
			s.fields.Signer[0] = 1
			s.quote()
			s.tcbInfo(func(o intel.Object) {
				o["tdxModuleIdentities"].([]intel.Object)[0]["mrsigner"] = "01" + strings.Repeat("00", 47)
			})
		}, moduleOfItsOwn},
		"a signer that only 1.0 has": {func(s *scene) {
			s.fields.Signer[0] = 1
			s.quote()
			s.tcbInfo(func(o intel.Object) { o["tdxModule"].(intel.Object)["mrsigner"] = "01" + strings.Repeat("00", 47) })
		}, moduleOfItsOwn},
		"too old a platform": {func(s *scene) {
			s.tcbInfo(func(o intel.Object) {
				o["tcbLevels"] = []intel.Object{intel.Level("UpToDate", 99, [16]byte{}, [16]byte{})}
			})
		}, ""},
		"another FMSPC":           {func(s *scene) { s.tcbInfo(func(o intel.Object) { o["fmspc"] = "00906ED50000" }) }, ""},
		"another PCE":             {func(s *scene) { s.tcbInfo(func(o intel.Object) { o["pceId"] = "0001" }) }, ""},
		"TCB info of SGX":         {func(s *scene) { s.tcbInfo(func(o intel.Object) { o["id"] = "SGX" }) }, ""},
		"QE identity of SGX":      {func(s *scene) { s.qeIdentity(func(o intel.Object) { o["id"] = "QE" }) }, ""},
		"PCK revoked":             {func(s *scene) { s.ev.Collateral.PckCrl = s.w.CRL(s.w.Platform, s.m.PCK.Certificate) }, ""},
		"CA revoked":              {func(s *scene) { s.ev.Collateral.RootCrl = s.w.CRL(s.w.Root, s.w.Platform.Certificate) }, ""},
		"signer revoked":          {func(s *scene) { s.ev.Collateral.RootCrl = s.w.CRL(s.w.Root, s.w.Signing.Certificate) }, ""},
		"CRL of another CA":       {func(s *scene) { s.ev.Collateral.PckCrl = s.w.PCKCRL("processor").Body }, ""},
		"no PCK CRL":              {func(s *scene) { s.ev.Collateral.PckCrl = nil }, ""},
		"another root":            {func(s *scene) { s.trust.Roots = []Root{Intel()} }, ""},
		"too late":                {func(s *scene) { s.now = s.now.AddDate(0, 2, 0) }, ""},
		"far too late":            {func(s *scene) { s.now = s.now.AddDate(40, 0, 0) }, ""},
		"before the certificates": {func(s *scene) { s.now = s.now.AddDate(-1, 0, 0) }, ""},
		"before the collateral":   {func(s *scene) { s.now = s.w.Now.Add(-time.Minute) }, notBefore},
		"other report data":       {func(s *scene) { s.fields.Report[0]++; s.quote() }, reportData},
		"something follows":       {func(s *scene) { s.ev.Quote = append(s.ev.Quote, 1) }, exactLength},
		"an event log of another": {func(s *scene) { s.ev.EventLog = logOf(nil) }, ""},
		"flipped: user data":      {flip("user data"), ""},
		"flipped: TD report":      {flip("TD report"), ""},
		"flipped: signature":      {flip("signature"), ""},
		"flipped: key":            {flip("attestation key"), ""},
		"flipped: QE report":      {flip("QE report"), ""},
		"flipped: QE signature":   {flip("QE signature"), ""},
		"flipped: QE data":        {flip("authentication data"), ""},
		"flipped: TEE type":       {flip("TEE type"), ""},
		"flipped: reserved":       {flip("reserved"), ""},
	} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t)
			c.change(s)
			_, ours := s.verify()
			theirs := s.library()
			if ours != nil && !errors.Is(ours, attestation.ErrRefused) {
				t.Errorf("a nameless error: %v", ours)
			}
			if agree := (ours == nil) == (theirs == nil); agree != (c.purpose == "") {
				t.Errorf("the purpose is %q\n  we:      %v\n  library: %v", c.purpose, ours, theirs)
			}
		})
	}
	t.Run("the processor CA", func(t *testing.T) {
		s := newScene(t, shapes[1].change)
		if _, err := s.verify(); err != nil || s.library() == nil {
			t.Errorf("the purpose is %q; we: %v", processorCA, err)
		}
	})
	t.Run("the recorded quote", func(t *testing.T) {
		s := newScene(t)
		s.trust.Roots, s.now, s.ev = []Root{Intel()}, recordedAt, &attestv1.TDXEvidence{Quote: realQuote(t), Collateral: recorded(t)}
		_, ours := s.verify()
		if theirs := s.library(); !errors.Is(ours, ErrTCB) || !strings.Contains(theirs.Error(), "no matching TCB level found") {
			t.Errorf("we: %v\nlibrary: %v", ours, theirs)
		}
		s.now = recordedAt.AddDate(0, 2, 0)
		_, ours = s.verify()
		if theirs := s.library(); !errors.Is(ours, ErrCollateralExpired) || !errors.Is(theirs, verify.ErrTcbInfoExpired) && !strings.Contains(theirs.Error(), "expired") {
			t.Errorf("we: %v\nlibrary: %v", ours, theirs)
		}
	})
}
