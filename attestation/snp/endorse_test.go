package snp_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/endorsement"
	"github.com/keyagent/keyagent/attestation/snp"
	"github.com/keyagent/keyagent/test/sim/amd"
)

func TestCarriedEndorsementsCostNoRequest(t *testing.T) {
	chip := newChip(t, "Milan")
	kds := amd.NewKDS(chip)
	v := lab(t, chip.Authority, asking(serve(t, kds)))
	ev := must[*evidence](t)(chip.Evidence(amd.Report{Data: testBinder}))
	for i := range 1000 {
		ev.Report = must[[]byte](t)(chip.Sign(amd.Report{Data: testBinder, ReportID: [32]byte{byte(i), byte(i >> 8), 1}}))
		if _, err := verify(t.Context(), v, ev); err != nil || v.Known() != 1 {
			t.Fatalf("%v, %d chains are known", err, v.Known())
		}
	}
	if n := len(kds.Asked()); n != 0 {
		t.Errorf("%d requests", n)
	}
}

func TestWhatIsNotCarriedIsAskedForOnce(t *testing.T) {
	for _, product := range []string{"Milan", "Genoa", "Turin"} {
		chip := newChip(t, product)
		kds := amd.NewKDS(chip)
		v := lab(t, chip.Authority, asking(serve(t, kds)))
		bare := clone(must[*evidence](t)(chip.Evidence(amd.Report{Data: testBinder})), func(e *evidence) { e.Certificate, e.Crl = nil, nil })
		var wg sync.WaitGroup
		for range 100 {
			wg.Go(func() {
				if _, err := verify(t.Context(), v, bare); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if asked := kds.Asked(); len(asked) != 2 || asked["/vcek/v1/"+product+"/crl"] != 1 {
			t.Error(asked)
		} else {
			for path, n := range asked {
				if n != 1 {
					t.Errorf("%d requests for %s", n, path)
				}
			}
		}
	}
}

// silent is a vendor that never answers, without a network.
type silent struct{ asked int }

func (s *silent) Get(ctx context.Context, r endorsement.Request) (endorsement.Document, error) {
	s.asked++
	<-ctx.Done()
	return endorsement.Document{}, fmt.Errorf("%s: %w: %w", r.Name, endorsement.ErrUnavailable, ctx.Err())
}

func TestASilentVendorHoldsNobodyUpForLong(t *testing.T) {
	chip := newChip(t, "Milan")
	bare := clone(must[*evidence](t)(chip.Evidence(amd.Report{Data: testBinder})), func(e *evidence) { e.Certificate, e.Crl = nil, nil })
	synctest.Test(t, func(t *testing.T) {
		vendor := &silent{}
		cache := must[*endorsement.Cache](t)(endorsement.NewCache(endorsement.CacheOptions{Source: vendor}))
		defer cache.Close()
		v := lab(t, chip.Authority, asking(cache), at(time.Now().Add(27*365*24*time.Hour)))
		start := time.Now()
		var wg sync.WaitGroup
		for range 1000 {
			wg.Go(func() {
				_, err := verify(t.Context(), v, bare)
				refused(t, err, snp.ErrEndorsementMissing)
				if !errors.Is(err, endorsement.ErrUnavailable) {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if took := time.Since(start); took > 20*time.Second || vendor.asked != 1 {
			t.Errorf("%s, %d requests", took, vendor.asked)
		}
	})
}

func TestAVendorsFaultIsANamedRefusal(t *testing.T) {
	chip := newChip(t, "Milan")
	good := must[*evidence](t)(chip.Evidence(amd.Report{Data: testBinder}))
	other := newChip(t, "Milan")
	forger := must[*amd.Authority](t)(amd.New(amd.Options{Forged: true}))
	begin := chip.ARK.NotBefore
	answer := func(body []byte) func(http.ResponseWriter, *http.Request) bool {
		return func(w http.ResponseWriter, _ *http.Request) bool { _, _ = w.Write(body); return true }
	}
	status := func(code int) func(http.ResponseWriter, *http.Request) bool {
		return func(w http.ResponseWriter, _ *http.Request) bool { w.WriteHeader(code); return true }
	}
	for name, tc := range map[string]struct {
		fault func(http.ResponseWriter, *http.Request) bool
		want  error
	}{
		"429":                          {status(429), endorsement.ErrUnavailable},
		"500":                          {status(500), endorsement.ErrUnavailable},
		"404":                          {status(404), endorsement.ErrNotFound},
		"garbage":                      {answer([]byte("garbage")), endorsement.ErrUnavailable},
		"another chip's certificate":   {answer(other.VCEK.Raw), endorsement.ErrUnavailable},
		"a list that ended":            {answer(must[[]byte](t)(chip.CRL(begin, begin.Add(time.Hour)))), endorsement.ErrUnavailable},
		"a list that AMD did not sign": {answer(must[[]byte](t)(forger.FreshCRL())), endorsement.ErrUnavailable},
		"more than a document ever is": {answer(make([]byte, endorsement.MaxDocument+1)), endorsement.ErrUnavailable},
		"a redirect to somebody else": {func(w http.ResponseWriter, r *http.Request) bool {
			http.Redirect(w, r, "https://example.com/", http.StatusFound)
			return true
		}, endorsement.ErrUnavailable},
		"an answer that breaks off early": {func(w http.ResponseWriter, _ *http.Request) bool { panic(http.ErrAbortHandler) }, endorsement.ErrUnavailable},
	} {
		kds := amd.NewKDS(chip)
		kds.Fault = tc.fault
		for part, bare := range map[string]*evidence{
			"certificate": clone(good, func(e *evidence) { e.Certificate = nil }),
			"list":        clone(good, func(e *evidence) { e.Crl = nil }),
		} {
			v := lab(t, chip.Authority, asking(serve(t, kds)))
			_, err := verify(t.Context(), v, bare)
			refused(t, err, snp.ErrEndorsementMissing)
			if !errors.Is(err, tc.want) {
				t.Errorf("%s, %s: %v", name, part, err)
			}
		}
	}
}

func TestAReportSaysWhatToFetchInAdvance(t *testing.T) {
	turin := newChip(t, "Turin")
	milan := newChip(t, "Milan")
	sign := func(c *amd.Chip, r amd.Report) []byte { return must[[]byte](t)(c.Sign(r)) }
	for name, tc := range map[string]struct {
		report  []byte
		product string
		names   []string
		err     error
	}{
		"version 3":           {sign(milan, amd.Report{}), "", []string{"snp-crl-Milan", fmt.Sprintf("snp-vcek-Milan-%x-db18000000000104", milan.ID)}, nil},
		"Turin":               {sign(turin, amd.Report{}), "Milan", []string{"snp-crl-Turin", fmt.Sprintf("snp-vcek-Turin-%x-db00000018010402", turin.ID[:8])}, nil},
		"version 2":           {sign(milan, amd.Report{Version: 2}), "Genoa", []string{"snp-crl-Genoa", fmt.Sprintf("snp-vcek-Genoa-%x-db18000000000104", milan.ID)}, nil},
		"version 2, no line":  {sign(milan, amd.Report{Version: 2}), "", nil, snp.ErrProduct},
		"version 2, odd line": {sign(milan, amd.Report{Version: 2}), "Rome", nil, snp.ErrProduct},
		"a provider's key":    {sign(milan, amd.Report{VLEK: true}), "", []string{"snp-crl-vlek-Milan"}, nil},
		"masked":              {sign(milan, amd.Report{Edit: func(b []byte) { clear(b[0x1A0:0x1E0]) }}), "", nil, snp.ErrChip},
		"nothing":             {nil, "", nil, snp.ErrMalformed},
	} {
		requests, err := snp.EndorsementRequests(tc.report, tc.product)
		if !errors.Is(err, tc.err) || len(requests) != len(tc.names) {
			t.Errorf("%s: %v, %v", name, requests, err)
			continue
		}
		for i, r := range requests {
			if r.Name != tc.names[i] || !strings.HasPrefix(r.URL, snp.KDS+"/v") {
				t.Errorf("%s: %s at %s", name, r.Name, r.URL)
			}
		}
	}
	requests, err := snp.EndorsementRequests(sign(turin, amd.Report{}), "")
	if err != nil || requests[1].URL != fmt.Sprintf("https://kdsintf.amd.com/vcek/v1/Turin/%x?fmcSPL=02&blSPL=04&teeSPL=01&snpSPL=24&ucodeSPL=219", turin.ID[:8]) {
		t.Errorf("%v, %v", requests, err)
	}
}

func TestPrefetchedEndorsementsServeAnOutageOut(t *testing.T) {
	chip := newChip(t, "Genoa")
	kds := amd.NewKDS(chip)
	cache := serve(t, kds)
	ev := must[*evidence](t)(chip.Evidence(amd.Report{Data: testBinder}))
	requests, err := snp.EndorsementRequests(ev.GetReport(), "")
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range requests {
		if _, err := cache.Get(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	kds.Fault = func(w http.ResponseWriter, _ *http.Request) bool { w.WriteHeader(500); return true }
	bare := clone(ev, func(e *evidence) { e.Certificate, e.Crl = nil, nil })
	if _, err := verify(t.Context(), lab(t, chip.Authority, asking(cache)), bare); err != nil {
		t.Error(err)
	}
}

// A report of version 2 names no product line: its certificate does.
func TestAnOldReportMustCarryItsCertificate(t *testing.T) {
	chip := newChip(t, "Milan")
	v := lab(t, chip.Authority, asking(serve(t, amd.NewKDS(chip))))
	ev := must[*evidence](t)(chip.Evidence(amd.Report{Version: 2, Data: testBinder}))
	_, err := verify(t.Context(), v, clone(ev, func(e *evidence) { e.Certificate = nil }))
	refused(t, err, snp.ErrEndorsementMissing)
	if _, err = verify(t.Context(), v, clone(ev, func(e *evidence) { e.Crl = nil })); err != nil {
		t.Error(err)
	}
	_, err = verify(t.Context(), v, clone(must[*evidence](t)(chip.Evidence(amd.Report{VLEK: true, Data: testBinder})), func(e *evidence) { e.Certificate = nil }))
	refused(t, err, snp.ErrEndorsementMissing)
	var _ attestation.Verifier = v
}

// Evidence that was saved, or comes from a machine that has not asked for long,
// carries a list that has ended. Anyone who has the current one uses it.
func TestAListThatHasEndedIsAskedForAnew(t *testing.T) {
	chip := newChip(t, "Milan")
	kds := amd.NewKDS(chip)
	begin := chip.ARK.NotBefore
	old := clone(must[*evidence](t)(chip.Evidence(amd.Report{Data: testBinder})), func(e *evidence) {
		e.Crl = must[[]byte](t)(chip.CRL(begin, begin.Add(time.Hour)))
	})
	_, err := verify(t.Context(), lab(t, chip.Authority), old)
	refused(t, err, snp.ErrCRL)
	if _, err := verify(t.Context(), lab(t, chip.Authority, asking(serve(t, kds))), old); err != nil || len(kds.Asked()) != 1 {
		t.Errorf("%v, asked %v", err, kds.Asked())
	}
	kds.Fault = func(w http.ResponseWriter, _ *http.Request) bool { w.WriteHeader(500); return true }
	_, err = verify(t.Context(), lab(t, chip.Authority, asking(serve(t, kds))), old)
	refused(t, err, snp.ErrEndorsementMissing)
	if !strings.Contains(err.Error(), "has ended") {
		t.Error(err)
	}
}
