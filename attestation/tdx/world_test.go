package tdx

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/endorsement"
	"github.com/keyagent/keyagent/test/sim/intel"
)

func must[T any](t testing.TB) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// theWorld is shared by all tests; a test that changes a machine makes its own.
var theWorld = sync.OnceValues(func() (*intel.World, error) {
	return intel.New(time.Date(2026, 6, 1, 12, 0, 0, 0, time.UTC))
})

var testBinder = attestation.Binder{1, 2, 3}

// scene is one machine, its evidence over testBinder, and who judges it.
type scene struct {
	t      testing.TB
	w      *intel.World
	m      *intel.Machine
	fields intel.Fields
	ev     *attestv1.TDXEvidence
	now    time.Time
	source endorsement.Source
	trust  Trust
}

// newScene makes genuine evidence of a platform that is up to date.
func newScene(t testing.TB, change ...func(p *intel.Platform, f *intel.Fields)) *scene {
	t.Helper()
	w := must[*intel.World](t)(theWorld())
	p, f := intel.DefaultPlatform(), intel.DefaultFields()
	f.Report = testBinder
	log, rtmr := intel.EventLog(intel.DefaultEvents())
	f.RTMR = rtmr
	for _, c := range change {
		c(&p, &f)
	}
	s := &scene{t: t, w: w, fields: f, now: w.Now.Add(time.Hour), trust: Trust{Roots: []Root{{"lab", w.Root.Certificate}}}}
	s.m = must[*intel.Machine](t)(w.Machine(p))
	s.ev = &attestv1.TDXEvidence{Collateral: s.m.Collateral(), EventLog: log}
	s.quote()
	return s
}

// quote makes the quote anew, after the machine or the fields were changed.
func (s *scene) quote() { s.ev.Quote = must[[]byte](s.t)(s.m.Quote(s.fields)) }

func (s *scene) verifier() *Verifier {
	return must[*Verifier](s.t)(NewVerifier(VerifierOptions{
		Trust: func() Trust { return s.trust }, Endorsements: s.source, Now: func() time.Time { return s.now },
	}))
}

func (s *scene) tcbInfo(change func(intel.Object)) {
	d := s.w.TCBInfo(s.m.Platform.FMSPC, change)
	s.ev.Collateral.TcbInfo, s.ev.Collateral.TcbInfoChain = d.Body, d.Chain
}

func (s *scene) qeIdentity(change func(intel.Object)) {
	d := s.w.QEIdentity(change)
	s.ev.Collateral.QeIdentity, s.ev.Collateral.QeIdentityChain = d.Body, d.Chain
}

// signedBy has TCB info signed by another certificate of the root's, which was
// issued years from now.
func (s *scene) signedBy(name string, ca bool, years int) {
	then := *s.w
	then.Now = then.Now.AddDate(years, 0, 0)
	w := *s.w
	w.Signing = must[intel.Authority](s.t)(then.Issue(name, &w.Root, ca))
	d := w.TCBInfo(s.m.Platform.FMSPC, nil)
	s.ev.Collateral.TcbInfo, s.ev.Collateral.TcbInfoChain = d.Body, d.Chain
}

// verify runs one whole exchange.
func (s *scene) verify() (attestation.Claims, error) { return verifyWith(s.verifier(), s.ev) }

func verifyWith(v *Verifier, ev *attestv1.TDXEvidence) (attestation.Claims, error) {
	data, err := proto.Marshal(ev)
	if err != nil {
		return attestation.Claims{}, err
	}
	q, err := v.Begin(context.Background(), nil)
	if err != nil {
		return attestation.Claims{}, err
	}
	all, err := q.Verify(context.Background(), data, testBinder)
	if err != nil {
		return attestation.Claims{}, err
	}
	return all[0], nil
}

// refused demands this very refusal.
func (s *scene) refused(want error) {
	s.t.Helper()
	if _, err := s.verify(); !errors.Is(err, want) || !errors.Is(err, attestation.ErrRefused) {
		s.t.Errorf("%v, want: %v", err, want)
	}
}

func (s *scene) accepted() attestation.Claims {
	s.t.Helper()
	c, err := s.verify()
	if err != nil {
		s.t.Fatal(err)
	}
	return c
}
