package tdx

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"os"
	"reflect"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/endorsement"
	"github.com/keyagent/keyagent/test/sim/intel"
)

// refusedOr fails unless err is a refusal: hostile bytes are never a fault of
// the verifier's own side.
func refusedOr(t *testing.T, err error) {
	t.Helper()
	if err != nil && !errors.Is(err, attestation.ErrRefused) {
		t.Fatalf("a nameless error: %v", err)
	}
}

var update = flag.Bool("update", false, "make testdata anew, with a new synthetic Intel")

// saved is evidence of a synthetic machine that does not change from run to run,
// so that a fuzzer's inputs mean the same to each of its workers: of version 4 or 5.
func saved(t testing.TB, version uint16) *scene {
	t.Helper()
	path := fmt.Sprintf("testdata/evidence-v%d.bin", version)
	root := must[*x509.Certificate](t)(x509.ParseCertificate(must[[]byte](t)(os.ReadFile("testdata/root.der"))))
	s := &scene{t: t, ev: &attestv1.TDXEvidence{}, now: root.NotBefore.Add(2 * time.Hour), trust: Trust{Roots: []Root{{"lab", root}}}}
	if err := proto.Unmarshal(must[[]byte](t)(os.ReadFile(path)), s.ev); err != nil {
		t.Fatal(err)
	}
	return s
}

func TestSavedEvidenceVerifies(t *testing.T) {
	if *update {
		for _, shape := range shapes {
			s := newScene(t, shape.change)
			path := fmt.Sprintf("testdata/evidence-v%d.bin", s.fields.Version)
			for path, data := range map[string][]byte{path: must[[]byte](t)(proto.Marshal(s.ev)), "testdata/root.der": s.w.Root.Certificate.Raw} {
				if err := os.WriteFile(path, data, 0o644); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	for _, version := range []uint16{4, 5} {
		if c := saved(t, version).accepted(); c.Facts["quote_version"] != uint64(version) {
			t.Errorf("%v", c.Facts)
		}
	}
}

// FuzzParse: what parses has all its parts, and says the same with NULs behind it.
func FuzzParse(f *testing.F) {
	f.Add(saved(f, 4).ev.Quote)
	f.Add(saved(f, 5).ev.Quote)
	f.Add(realQuote(f))
	f.Fuzz(func(t *testing.T, data []byte) {
		q, err := Parse(data)
		refusedOr(t, err)
		if err != nil {
			return
		}
		claims := q.Claims()
		if len(claims.Measurements) != 5 || len(q.signed) < headerSize+body10Size || len(q.qe.reportData) != 64 || !bytes.HasPrefix(data, q.signed) {
			t.Fatalf("%+v", q)
		}
		if len(data) < maxQuote {
			again, err := Parse(append(bytes.Clone(data), 0))
			if err != nil || !reflect.DeepEqual(again.Claims(), claims) {
				t.Fatal(err)
			}
		}
		_, err = parsePCK(q.chain)
		refusedOr(t, err)
	})
}

// FuzzCollateral: of each document only the genuine content is ever accepted.
func FuzzCollateral(f *testing.F) {
	s := saved(f, 4)
	root := s.trust.Roots[0].Certificate
	c := s.ev.Collateral
	f.Add(c.TcbInfo, c.TcbInfoChain, c.QeIdentity, c.QeIdentityChain, c.PckCrl, c.RootCrl)
	p := must[*pck](f)(parsePCK(must[*Quote](f)(Parse(s.ev.Quote)).chain))
	want := must[*endorsed](f)(verifyCollateral(&endorsement.Memory{}, root, p, documents(c), s.now))
	f.Fuzz(func(t *testing.T, tcb, tcbChain, qe, qeChain, pckCRL, rootCRL []byte) {
		docs := []endorsement.Document{{Body: tcb, Chain: tcbChain}, {Body: qe, Chain: qeChain}, {Body: pckCRL}, {Body: rootCRL}}
		for i, r := range p.requests(nil) {
			r.Fresh(docs[i], s.now)
		}
		e, err := verifyCollateral(&endorsement.Memory{}, root, p, docs, s.now)
		refusedOr(t, err)
		if err == nil && (!reflect.DeepEqual(e.tcb, want.tcb) || !reflect.DeepEqual(e.qe, want.qe)) {
			t.Fatalf("other content is accepted: %+v", e)
		}
		// Each document by itself, so that one that was changed does not hide the others.
		for i := range docs {
			one := documents(c)
			one[i] = docs[i]
			e, err := verifyCollateral(&endorsement.Memory{}, root, p, one, s.now)
			refusedOr(t, err)
			if err == nil && (!reflect.DeepEqual(e.tcb, want.tcb) || !reflect.DeepEqual(e.qe, want.qe)) {
				t.Fatalf("other content is accepted: %+v", e)
			}
		}
	})
}

// FuzzEvidence: only the genuine values are ever accepted.
func FuzzEvidence(f *testing.F) {
	s := saved(f, 5)
	want := s.accepted()
	v := s.verifier()
	f.Add(must[[]byte](f)(proto.Marshal(s.ev)))
	without := proto.Clone(s.ev).(*attestv1.TDXEvidence)
	without.EventLog = nil
	f.Add(must[[]byte](f)(proto.Marshal(without)))
	f.Fuzz(func(t *testing.T, data []byte) {
		q, err := v.Begin(context.Background(), nil)
		if err != nil {
			t.Fatal(err)
		}
		all, err := q.Verify(context.Background(), data, testBinder)
		refusedOr(t, err)
		for _, c := range all {
			for name, m := range c.Measurements {
				if !bytes.Equal(m.Value, want.Measurements[name].Value) {
					t.Fatalf("%s is %x", name, m.Value)
				}
			}
			for name, fact := range c.Facts {
				if name != "event_log" && !reflect.DeepEqual(fact, want.Facts[name]) {
					t.Fatalf("%s is %v", name, fact)
				}
			}
		}
	})
}

// FuzzCCEL: events that come out always lead to the value, and cutting the padding
// never changes what a log says.
func FuzzCCEL(f *testing.F) {
	log, rtmr := intel.EventLog(intel.DefaultEvents())
	f.Add(log)
	f.Add(append(bytes.Clone(log), bytes.Repeat([]byte{0xff}, 100)...))
	f.Add(append(bytes.Clone(log), make([]byte, 100)...))
	f.Fuzz(func(t *testing.T, log []byte) {
		trimmed := trimEventLog(log)
		if !bytes.HasPrefix(log, trimmed) {
			t.Fatal("cutting changed the log")
		}
		parsed, err := parseCCEL(log)
		refusedOr(t, err)
		if err != nil {
			return
		}
		short, err := parseCCEL(trimmed)
		if err != nil {
			t.Fatalf("the log parses, and cut it does not: %v", err)
		}
		for i, value := range rtmr {
			events, err := parsed.explain(i, value[:])
			refusedOr(t, err)
			if again, err2 := short.explain(i, value[:]); (err == nil) != (err2 == nil) || len(again) != len(events) {
				t.Fatalf("rtmr%d: %v, cut: %v", i, err, err2)
			}
			if len(events) == 0 || err != nil {
				continue
			}
			if state, _, err := parsed.replay(i); err != nil || !bytes.Equal(state, value[:]) {
				t.Fatalf("rtmr%d: %x, %v", i, state, err)
			}
		}
	})
}
