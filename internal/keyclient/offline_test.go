package keyclient

import (
	"errors"
	"strings"
	"testing"
	"time"

	keyservicev1 "github.com/keyagent/keyagent/api/keyagent/keyservice/v1"
	"github.com/keyagent/keyagent/internal/failure"
)

// A key service that grants more than it was asked for, or nonsense, is not believed.
func TestAGrantIsNoMoreThanWasAskedFor(t *testing.T) {
	asked := OfflineLimits{For: time.Hour, Boots: 3}
	for name, change := range map[string]func(*keyservicev1.GetKeyRequest, *keyservicev1.GetKeyResponse){
		"":                       func(*keyservicev1.GetKeyRequest, *keyservicev1.GetKeyResponse) {},
		"more time":              func(_ *keyservicev1.GetKeyRequest, r *keyservicev1.GetKeyResponse) { r.Offline.Limits.ForMs++ },
		"more boots":             func(_ *keyservicev1.GetKeyRequest, r *keyservicev1.GetKeyResponse) { r.Offline.Limits.Boots++ },
		"no time":                func(_ *keyservicev1.GetKeyRequest, r *keyservicev1.GetKeyResponse) { r.Offline.Limits.ForMs = 0 },
		"no limits":              func(_ *keyservicev1.GetKeyRequest, r *keyservicev1.GetKeyResponse) { r.Offline.Limits = nil },
		"not asked for":          func(q *keyservicev1.GetKeyRequest, _ *keyservicev1.GetKeyResponse) { q.Offline = nil },
		"no lease":               func(_ *keyservicev1.GetKeyRequest, r *keyservicev1.GetKeyResponse) { r.Lease = nil },
		"a bound lease":          func(_ *keyservicev1.GetKeyRequest, r *keyservicev1.GetKeyResponse) { r.Lease.Bound = true },
		"an older protocol":      func(_ *keyservicev1.GetKeyRequest, r *keyservicev1.GetKeyResponse) { r.Protocol = 1 },
		"no registers":           func(_ *keyservicev1.GetKeyRequest, r *keyservicev1.GetKeyResponse) { r.Offline.Pcrs = nil },
		"a register twice":       func(_ *keyservicev1.GetKeyRequest, r *keyservicev1.GetKeyResponse) { r.Offline.Pcrs = []uint32{4, 4} },
		"registers out of order": func(_ *keyservicev1.GetKeyRequest, r *keyservicev1.GetKeyResponse) { r.Offline.Pcrs = []uint32{7, 4} },
		"a register that is not": func(_ *keyservicev1.GetKeyRequest, r *keyservicev1.GetKeyResponse) { r.Offline.Pcrs = []uint32{24} },
		"a digest of another size": func(_ *keyservicev1.GetKeyRequest, r *keyservicev1.GetKeyResponse) {
			r.Offline.PcrDigest = make([]byte, 48)
		},
	} {
		q := &keyservicev1.GetKeyRequest{Offline: asked.proto()}
		r := &keyservicev1.GetKeyResponse{Protocol: protocol, Lease: &keyservicev1.Lease{Id: make([]byte, 16), TermMs: 1},
			Offline: &keyservicev1.OfflineGrant{Limits: asked.proto(), Pcrs: []uint32{4, 7}, PcrDigest: make([]byte, 32)}}
		change(q, r)
		got, err := offlineOf(q, r)
		if (err == nil) != (name == "") || err == nil && got.OfflineLimits != asked {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
}

// What was opened without the key service is told until somebody heard it.
func TestAReportIsRepeatedUntilItIsHeard(t *testing.T) {
	var r reports
	want := OfflineReport{Boots: 2, Since: time.Hour}
	r.put("data", want)
	if m, _ := r.of("other"); m != nil {
		t.Error("it is of another volume")
	}
	for _, class := range []failure.Class{failure.Unreachable, failure.Internal, failure.PolicyDenied} {
		m, said := r.of("data")
		if m.GetBoots() != 2 || m.GetSinceMs() != 3_600_000 {
			t.Fatalf("%v", m)
		}
		said(failure.New(class, errors.New("no"), ""))
	}
	if m, _ := r.of("data"); m != nil {
		t.Error("it is said again")
	}
	r.put("data", want)
	_, said := r.of("data")
	r.put("data", OfflineReport{Boots: 3})
	said(nil)
	if m, _ := r.of("data"); m.GetBoots() != 3 {
		t.Error("what came meanwhile is lost")
	}
	if got := printable("a\nb\x1bé" + strings.Repeat("x", 1000)); len(got) > 256 || strings.ContainsAny(got, "\n\x1b") {
		t.Errorf("%q", got)
	}
}
