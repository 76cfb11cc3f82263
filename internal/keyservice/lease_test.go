package keyservice

import (
	"os"
	"strings"
	"testing"

	keyservicev1 "github.com/keyagent/keyagent/api/keyagent/keyservice/v1"
	"github.com/keyagent/keyagent/internal/failure"
)

func (w *world) grant(more string) {
	w.t.Helper()
	ops := "[open, format]"
	if strings.Contains(more, "readers") {
		ops = "[open]"
	}
	w.writers = more
	w.writePolicy(w.pcr(4), `["data-*"]`, ops)
	if err := w.server.Reload(); err != nil {
		w.t.Fatal(err)
	}
}

func renew(t *testing.T, m keyservicev1.KeyServiceClient, id []byte) (*keyservicev1.Lease, error) {
	t.Helper()
	resp, err := m.RenewLease(t.Context(), &keyservicev1.RenewLeaseRequest{VolumeId: "data-1", LeaseId: id, Node: "node-1"})
	return resp.GetLease(), failure.FromStatus(err)
}

func release(t *testing.T, m keyservicev1.KeyServiceClient, id []byte) error {
	t.Helper()
	_, err := m.ReleaseLease(t.Context(), &keyservicev1.ReleaseLeaseRequest{VolumeId: "data-1", LeaseId: id})
	return failure.FromStatus(err)
}

// Case 48: a volume has one writer, until it gives the volume back.
func TestAnActiveVolumeHasOneWriter(t *testing.T) {
	w := newWorld(t)
	first, second := w.machine(), w.another()
	_, lease := w.provision(first, "data-1")
	_, _, err := w.get(second, "data-1", openOp)
	wantClass(t, err, failure.Held)
	if !strings.Contains(err.Error(), "is written by node-1 until it gives the volume back") || !strings.Contains(failure.Of(err).Hint, "takeover") {
		t.Errorf("%q, hint %q", err, failure.Of(err).Hint)
	}
	for range 3 {
		if l, err := renew(t, first, lease.GetId()); err != nil || string(l.GetId()) != string(lease.GetId()) || l.GetTermMs() != 120_000 {
			t.Fatalf("%v, %v", l, err)
		}
	}
	log, err := os.ReadFile(w.cfg.Audit)
	if err != nil || strings.Contains(string(log), "renew-lease") {
		t.Errorf("a renewal that changes nothing is in the audit log, %v", err)
	}
	_, err = renew(t, second, bytesOf(1, 16))
	wantClass(t, err, failure.Held)
	wantClass(t, release(t, second, bytesOf(1, 16)), failure.Held)
	// A reboot of the same machine does not wait, and ends what came before it.
	again, _, err := w.get(w.machine(), "data-1", openOp)
	if err != nil || string(again.GetLease().GetId()) == string(lease.GetId()) {
		t.Fatalf("%v, %v", again, err)
	}
	_, err = renew(t, first, lease.GetId())
	wantClass(t, err, failure.Held)
	if err := release(t, first, again.GetLease().GetId()); err != nil {
		t.Fatal(err)
	}
	if _, _, err := w.get(second, "data-1", openOp); err != nil {
		t.Errorf("after it was given back: %v", err)
	}
	log, err = os.ReadFile(w.cfg.Audit)
	if err != nil || !strings.Contains(string(log), `"event":"renew-lease"`) || !strings.Contains(string(log), `"event":"release-lease"`) {
		t.Errorf("refused renewals and returns are not in the audit log, %v", err)
	}
}

// Case 48: what the grant says of writers counts, on channels that are open too.
func TestTheGrantSaysWhoWrites(t *testing.T) {
	w := newWorld(t)
	first, second := w.machine(), w.another()
	get := func(m keyservicev1.KeyServiceClient, readOnly bool) (*keyservicev1.GetKeyResponse, error) {
		resp, err := m.GetKey(t.Context(), &keyservicev1.GetKeyRequest{VolumeId: "data-1", Operation: openOp, Protocol: 2, ReadOnly: readOnly})
		return resp, failure.FromStatus(err)
	}
	_, lease := w.provision(first, "data-1")
	if lease.GetBound() {
		t.Error("a machine that is known is bound without the grant's word")
	}
	w.grant(", takeover: expiry, lease: 30s")
	// The answer may be lost, so that nobody is bound by a renewal.
	if l, err := renew(t, first, lease.GetId()); err != nil || l.GetBound() || l.GetTermMs() != 30_000 {
		t.Errorf("after the grant changed: %v, %v", l, err)
	}
	w.grant(", writers: readers")
	_, err := get(second, true)
	wantClass(t, err, failure.Held)
	_, err = get(second, false)
	wantClass(t, err, failure.PolicyDenied)
	w.grant("")
	if err := release(t, first, lease.GetId()); err != nil {
		t.Fatal(err)
	}
	w.grant(", writers: readers")
	for _, m := range []keyservicev1.KeyServiceClient{first, second} {
		if resp, err := get(m, true); err != nil || resp.GetWriters() != keyservicev1.Writers_WRITERS_NONE || resp.GetLease() != nil {
			t.Errorf("readers: %v, %v", resp, err)
		}
	}
	w.grant(", writers: many")
	for _, m := range []keyservicev1.KeyServiceClient{first, second} {
		if resp, err := get(m, false); err != nil || resp.GetWriters() != keyservicev1.Writers_WRITERS_MANY || resp.GetLease() != nil {
			t.Errorf("many: %v, %v", resp, err)
		}
	}
}

// The key for a clone comes beside the holder of the source, and takes nothing of it.
func TestAKeyForACloneTakesNoLease(t *testing.T) {
	const cloneOp = keyservicev1.Operation_OPERATION_CLONE
	w := newWorld(t)
	first, second := w.machine(), w.another()
	if _, err := w.creates(first, "node-1", "data-2"); err != nil {
		t.Fatal(err)
	}
	w.provision(first, "data-1")
	_, _, err := w.get(second, "data-1", cloneOp)
	wantClass(t, err, failure.PolicyDenied)

	w.writePolicy(w.pcr(4), `["data-*"]`, "[open, format, clone]")
	if err := w.server.Reload(); err != nil {
		t.Fatal(err)
	}
	want, _, err := w.get(first, "data-1", openOp)
	if err != nil {
		t.Fatal(err)
	}
	lease := want.GetLease()
	got, _, err := w.get(second, "data-1", cloneOp)
	if err != nil {
		t.Fatal(err)
	}
	if got.GetLease() != nil || got.GetLuksUuid() != want.GetLuksUuid() || string(got.GetHeaderMac()) != string(want.GetHeaderMac()) {
		t.Errorf("got %v, want the volume %v without its lease", got, want)
	}
	if _, err := renew(t, first, lease.GetId()); err != nil {
		t.Errorf("the holder lost its lease: %v", err)
	}
	for volume, class := range map[string]failure.Class{"data-2": failure.State, "data-3": failure.NotFound} {
		_, _, err := w.get(second, volume, cloneOp)
		wantClass(t, err, class)
	}
	log, err := os.ReadFile(w.cfg.Audit)
	if err != nil || !strings.Contains(string(log), `"operation":"clone"`) {
		t.Errorf("the audit log says nothing of it, %v", err)
	}
}
