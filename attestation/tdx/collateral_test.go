package tdx

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/endorsement"
	"github.com/keyagent/keyagent/test/sim/intel"
)

// TestAStaleTCBLevelHasItsNameInTheFacts: attack 22. Every status but Revoked is
// for the policy, under Intel's name, and what is revoked is refused.
func TestAStaleTCBLevelHasItsNameInTheFacts(t *testing.T) {
	for _, status := range []string{"UpToDate", "SWHardeningNeeded", "ConfigurationNeeded", "ConfigurationAndSWHardeningNeeded",
		"OutOfDate", "OutOfDateConfigurationNeeded", "Revoked"} {
		t.Run(status, func(t *testing.T) {
			s := newScene(t)
			s.tcbInfo(func(o intel.Object) {
				o["tcbLevels"] = []intel.Object{intel.Level(status, 0, [16]byte{}, [16]byte{}, "INTEL-SA-1")}
			})
			if status == "Revoked" {
				s.refused(ErrRevoked)
				return
			}
			if c := s.accepted(); c.Facts["tcb_status"] != status || !slices.Equal(c.Facts["advisories"].([]string), []string{"INTEL-SA-1"}) {
				t.Errorf("%v %v", c.Facts["tcb_status"], c.Facts["advisories"])
			}
		})
	}
}

// TestAPlatformIsNoBetterThanItsParts: module and quoting enclave have levels of
// their own.
func TestAPlatformIsNoBetterThanItsParts(t *testing.T) {
	for _, c := range []struct{ platform, part, want string }{
		{"UpToDate", "OutOfDate", "OutOfDate"},
		{"SWHardeningNeeded", "OutOfDate", "OutOfDate"},
		{"ConfigurationNeeded", "OutOfDate", "OutOfDateConfigurationNeeded"},
		{"ConfigurationAndSWHardeningNeeded", "OutOfDate", "OutOfDateConfigurationNeeded"},
		{"OutOfDateConfigurationNeeded", "OutOfDate", "OutOfDateConfigurationNeeded"},
		{"OutOfDate", "UpToDate", "OutOfDate"},
		{"UpToDate", "UpToDate", "UpToDate"},
	} {
		for _, part := range []string{"module_tcb_status", "qe_tcb_status"} {
			s := newScene(t)
			s.tcbInfo(func(o intel.Object) {
				o["tcbLevels"] = []intel.Object{intel.Level(c.platform, 0, [16]byte{}, [16]byte{})}
				if part == "module_tcb_status" {
					o["tdxModuleIdentities"].([]intel.Object)[0]["tcbLevels"] = []intel.Object{intel.ModuleLevel(c.part, 0)}
				}
			})
			if part == "qe_tcb_status" {
				s.qeIdentity(func(o intel.Object) { o["tcbLevels"] = []intel.Object{intel.ModuleLevel(c.part, 0)} })
			}
			if got := s.accepted(); got.Facts["tcb_status"] != c.want || got.Facts[part] != c.part {
				t.Errorf("%s, %s %s: %v, want %s", c.platform, part, c.part, got.Facts["tcb_status"], c.want)
			}
		}
	}
}

func TestTheFirstLevelThatIsReachedCounts(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(p *intel.Platform, f *intel.Fields)
		want   string // empty: refused
	}{
		{"all as new as the newest", func(*intel.Platform, *intel.Fields) {}, "UpToDate"},
		{"one CPU component is older", func(p *intel.Platform, _ *intel.Fields) { p.Components[0] = 7 }, "OutOfDate"},
		{"the PCE is older", func(p *intel.Platform, _ *intel.Fields) { p.PCESVN = 12 }, "OutOfDate"},
		{"a TDX component is older", func(_ *intel.Platform, f *intel.Fields) { f.TCBSVN[2] = 5 }, "OutOfDate"},
		{"the module 1.5 is older", func(_ *intel.Platform, f *intel.Fields) { f.TCBSVN[0] = 2 }, "OutOfDate"},
		{"the module 1.0 is older", func(_ *intel.Platform, f *intel.Fields) { f.TCBSVN = [16]byte{3, 0, 6} }, "OutOfDate"},
		{"older than all levels", func(p *intel.Platform, _ *intel.Fields) { p.Components[0] = 4 }, ""},
		{"a PCE older than all levels", func(p *intel.Platform, _ *intel.Fields) { p.PCESVN = 4 }, ""},
		{"a module 1.0 older than all levels", func(_ *intel.Platform, f *intel.Fields) { f.TCBSVN = [16]byte{2, 0, 6} }, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newScene(t, c.change)
			if c.want == "" {
				s.refused(ErrTCB)
			} else if got := s.accepted(); got.Facts["tcb_status"] != c.want {
				t.Errorf("%v, want %s", got.Facts["tcb_status"], c.want)
			}
		})
	}
}

// TestForgedOrForeignCollateralIsRefused: attack 22.
func TestForgedOrForeignCollateralIsRefused(t *testing.T) {
	foreign := must[*intel.World](t)(intel.New(time.Date(2026, 6, 1, 12, 0, 0, 0, time.UTC)))
	for name, c := range map[string]struct {
		change func(s *scene)
		want   error
	}{
		"TCB info that was changed": {func(s *scene) {
			s.ev.Collateral.TcbInfo = bytes.Replace(s.ev.Collateral.TcbInfo, []byte(`"OutOfDate"`), []byte(`"UpToDate"`), 1)
		}, ErrCollateral},
		"QE identity that was changed": {func(s *scene) {
			s.ev.Collateral.QeIdentity = bytes.Replace(s.ev.Collateral.QeIdentity, []byte(`"isvprodid":2`), []byte(`"isvprodid":3`), 1)
		}, ErrCollateral},
		"TCB info of another Intel": {func(s *scene) {
			d := foreign.TCBInfo(s.m.Platform.FMSPC, nil)
			s.ev.Collateral.TcbInfo, s.ev.Collateral.TcbInfoChain = d.Body, d.Chain
		}, ErrCollateral},
		"QE identity of another Intel": {func(s *scene) {
			d := foreign.QEIdentity(nil)
			s.ev.Collateral.QeIdentity, s.ev.Collateral.QeIdentityChain = d.Body, d.Chain
		}, ErrCollateral},
		"TCB info signed by a PCK": {func(s *scene) {
			w := *s.w
			w.Signing = s.m.PCK
			d := w.TCBInfo(s.m.Platform.FMSPC, nil)
			s.ev.Collateral.TcbInfo, s.ev.Collateral.TcbInfoChain = d.Body, d.Chain
		}, ErrCollateral},
		"TCB info where the QE identity should be": {func(s *scene) {
			s.ev.Collateral.QeIdentity, s.ev.Collateral.QeIdentityChain = s.ev.Collateral.TcbInfo, s.ev.Collateral.TcbInfoChain
		}, ErrCollateral},
		"TCB info of SGX":       {func(s *scene) { s.tcbInfo(func(o intel.Object) { o["id"] = "SGX" }) }, ErrCollateral},
		"TCB info version 2":    {func(s *scene) { s.tcbInfo(func(o intel.Object) { o["version"] = 2 }) }, ErrCollateral},
		"QE identity of SGX":    {func(s *scene) { s.qeIdentity(func(o intel.Object) { o["id"] = "QE" }) }, ErrCollateral},
		"QE identity version 3": {func(s *scene) { s.qeIdentity(func(o intel.Object) { o["version"] = 3 }) }, ErrCollateral},
		"no levels":             {func(s *scene) { s.tcbInfo(func(o intel.Object) { o["tcbLevels"] = []any{} }) }, ErrCollateral},
		"a status nobody knows": {func(s *scene) {
			s.tcbInfo(func(o intel.Object) { o["tcbLevels"].([]intel.Object)[0]["tcbStatus"] = "Fine" })
		}, ErrCollateral},
		"a level without a status": {func(s *scene) {
			s.qeIdentity(func(o intel.Object) { delete(o["tcbLevels"].([]intel.Object)[0], "tcbStatus") })
		}, ErrCollateral},
		"a signer of another name":               {func(s *scene) { s.signedBy("Intel SGX Something", false, 0) }, ErrCollateral},
		"a signer that is a CA":                  {func(s *scene) { s.signedBy(signingName, true, 0) }, ErrCollateral},
		"a signer whose time is up":              {func(s *scene) { s.signedBy(signingName, false, -21) }, ErrExpired},
		"another FMSPC":                          {func(s *scene) { s.tcbInfo(func(o intel.Object) { o["fmspc"] = "00906ED50000" }) }, ErrTCB},
		"another PCE":                            {func(s *scene) { s.tcbInfo(func(o intel.Object) { o["pceId"] = "0001" }) }, ErrTCB},
		"a QE whose report says more than a key": {func(s *scene) { s.m.QE.Tail[31] = 1; s.quote() }, ErrQE},
		"another QE signer":                      {func(s *scene) { s.m.QE.MRSigner[0]++; s.quote() }, ErrQE},
		"another enclave of the signer":          {func(s *scene) { s.m.QE.ProdID = 1; s.quote() }, ErrQE},
		"a QE in debug mode":                     {func(s *scene) { s.m.QE.Attributes[0] |= 2; s.quote() }, ErrQE},
		"another MISCSELECT":                     {func(s *scene) { s.m.QE.MiscSelect[0] = 1; s.quote() }, ErrQE},
		"a QE older than all levels":             {func(s *scene) { s.m.QE.SVN = 3; s.quote() }, ErrQE},
		"a revoked level of the QE": {func(s *scene) {
			s.qeIdentity(func(o intel.Object) { o["tcbLevels"] = []intel.Object{intel.ModuleLevel("Revoked", 0)} })
		}, ErrRevoked},
		"another module signer":          {func(s *scene) { s.fields.Signer[0] = 1; s.quote() }, ErrModule},
		"another module's signer":        {func(s *scene) { s.fields.TCBSVN[1], s.fields.Signer[0] = 0, 1; s.quote() }, ErrModule},
		"a module in debug mode":         {func(s *scene) { s.fields.SeamAttr[0] = 1; s.quote() }, ErrModule},
		"a module nobody knows":          {func(s *scene) { s.fields.TCBSVN[1] = 9; s.quote() }, ErrModule},
		"a module older than all levels": {func(s *scene) { s.fields.TCBSVN[0] = 1; s.quote() }, ErrModule},
		"a revoked module": {func(s *scene) {
			s.tcbInfo(func(o intel.Object) {
				o["tdxModuleIdentities"].([]intel.Object)[0]["tcbLevels"] = []intel.Object{intel.ModuleLevel("Revoked", 0)}
			})
		}, ErrRevoked},
	} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t)
			s.accepted()
			c.change(s)
			s.refused(c.want)
		})
	}
}

// TestWhatIsRevokedIsRefused: attack 22.
func TestWhatIsRevokedIsRefused(t *testing.T) {
	for _, ca := range []string{"platform", "processor"} {
		s := newScene(t, func(p *intel.Platform, _ *intel.Fields) { p.CA = ca })
		issuer, other := s.w.Platform, s.w.Processor
		if ca == "processor" {
			issuer, other = other, issuer
		}
		for name, c := range map[string]struct {
			pck, root []byte
			want      error
		}{
			"the PCK":                  {s.w.CRL(issuer, s.m.PCK.Certificate), s.w.CRL(s.w.Root), ErrRevoked},
			"its CA":                   {s.w.CRL(issuer), s.w.CRL(s.w.Root, issuer.Certificate), ErrRevoked},
			"who signs TCB info":       {s.w.CRL(issuer), s.w.CRL(s.w.Root, s.w.Signing.Certificate), ErrRevoked},
			"the other CA":             {s.w.CRL(issuer), s.w.CRL(s.w.Root, other.Certificate), nil},
			"the list of the other CA": {s.w.CRL(other), s.w.CRL(s.w.Root), ErrCRL},
			"a list that PCKs sign":    {s.w.CRL(intel.Authority{Certificate: issuer.Certificate, Key: s.m.PCK.Key}), s.w.CRL(s.w.Root), ErrCRL},
			"a list for the root's":    {s.w.CRL(issuer), s.w.CRL(issuer), ErrCRL},
			"no list but bytes":        {[]byte{1, 2, 3}, s.w.CRL(s.w.Root), ErrCRL},
		} {
			s.ev.Collateral.PckCrl, s.ev.Collateral.RootCrl = c.pck, c.root
			if c.want == nil {
				s.accepted()
				continue
			}
			t.Run(ca+": "+name, func(t *testing.T) { s.t = t; s.refused(c.want) })
		}
	}
}

// TestAPartialListIsRefused: one with an extension that says that it is not all, or
// about something else.
func TestAPartialListIsRefused(t *testing.T) {
	s := newScene(t)
	s.ev.Collateral.PckCrl = must[[]byte](t)(x509.CreateRevocationList(rand.Reader, &x509.RevocationList{
		Number: big.NewInt(1), ThisUpdate: s.w.Now, NextUpdate: s.w.Now.AddDate(0, 1, 0),
		ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 27}, Critical: true, Value: []byte{2, 1, 1}}}, // delta CRL
	}, s.w.Platform.Certificate, s.w.Platform.Key))
	s.refused(ErrCRL)
}

// TestAClockTenYearsOffIsNamed: attack 37. The error says what the clock says.
func TestAClockTenYearsOffIsNamed(t *testing.T) {
	for _, c := range []struct {
		name string
		off  time.Duration
		want error
	}{
		{"ten years back", -10 * 365 * 24 * time.Hour, ErrExpired},
		{"before the collateral was issued", -time.Hour - time.Minute, ErrCollateralExpired},
		{"a month ahead", 30 * 24 * time.Hour, ErrCollateralExpired},
		{"ten years ahead", 10 * 365 * 24 * time.Hour, ErrCollateralExpired},
		{"thirty years ahead", 30 * 365 * 24 * time.Hour, ErrExpired},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newScene(t)
			v := s.verifier()
			if _, err := verifyWith(v, s.ev); err != nil {
				t.Fatal(err)
			}
			s.now = s.now.Add(c.off)
			// The same verifier, which remembers the chain and the collateral.
			if _, err := verifyWith(v, s.ev); !errors.Is(err, c.want) || !strings.Contains(err.Error(), s.now.Format(time.RFC3339)) {
				t.Errorf("%v", err)
			}
		})
	}
}

func TestEachDocumentMustBeFresh(t *testing.T) {
	old := *must[*intel.World](t)(theWorld())
	old.Now = old.Now.AddDate(0, -2, 0)
	for name, change := range map[string]func(c *attestv1.TDXCollateral){
		"TCB info":    func(c *attestv1.TDXCollateral) { c.TcbInfo = old.TCBInfo("50806f000000", nil).Body },
		"QE identity": func(c *attestv1.TDXCollateral) { c.QeIdentity = old.QEIdentity(nil).Body },
		"PCK CRL":     func(c *attestv1.TDXCollateral) { c.PckCrl = old.PCKCRL("platform").Body },
		"root CRL":    func(c *attestv1.TDXCollateral) { c.RootCrl = old.CRL(old.Root) },
	} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t)
			change(s.ev.Collateral)
			if _, err := s.verify(); !errors.Is(err, ErrCollateralExpired) || !strings.Contains(err.Error(), name) {
				t.Error(err)
			}
			// A source has a newer one, and only that one is asked for.
			pcs := &intel.PCS{World: s.w}
			s.source = pcs
			s.accepted()
			if got := pcs.Requests(); len(got) != 1 {
				t.Errorf("asked for %v", got)
			}
		})
	}
}

// TestCarriedCollateralNeedsNobody: attack 35. A thousand boots ask Intel nothing.
func TestCarriedCollateralNeedsNobody(t *testing.T) {
	s := newScene(t)
	pcs := &intel.PCS{World: s.w}
	s.source = pcs
	v := s.verifier()
	for range 1000 {
		if _, err := verifyWith(v, s.ev); err != nil {
			t.Fatal(err)
		}
	}
	if got := pcs.Requests(); len(got) != 0 {
		t.Errorf("%d requests", len(got))
	}
	s.ev.Collateral = nil
	if _, err := verifyWith(v, s.ev); err != nil {
		t.Fatal(err)
	}
	if got := pcs.Requests(); len(got) != 4 {
		t.Errorf("%d requests", len(got))
	}
}

// TestAMirrorsLieDoesNotStay: attack 35. What a mirror made up, with a date far
// away, or mixed up, is not kept in the document's place.
func TestAMirrorsLieDoesNotStay(t *testing.T) {
	foreign := must[*intel.World](t)(intel.New(time.Date(2026, 6, 1, 12, 0, 0, 0, time.UTC)))
	at := map[string]int{intel.TCBInfo: docTCBInfo, intel.QEIdentity: docQEIdentity, intel.PCKCRL: docPCKCRL, intel.RootCRL: docRootCRL}
	for name, lie := range map[string]struct {
		key string
		doc func(s *scene) endorsement.Document
	}{
		"TCB info that nobody signed": {intel.TCBInfo, func(*scene) endorsement.Document {
			return endorsement.Document{Body: []byte(`{"tcbInfo":{"nextUpdate":"9999-01-01T00:00:00Z"}}`)}
		}},
		"TCB info of another platform": {intel.TCBInfo, func(s *scene) endorsement.Document { return s.w.TCBInfo("00906ED50000", nil) }},
		"TCB info for the QE identity": {intel.QEIdentity, func(s *scene) endorsement.Document { return s.w.TCBInfo(s.m.Platform.FMSPC, nil) }},
		"a QE identity of another":     {intel.QEIdentity, func(*scene) endorsement.Document { return foreign.QEIdentity(nil) }},
		"the list of the other CA":     {intel.PCKCRL, func(s *scene) endorsement.Document { return s.w.PCKCRL("processor") }},
		"another root's list":          {intel.RootCRL, func(*scene) endorsement.Document { return endorsement.Document{Body: foreign.CRL(foreign.Root)} }},
	} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t)
			s.ev.Collateral = nil
			pcs := &intel.PCS{World: s.w}
			pcs.Replace(lie.key, lie.doc(s))
			cache := must[*endorsement.Cache](t)(endorsement.NewCache(endorsement.CacheOptions{
				Dir: t.TempDir(), Source: pcs, Negative: time.Second, Now: func() time.Time { return s.now }}))
			defer cache.Close()
			s.source = cache
			v := s.verifier()
			if _, err := verifyWith(v, s.ev); !errors.Is(err, endorsement.ErrUnavailable) {
				t.Error(err)
			}
			honest := &intel.PCS{World: s.w}
			d := must[endorsement.Document](t)(honest.Get(t.Context(), must[*pck](t)(parsePCK(s.m.Chain())).requests(nil)[at[lie.key]]))
			pcs.Replace(lie.key, d)
			s.now = s.now.Add(time.Minute)
			if _, err := verifyWith(v, s.ev); err != nil {
				t.Errorf("after the mirror was mended: %v", err)
			}
		})
	}
}

// nobody is a source that has an outage.
type nobody struct{ err error }

func (n nobody) Get(context.Context, endorsement.Request) (endorsement.Document, error) {
	return endorsement.Document{}, n.err
}

// TestNoCollateralIsRefused: attacks 22 and 35. Without collateral nothing is
// accepted, and the error says what the source said.
func TestNoCollateralIsRefused(t *testing.T) {
	for i, name := range docNames {
		s := newScene(t)
		docs := documents(s.ev.Collateral)
		docs[i] = endorsement.Document{}
		s.ev.Collateral = must[*attestv1.TDXCollateral](t)(collateralOf(docs))
		if _, err := s.verify(); !errors.Is(err, ErrEndorsementMissing) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
	s := newScene(t)
	s.ev.Collateral = nil
	s.refused(ErrEndorsementMissing)
	for _, said := range []error{endorsement.ErrUnavailable, endorsement.ErrNotFound} {
		s.source = nobody{fmt.Errorf("%w: status 429", said)}
		s.refused(ErrEndorsementMissing)
		s.refused(said)
	}
}

func TestRequestsNameIntelsDocuments(t *testing.T) {
	s := newScene(t, func(p *intel.Platform, _ *intel.Fields) { p.CA = "processor" })
	got := must[[]endorsement.Request](t)(EndorsementRequests(s.ev.Quote))
	want := []endorsement.Request{
		{Name: "tdx-tcb-50806f000000", URL: "https://api.trustedservices.intel.com/tdx/certification/v4/tcb?fmspc=50806f000000", ChainHeader: "Tcb-Info-Issuer-Chain"},
		{Name: "tdx-qe", URL: "https://api.trustedservices.intel.com/tdx/certification/v4/qe/identity", ChainHeader: "Sgx-Enclave-Identity-Issuer-Chain"},
		{Name: "tdx-pckcrl-processor", URL: "https://api.trustedservices.intel.com/sgx/certification/v4/pckcrl?ca=processor&encoding=der", ChainHeader: "Sgx-Pck-Crl-Issuer-Chain"},
		{Name: "tdx-rootcrl", URL: "https://certificates.trustedservices.intel.com/IntelSGXRootCA.der"},
	}
	docs := documents(s.ev.Collateral)
	for i, r := range got {
		if r.Name != want[i].Name || r.URL != want[i].URL || r.ChainHeader != want[i].ChainHeader {
			t.Errorf("%+v", r)
		}
		if !r.Fresh(docs[i], s.now) || r.Fresh(docs[i], s.now.AddDate(0, 2, 0)) || r.Fresh(endorsement.Document{}, s.now) {
			t.Errorf("%s: fresh is not what the dates say", r.Name)
		}
	}
	if _, err := collateralOf(docs[1:]); !errors.Is(err, ErrEndorsementMissing) {
		t.Error(err)
	}
}

// TestAChainToAnotherRootIsRefused: attack 22. The root that comes along counts
// for nothing.
func TestAChainToAnotherRootIsRefused(t *testing.T) {
	s := newScene(t)
	s.trust.Roots = []Root{Intel()}
	s.refused(ErrUntrusted)
	s = newScene(t)
	ext := s.m.PCK.Certificate.Extensions[len(s.m.PCK.Certificate.Extensions)-1]
	leaf := must[intel.Authority](t)(s.w.Issue(pckName, &s.w.Signing, false, ext))
	for name, chain := range map[string][]*x509.Certificate{
		"issued by who signs TCB info": {leaf.Certificate, s.w.Signing.Certificate, s.w.Root.Certificate},
		"of the other CA":              {s.m.PCK.Certificate, s.w.Processor.Certificate, s.w.Root.Certificate},
		"issued by the root itself":    {must[intel.Authority](t)(s.w.Issue(pckName, &s.w.Root, false, ext)).Certificate, s.w.Platform.Certificate, s.w.Root.Certificate},
		"a leaf that may issue":        {must[intel.Authority](t)(s.w.Issue(pckName, &s.w.Platform, true, ext)).Certificate, s.w.Platform.Certificate, s.w.Root.Certificate},
		"a CA as a leaf":               {s.w.Processor.Certificate, s.w.Platform.Certificate, s.w.Root.Certificate},
	} {
		t.Run(name, func(t *testing.T) {
			p, err := parsePCK(intel.PEM(chain...))
			if err == nil {
				err = p.verify(s.w.Root.Certificate, s.now)
			}
			if !errors.Is(err, ErrUntrusted) || !errors.Is(err, attestation.ErrRefused) {
				t.Error(err)
			}
		})
	}
}
