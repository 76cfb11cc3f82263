package keyservice

import (
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"

	keyservicev1 "github.com/keyagent/keyagent/api/keyagent/keyservice/v1"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/proof"
)

func (w *world) mustCreate(m keyservicev1.KeyServiceClient, name string) *node {
	w.t.Helper()
	n, err := w.creates(m, name, "data-1")
	if err != nil {
		w.t.Fatal(err)
	}
	return n
}

// Case 47: another machine is told who creates the volume and until when, and gets no
// key meanwhile.
func TestTheSecondNodeOfAFirstBootIsToldWhoIsFirst(t *testing.T) {
	w := newWorld(t)
	first, second := w.machine(), w.another()
	early := w.mustCreate(second, "node-2") // it has the key from before
	n := w.mustCreate(first, "node-1")
	if err := n.begin(); err != nil {
		t.Fatal(err)
	}
	err := early.begin()
	wantClass(t, err, failure.Held)
	if !strings.Contains(err.Error(), `volume "data-1" is being created by node-1 until 20`) || strings.Contains(err.Error(), "tpm:") {
		t.Errorf("it is told %q", err)
	}
	_, err = w.creates(second, "node-2", "data-1")
	wantClass(t, err, failure.Held)
	if _, err := n.stands(); err != nil {
		t.Fatal(err)
	}
	_, err = early.stands()
	wantClass(t, err, failure.State)
	wantClass(t, early.confirm(), failure.State)
	_, err = w.creates(second, "node-2", "data-1")
	wantClass(t, err, failure.Held)
	if err := n.confirm(); err != nil {
		t.Fatal(err)
	}
	_, _, err = w.get(second, "data-1", openOp)
	wantClass(t, err, failure.Held)
	log, err := os.ReadFile(w.cfg.Audit)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"event":"begin-format"`, `"event":"header-stands"`, `"event":"confirm-volume"`, `"lease":"`, `"attempt":"` + hexed(n.attempt), `"holder":"node-1 tpm:`, `"class":"volume held"`} {
		if !strings.Contains(string(log), want) {
			t.Errorf("the audit log does not have %s", want)
		}
	}
}

// Case 47: eight nodes at once, one of which writes.
func TestOfEightNodesThatBeginAtOnceOneWrites(t *testing.T) {
	w := newWorld(t)
	var nodes []*node
	for i := range 8 {
		nodes = append(nodes, w.mustCreate(w.another(), fmt.Sprint("node-", i)))
	}
	var mu sync.Mutex
	var writes []string
	var wg sync.WaitGroup
	for _, n := range nodes {
		wg.Go(func() {
			if err := n.begin(); err != nil {
				// One that comes when the writer is done already hears that instead.
				if class := failure.Of(err).Class; class != failure.Held && class != failure.State {
					t.Error(err)
				}
				return
			}
			mu.Lock()
			writes = append(writes, n.name)
			mu.Unlock()
			if _, err := n.stands(); err != nil {
				t.Error(err)
			}
			if err := n.confirm(); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if len(writes) != 1 {
		t.Fatalf("%q write", writes)
	}
}

// Case 47: who has no key of this volume, or has it from another connection, cannot
// say what its header is.
func TestAStepWithoutItsProofIsRefused(t *testing.T) {
	w := newWorld(t)
	m := w.machine()
	n := w.mustCreate(m, "node-1")
	elsewhere := w.mustCreate(w.machine(), "node-1")
	other, err := w.creates(m, "node-1", "data-2")
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*keyservicev1.BeginFormatRequest){
		"no proof":          func(r *keyservicev1.BeginFormatRequest) { r.Proof = nil },
		"zeros":             func(r *keyservicev1.BeginFormatRequest) { r.Proof = make([]byte, 32) },
		"of the other step": func(r *keyservicev1.BeginFormatRequest) { r.Proof = n.proof(proof.Stands) },
		"of another connection": func(r *keyservicev1.BeginFormatRequest) {
			n := *n
			n.binder = elsewhere.binder
			r.Proof = n.proof(proof.Begin)
		},
		"with another volume's":    func(r *keyservicev1.BeginFormatRequest) { n := *n; n.dek = other.dek; r.Proof = n.proof(proof.Begin) },
		"of another header":        func(r *keyservicev1.BeginFormatRequest) { r.HeaderMac = bytesOf(0x77, 32) },
		"of another copy":          func(r *keyservicev1.BeginFormatRequest) { r.CopyMacs = [][]byte{n.copies[1], n.copies[0]} },
		"of another attempt":       func(r *keyservicev1.BeginFormatRequest) { r.Attempt = bytesOf(0x77, 16) },
		"a proof with a byte more": func(r *keyservicev1.BeginFormatRequest) { r.Proof = append(r.Proof, 0) },
	} {
		req := n.beginning()
		change(req)
		_, err := m.BeginFormat(t.Context(), req)
		if failure.Of(failure.FromStatus(err)).Class != failure.WrongKey {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, change := range map[string]func(*keyservicev1.BeginFormatRequest){
		"a MAC of zeros":  func(r *keyservicev1.BeginFormatRequest) { r.HeaderMac = make([]byte, 32) },
		"copies of zeros": func(r *keyservicev1.BeginFormatRequest) { r.CopyMacs = [][]byte{make([]byte, 32), n.copies[0]} },
		"no copies":       func(r *keyservicev1.BeginFormatRequest) { r.CopyMacs = nil },
		"no attempt":      func(r *keyservicev1.BeginFormatRequest) { r.Attempt = nil },
		"a generation":    func(r *keyservicev1.BeginFormatRequest) { r.Generation++ },
	} {
		req := n.beginning()
		change(req)
		_, err := m.BeginFormat(t.Context(), req)
		if failure.Of(failure.FromStatus(err)).Class != failure.State {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := n.begin(); err != nil {
		t.Fatal(err)
	}
	_, err = m.HeaderStands(t.Context(), &keyservicev1.HeaderStandsRequest{VolumeId: "data-1", Attempt: n.attempt, Proof: n.proof(proof.Begin)})
	wantClass(t, failure.FromStatus(err), failure.WrongKey)
	_, err = elsewhere.m.HeaderStands(t.Context(), &keyservicev1.HeaderStandsRequest{VolumeId: "data-1", Attempt: n.attempt, Proof: n.proof(proof.Stands)})
	wantClass(t, failure.FromStatus(err), failure.State)
	wantClass(t, n.confirm(), failure.State) // nobody said that it stands
}

// Case 47: a confirmation out of nowhere, as an older node or somebody else sends it.
func TestAVolumeIsNotConfirmedWithoutAnAttempt(t *testing.T) {
	w := newWorld(t)
	m := w.machine()
	n := w.mustCreate(m, "node-1")
	for _, mac := range [][]byte{testMAC, make([]byte, 32), nil} {
		req := n.confirming()
		req.HeaderMac, req.Attempt = mac, nil
		_, err := m.ConfirmVolume(t.Context(), req)
		wantClass(t, failure.FromStatus(err), failure.State)
	}
}

// Case 47: a node that knows no attempts creates no volume, and opens those that are.
func TestAnOldNodeOpensVolumesAndCreatesNone(t *testing.T) {
	w := newWorld(t)
	m := w.machine()
	old := func(op keyservicev1.Operation) (*keyservicev1.GetKeyResponse, error) {
		resp, err := m.GetKey(t.Context(), &keyservicev1.GetKeyRequest{VolumeId: "data-1", Operation: op})
		return resp, failure.FromStatus(err)
	}
	for range 2 {
		_, err := old(formatOp)
		wantClass(t, err, failure.State)
		if f := failure.Of(err); !strings.Contains(f.Hint, "upgrade this node") {
			t.Errorf("hint %q", f.Hint)
		}
		_, _, err = w.get(m, "data-1", formatOp) // there is a record, pending
		if err != nil {
			t.Fatal(err)
		}
	}
	w.provision(m, "data-1")
	for _, op := range []keyservicev1.Operation{openOp, formatOp} {
		resp, err := old(op)
		if err != nil || resp.GetProtocol() != 0 || resp.GetLease() != nil || len(resp.GetCopyMacs()) != 0 || len(resp.GetHeaderMac()) != 32 {
			t.Errorf("%v: %v, %v", op, resp, err)
		}
	}
	// Its lease is in the record all the same.
	_, _, err := w.get(w.another(), "data-1", openOp)
	wantClass(t, err, failure.Held)
}

// A volume whose node crashed between its header and its file system is finished by
// the same machine, with the attempt of the answer.
func TestAFormattedVolumeIsFinishedByItsHolder(t *testing.T) {
	w := newWorld(t)
	m := w.machine()
	n := w.mustCreate(m, "node-1")
	if err := n.begin(); err != nil {
		t.Fatal(err)
	}
	if _, err := n.stands(); err != nil {
		t.Fatal(err)
	}
	_, _, err := w.get(m, "data-1", openOp)
	wantClass(t, err, failure.State)
	resp, _, err := w.get(w.machine(), "data-1", formatOp)
	if err != nil || resp.GetState() != keyservicev1.VolumeState_VOLUME_STATE_FORMATTED || len(resp.GetAttempt()) != 16 ||
		resp.GetLease() == nil || string(resp.GetHeaderMac()) != string(n.mac) {
		t.Fatalf("%v, %v", resp, err)
	}
	wantClass(t, n.confirm(), failure.State) // the one before the crash
	n.attempt = resp.GetAttempt()
	if err := n.confirm(); err != nil {
		t.Fatal(err)
	}
}
