package keyservice

import (
	"os"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/peer"

	keyservicev1 "github.com/keyagent/keyagent/api/keyagent/keyservice/v1"
	"github.com/keyagent/keyagent/attestation/atls"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/proof"
	"github.com/keyagent/keyagent/internal/volume"
)

const (
	rotateOp = keyservicev1.Operation_OPERATION_ROTATE
	nextOp   = keyservicev1.Operation_OPERATION_NEXT

	begins = keyservicev1.RotationStep_ROTATION_STEP_BEGIN
	stands = keyservicev1.RotationStep_ROTATION_STEP_STANDS
	done   = keyservicev1.RotationStep_ROTATION_STEP_DONE
)

// next gets the key that a volume is to have.
func (w *world) next(m keyservicev1.KeyServiceClient, op keyservicev1.Operation, lease []byte, macs byte) (*node, error) {
	w.t.Helper()
	var p peer.Peer
	req := &keyservicev1.GetKeyRequest{VolumeId: "data-1", Operation: op, Protocol: keyservicev1.Protocol, LeaseId: lease}
	resp, err := m.GetKey(w.t.Context(), req, grpc.Peer(&p))
	if err != nil {
		return nil, failure.FromStatus(err)
	}
	dek, err := openedBy(w.t, &p, req, resp)
	if err != nil {
		return nil, err
	}
	w.t.Cleanup(func() { dek.Close() })
	ch, _ := atls.FromPeer(&p)
	binder := ch.Binder()
	return &node{w.t, m, "node-1", "data-1", resp, dek, binder[:], resp.GetLease().GetId(), bytesOf(macs, 32), [][]byte{bytesOf(macs+1, 32), bytesOf(macs+2, 32)}}, nil
}

func (n *node) stepping(step keyservicev1.RotationStep) *keyservicev1.RotateKeyRequest {
	steps := map[keyservicev1.RotationStep]string{begins: proof.RotateBegin, stands: proof.RotateStands, done: proof.RotateDone}
	return &keyservicev1.RotateKeyRequest{VolumeId: n.volume, LeaseId: n.attempt, Step: step, Generation: n.key.GetGeneration(),
		KeyVersion: n.key.GetKeyVersion(), HeaderMac: n.mac, CopyMacs: n.copies, Proof: n.proof(steps[step])}
}

func (n *node) rotate(step keyservicev1.RotationStep) error {
	_, err := n.m.RotateKey(n.t.Context(), n.stepping(step))
	return failure.FromStatus(err)
}

// granted lets the world's machines do these, and opens the volume.
func (w *world) granted(operations string) (m keyservicev1.KeyServiceClient, lease []byte) {
	w.t.Helper()
	w.writePolicy(w.pcr(4), `["data-*"]`, operations)
	if err := w.server.Reload(); err != nil {
		w.t.Fatal(err)
	}
	m = w.machine()
	_, l := w.provision(m, "data-1")
	return m, l.GetId()
}

func (w *world) renewed(m keyservicev1.KeyServiceClient, lease []byte) *keyservicev1.RenewLeaseResponse {
	w.t.Helper()
	resp, err := m.RenewLease(w.t.Context(), &keyservicev1.RenewLeaseRequest{VolumeId: "data-1", LeaseId: lease})
	if err != nil {
		w.t.Fatal(err)
	}
	return resp
}

func TestANodeChangesTheKeyOfItsVolume(t *testing.T) {
	w := newWorld(t)
	m, _ := w.granted("[open, format, rotate]")
	resp, old, err := w.get(m, "data-1", openOp)
	must(t, err)
	lease := resp.GetLease().GetId()
	_, err = w.next(m, nextOp, lease, 20)
	wantClass(t, err, failure.State) // it is not being changed
	n, err := w.next(m, rotateOp, lease, 20)
	must(t, err)
	if n.key.GetKeyVersion() != 2 || len(n.key.GetHeaderMac()) != 0 || string(n.attempt) != string(lease) {
		t.Fatalf("next key has version %d, header MAC %x, lease %x of %x", n.key.GetKeyVersion(), n.key.GetHeaderMac(), n.attempt, lease)
	}
	again, err := w.next(m, rotateOp, lease, 20)
	must(t, err)
	if !again.dek.Equal(n.dek) {
		t.Fatal("it is another one the second time")
	}
	// Until it is done the volume has the key that it had, and nothing is made of a copy.
	var text string
	resp, text, err = w.get(m, "data-1", openOp)
	must(t, err)
	if resp.GetKeyVersion() != 1 || text != old {
		t.Errorf("while its key is being changed the volume has version %d", resp.GetKeyVersion())
	}
	lease = resp.GetLease().GetId()
	n, err = w.next(m, nextOp, lease, 20)
	must(t, err)
	if !w.renewed(m, lease).GetRotate() {
		t.Error("a renewal does not say that there is something to finish")
	}

	wantClass(t, n.rotate(keyservicev1.RotationStep_ROTATION_STEP_STANDS), failure.State) // nobody said which
	must(t, n.rotate(begins))
	wantClass(t, n.rotate(done), failure.State) // it does not stand
	must(t, n.rotate(stands))
	other, err := w.next(m, nextOp, lease, 40)
	must(t, err)
	if string(other.key.GetHeaderMac()) != string(n.mac) || len(other.key.GetCopyMacs()) != 2 {
		t.Errorf("the next header is known by %x", other.key.GetHeaderMac())
	}
	wantClass(t, other.rotate(begins), failure.State)
	must(t, n.rotate(done))
	must(t, n.rotate(done))
	resp, text, err = w.get(m, "data-1", openOp)
	must(t, err)
	if resp.GetKeyVersion() != 2 || text == old || string(resp.GetHeaderMac()) != string(n.mac) {
		t.Errorf("afterwards the volume has version %d", resp.GetKeyVersion())
	}
	rec, err := w.server.service.volumes.Get(t.Context(), "data-1")
	must(t, err)
	if rec.State != volume.Active || len(rec.Keys) != 1 || w.renewed(m, resp.GetLease().GetId()).GetRotate() {
		t.Errorf("record is %+v", rec)
	}
	log, err := os.ReadFile(w.cfg.Audit)
	must(t, err)
	for _, want := range []string{`"operation":"open","`, `"event":"rotate-key"`, `"detail":"begin"`, `"detail":"stands"`, `"detail":"done"`} {
		if !strings.Contains(string(log), want) {
			t.Errorf("the audit log does not have %s", want)
		}
	}
}

func TestAStepOfARotationWithoutItsProofIsRefused(t *testing.T) {
	w := newWorld(t)
	m, lease := w.granted("[open, format, rotate]")
	n, err := w.next(m, rotateOp, lease, 20)
	must(t, err)
	later, err := w.next(w.machine(), nextOp, lease, 20)
	must(t, err)
	before, err := w.server.service.volumes.Get(t.Context(), "data-1")
	must(t, err)
	for name, tt := range map[string]struct {
		change func(*keyservicev1.RotateKeyRequest)
		want   failure.Class
	}{
		"no proof":              {func(r *keyservicev1.RotateKeyRequest) { r.Proof = nil }, failure.WrongKey},
		"of another step":       {func(r *keyservicev1.RotateKeyRequest) { r.Proof = n.proof(proof.RotateDone) }, failure.WrongKey},
		"of another header":     {func(r *keyservicev1.RotateKeyRequest) { r.HeaderMac = bytesOf(99, 32) }, failure.WrongKey},
		"of another connection": {func(r *keyservicev1.RotateKeyRequest) { r.Proof = later.proof(proof.RotateBegin) }, failure.WrongKey},
		"another version":       {func(r *keyservicev1.RotateKeyRequest) { r.KeyVersion = 1 }, failure.State},
		"another generation":    {func(r *keyservicev1.RotateKeyRequest) { r.Generation = 2 }, failure.State},
		"a MAC of zeros":        {func(r *keyservicev1.RotateKeyRequest) { r.HeaderMac = make([]byte, 32) }, failure.State},
		"one copy":              {func(r *keyservicev1.RotateKeyRequest) { r.CopyMacs = r.CopyMacs[:1] }, failure.State},
		"another lease":         {func(r *keyservicev1.RotateKeyRequest) { r.LeaseId = bytesOf(7, 16) }, failure.Held},
		"no lease":              {func(r *keyservicev1.RotateKeyRequest) { r.LeaseId = nil }, failure.Held},
		"no step":               {func(r *keyservicev1.RotateKeyRequest) { r.Step = 0 }, failure.Usage},
		"another volume":        {func(r *keyservicev1.RotateKeyRequest) { r.VolumeId = "data-2" }, failure.NotFound},
		"not of the grant":      {func(r *keyservicev1.RotateKeyRequest) { r.VolumeId = "logs-1" }, failure.PolicyDenied},
	} {
		req := n.stepping(begins)
		tt.change(req)
		_, err := m.RotateKey(t.Context(), req)
		if class := failure.Of(failure.FromStatus(err)).Class; class != tt.want {
			t.Errorf("%s: %v", name, err)
		}
	}
	// The present key proves nothing: who has it alone did not get the next one.
	present, err := w.next(m, openOp, n.attempt, 20)
	must(t, err)
	present.key.KeyVersion = 2
	wantClass(t, present.rotate(begins), failure.WrongKey)
	after, err := w.server.service.volumes.Get(t.Context(), "data-1")
	must(t, err)
	if after.Rotation.HeaderMAC != before.Rotation.HeaderMAC {
		t.Errorf("a refused step named a header: %+v", after.Rotation)
	}
}

// Without the operation in its grant a node changes a key by an operator's word alone, and
// finishes what is under way.
func TestAnOperatorHasAKeyChanged(t *testing.T) {
	w := newWorld(t)
	m, lease := w.granted("[open, format]")
	_, err := w.next(m, rotateOp, lease, 20)
	wantClass(t, err, failure.PolicyDenied)
	if w.renewed(m, lease).GetRotate() {
		t.Error("a renewal asks for what nobody wished")
	}
	s := w.server.service
	_, err = s.AskRotation(t.Context(), "uid:0", "data-2", 0)
	wantClass(t, err, failure.NotFound)
	_, err = s.AskRotation(t.Context(), "uid:0", "data-1", time.Second)
	wantClass(t, err, failure.State)
	i, err := s.AskRotation(t.Context(), "uid:0", "data-1", 24*time.Hour)
	must(t, err)
	if i.Rotate == nil || !w.renewed(m, lease).GetRotate() {
		t.Errorf("volume is %+v", i)
	}
	n, err := w.next(m, rotateOp, lease, 20)
	must(t, err)
	must(t, n.rotate(begins))
	must(t, n.rotate(stands))
	_, err = s.AbandonRotation(t.Context(), "uid:0", "data-1", false)
	wantClass(t, err, failure.State)
	must(t, n.rotate(done))
	if w.renewed(m, lease).GetRotate() {
		t.Error("a day has not passed")
	}
	i, err = s.AbandonRotation(t.Context(), "uid:0", "data-1", false)
	must(t, err)
	if i.Rotate != nil || i.KeyVersion != 2 {
		t.Errorf("volume is %+v", i)
	}
}

// What only one node can do is refused where several may write, to readers, to a node that
// does not hold the volume, and of a key that opens no disk.
func TestWhoDoesNotHoldAVolumeAloneDoesNotChangeItsKey(t *testing.T) {
	w := newWorld(t)
	m, lease := w.granted("[open, format, rotate]")
	_, err := w.next(w.another(), rotateOp, nil, 20)
	wantClass(t, err, failure.Held)
	n, err := w.next(m, rotateOp, lease, 20)
	must(t, err)
	must(t, n.rotate(begins))
	// An operator gives the volume to another node, which goes on with its own header.
	_, err = w.server.service.Takeover(t.Context(), "uid:0", "data-1")
	must(t, err)
	second, err := w.next(w.another(), nextOp, nil, 40)
	must(t, err)
	wantClass(t, n.rotate(stands), failure.Held)
	must(t, second.rotate(begins))
	must(t, second.rotate(stands))
	must(t, second.rotate(done))
	wantClass(t, n.rotate(done), failure.State)

	w.writers = ", writers: many"
	w.writePolicy(w.pcr(4), `["data-*"]`, "[open, format, rotate]")
	must(t, w.server.Reload())
	_, err = w.server.service.Takeover(t.Context(), "uid:0", "data-1")
	must(t, err)
	_, err = w.next(m, rotateOp, nil, 20)
	wantClass(t, err, failure.State)
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
