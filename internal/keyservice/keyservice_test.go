package keyservice

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/peer"

	keyservicev1 "github.com/keyagent/keyagent/api/keyagent/keyservice/v1"
	"github.com/keyagent/keyagent/attestation/atls"
	"github.com/keyagent/keyagent/attestation/policy"
	"github.com/keyagent/keyagent/internal/audit"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/macstore"
	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/internal/volume"
	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/kms/cluster"
	"github.com/keyagent/keyagent/storage"
	"github.com/keyagent/keyagent/storage/memfs"
)

func TestTheLifeOfAVolume(t *testing.T) {
	w := newWorld(t)
	m := w.machine()
	_, _, err := w.get(m, "data-1", openOp)
	wantClass(t, err, failure.NotFound)

	pending, dek, err := w.get(m, "data-1", formatOp)
	if err != nil || pending.GetState() != keyservicev1.VolumeState_VOLUME_STATE_PENDING || len(dek) != 64 {
		t.Fatalf("%v, %v", pending, err)
	}
	_, _, err = w.get(m, "data-1", openOp)
	wantClass(t, err, failure.State)

	n, lease := w.provision(m, "data-1")
	if len(lease.GetId()) != 16 || lease.GetTermMs() != 120_000 || lease.GetBound() {
		t.Errorf("%v", lease)
	}
	if err := n.confirm(); err != nil { // the answer to the first may be lost
		t.Fatal(err)
	}
	n.mac = bytesOf(8, 32)
	wantClass(t, n.confirm(), failure.State)

	for _, op := range []keyservicev1.Operation{openOp, formatOp} {
		active, again, err := w.get(m, "data-1", op)
		if err != nil || again != dek || !bytes.Equal(active.GetHeaderMac(), testMAC) || len(active.GetCopyMacs()) != 2 ||
			active.GetState() != keyservicev1.VolumeState_VOLUME_STATE_ACTIVE || active.GetLuksUuid() != pending.GetLuksUuid() {
			t.Fatalf("%v: %v, %v", op, active, err)
		}
	}
	w.restart()
	if _, again, err := w.get(w.machine(), "data-1", openOp); err != nil || again != dek {
		t.Fatalf("after a restart: %v", err)
	}
	_, second, err := w.get(w.machine(), "data-2", formatOp)
	if err != nil || second == dek {
		t.Fatalf("another volume has the same key, or %v", err)
	}
}

func TestEightConcurrentFirstRequestsGiveOneDEK(t *testing.T) {
	w := newWorld(t)
	var mu sync.Mutex
	deks, uuids := map[string]int{}, map[string]int{}
	var wg sync.WaitGroup
	for range 8 {
		m := w.machine()
		wg.Go(func() {
			resp, dek, err := w.get(m, "data-1", formatOp)
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			deks[dek]++
			uuids[resp.GetLuksUuid()]++
		})
	}
	wg.Wait()
	if len(deks) != 1 || len(uuids) != 1 {
		t.Fatalf("%d keys and %d UUIDs for one volume", len(deks), len(uuids))
	}
}

func TestWhatNoGrantAllowsIsDeniedAndAudited(t *testing.T) {
	w := newWorld(t)
	m := w.machine()
	for name, volume := range map[string]string{
		"another tenant's volume (case 31)": "other-1", "a path": "data-/../x", "dots": "data-..", "empty": "",
		"a newline": "data-1\n", "a look-alike": "dаta-1", "1 MiB": "data-" + strings.Repeat("a", 1<<19), "NUL": "data-\x00",
	} {
		t.Run(name, func(t *testing.T) {
			_, _, err := w.get(m, volume, formatOp)
			wantClass(t, err, failure.PolicyDenied)
			id := failure.Of(err).CorrelationID
			if id == "" || strings.Contains(err.Error(), "grant") {
				t.Errorf("the machine learns %q, id %q", err, id)
			}
			log, _ := os.ReadFile(w.cfg.Audit)
			if !strings.Contains(string(log), id) || !strings.Contains(w.logged.String(), id) {
				t.Errorf("correlation id %s stands not in both logs", id)
			}
		})
	}
	w.writePolicy(w.pcr(4), `["data-*"]`, "[open]")
	if err := w.server.Reload(); err != nil {
		t.Fatal(err)
	}
	_, _, err := w.get(m, "data-1", formatOp)
	wantClass(t, err, failure.PolicyDenied)
	_, _, err = w.get(m, "data-1", 99)
	wantClass(t, err, failure.Usage)
}

func TestAWithdrawnReferenceValueCountsOnChannelsThatAreOpen(t *testing.T) {
	w := newWorld(t)
	m := w.machine()
	if _, _, err := w.get(m, "data-1", formatOp); err != nil {
		t.Fatal(err)
	}
	w.writePolicy(strings.Repeat("ab", 32), `["data-*"]`, "[open, format]")
	if err := w.server.Reload(); err != nil {
		t.Fatal(err)
	}
	_, _, err := w.get(m, "data-1", formatOp)
	wantClass(t, err, failure.EvidenceRefused)
	if strings.Contains(err.Error(), "abab") {
		t.Errorf("the machine learns the expected value: %v", err)
	}
	if !strings.Contains(w.logged.String(), "pcr4: expected abab") {
		t.Error("the service's log does not explain the refusal")
	}
}

func TestABadPolicyDoesNotReplaceAGoodOne(t *testing.T) {
	w := newWorld(t)
	before := w.server.policy.Current().Hash()
	if err := os.WriteFile(w.cfg.Policy, []byte("version: 1\nunknown: 2\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := w.server.Reload(); err == nil || !strings.Contains(err.Error(), "line 2") {
		t.Fatalf("reload: %v", err)
	}
	if w.server.policy.Current().Hash() != before {
		t.Fatal("the policy changed")
	}
}

func (w *world) recordPath(volume string) string {
	return filepath.Join(w.dir, "records", "volumes", volume+".obj")
}

// TestStorageThatLies covers what a hostile storage can do to records
// (cases 41 and 42).
func TestStorageThatLies(t *testing.T) {
	read := func(t *testing.T, path string) []byte {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	for _, tt := range []struct {
		name  string
		lie   func(t *testing.T, w *world, pending []byte)
		class failure.Class
	}{
		{"a record of another volume under this name", func(t *testing.T, w *world, _ []byte) {
			if err := os.WriteFile(w.recordPath("data-1"), read(t, w.recordPath("data-2")), 0o600); err != nil {
				t.Fatal(err)
			}
		}, failure.Tampered},
		{"an older record, which would format again", func(t *testing.T, w *world, pending []byte) {
			if err := os.WriteFile(w.recordPath("data-1"), pending, 0o600); err != nil {
				t.Fatal(err)
			}
		}, failure.Tampered},
		{"no record any more", func(t *testing.T, w *world, _ []byte) {
			if err := os.Remove(w.recordPath("data-1")); err != nil {
				t.Fatal(err)
			}
		}, failure.Tampered},
		{"a truncated record", func(t *testing.T, w *world, _ []byte) {
			if err := os.Truncate(w.recordPath("data-1"), 100); err != nil {
				t.Fatal(err)
			}
		}, failure.Tampered},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t)
			m := w.machine()
			if _, _, err := w.get(m, "data-2", formatOp); err != nil {
				t.Fatal(err)
			}
			_, dek, err := w.get(m, "data-1", formatOp)
			if err != nil {
				t.Fatal(err)
			}
			pending := read(t, w.recordPath("data-1"))
			w.provision(m, "data-1")
			good := read(t, w.recordPath("data-1"))
			tt.lie(t, w, pending)
			for _, when := range []string{"at once", "after a restart"} {
				for _, op := range []keyservicev1.Operation{openOp, formatOp} {
					_, _, err := w.get(w.machine(), "data-1", op)
					if err == nil || failure.Of(err).Class != tt.class {
						t.Errorf("%s, %v: %v, want %s", when, op, err, tt.class)
					}
				}
				w.restart()
			}
			if err := os.WriteFile(w.recordPath("data-1"), good, 0o600); err != nil {
				t.Fatal(err)
			}
			if _, again, err := w.get(w.machine(), "data-1", openOp); err != nil || again != dek {
				t.Errorf("with its record back: %v", err)
			}
		})
	}
}

func TestAnotherMasterSecretIsNoticedAtStart(t *testing.T) {
	w := newWorld(t)
	if _, _, err := w.get(w.machine(), "data-1", formatOp); err != nil {
		t.Fatal(err)
	}
	w.stop()
	if err := os.WriteFile(filepath.Join(w.dir, "master"), bytes.Repeat([]byte{1}, 32), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := NewServer(t.Context(), w.cfg, slog.New(slog.DiscardHandler))
	wantClass(t, err, failure.WrongKey)
}

func TestEveryDecisionIsInAWholeAuditLog(t *testing.T) {
	w := newWorld(t)
	m := w.machine()
	_, _, err := w.get(m, "data-1", formatOp)
	if err != nil {
		t.Fatal(err)
	}
	_, _, _ = w.get(m, "other", formatOp)
	w.stop()
	f, err := os.Open(w.cfg.Audit)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var entries []audit.Entry
	if _, err := audit.Verify(f, func(e audit.Entry) { entries = append(entries, e) }); err != nil {
		t.Fatal(err)
	}
	if len(entries) == 0 || len(entries[0].RecordKey) != 32 {
		t.Fatalf("the log does not begin with the record MAC key's ID: %+v", entries)
	}
	entries = entries[1:]
	if len(entries) != 2 || entries[0].Result != "allowed" || entries[0].Volume != "data-1" || entries[0].KeyVersion != 1 ||
		entries[0].Policy == "" || entries[0].Grant != "data" || len(entries[0].Evidence) != 64 || !strings.HasPrefix(entries[0].Identity, "tpm:") ||
		entries[1].Result != "refused" || entries[1].Class != string(failure.PolicyDenied) {
		t.Fatalf("%+v", entries)
	}
}

// TestNoKeyWithoutAnAuditEntry breaks the audit log under a running service.
func TestNoKeyWithoutAnAuditEntry(t *testing.T) {
	w := newWorld(t)
	m := w.machine()
	if _, _, err := w.get(m, "data-1", formatOp); err != nil {
		t.Fatal(err)
	}
	if err := w.server.service.audit.Close(); err != nil {
		t.Fatal(err)
	}
	if resp, _, err := w.get(m, "data-1", formatOp); err == nil || resp != nil {
		t.Fatalf("a key left without an audit entry: %v", resp)
	}
	w.stop = func() {} // its log is already closed
}

func TestAPortInUseIsNamed(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	err = listenError(l.Addr().String(), func() error { _, err := net.Listen("tcp", l.Addr().String()); return err }())
	wantClass(t, err, failure.Configuration)
	if f := failure.Of(err); !strings.Contains(f.Hint, "port") {
		t.Fatalf("hint %q", f.Hint)
	}
}

func TestAResponseThatWasChangedDoesNotOpen(t *testing.T) {
	w := newWorld(t)
	m := w.machine()
	var p peer.Peer
	resp, err := m.GetKey(t.Context(), &keyservicev1.GetKeyRequest{VolumeId: "data-1", Operation: formatOp, Protocol: keyservicev1.Protocol}, grpc.Peer(&p))
	if err != nil {
		t.Fatal(err)
	}
	ch, _ := atls.FromPeer(&p)
	resp.Generation++
	if _, err := ch.Open(keyservicev1.SealInfo("data-1", formatOp, resp), resp.GetSealedDek()); !errors.Is(err, atls.ErrSealed) {
		t.Fatalf("another generation: %v", err)
	}
	resp.Generation--
	if _, err := ch.Open(keyservicev1.SealInfo("data-2", formatOp, resp), resp.GetSealedDek()); !errors.Is(err, atls.ErrSealed) {
		t.Fatalf("another volume: %v", err)
	}
	if _, err := ch.Open(keyservicev1.SealInfo("data-1", formatOp, resp), resp.GetSealedDek()); err != nil {
		t.Fatal(err)
	}
}

func TestReattestationOverGRPC(t *testing.T) {
	w := newWorld(t)
	m := w.machine()
	var p peer.Peer
	if _, err := m.GetKey(t.Context(), &keyservicev1.GetKeyRequest{VolumeId: "data-1", Operation: formatOp, Protocol: keyservicev1.Protocol}, grpc.Peer(&p)); err != nil {
		t.Fatal(err)
	}
	ch, _ := atls.FromPeer(&p)
	before := ch.Verdict()
	stream, err := m.Reattest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := ch.Reattest(t.Context(), stream); err != nil {
		t.Fatal(err)
	}
	if after := ch.Verdict(); after.CorrelationID == before.CorrelationID {
		t.Fatal("the verdict is the old one")
	}
	if _, _, err := w.get(m, "data-1", formatOp); err != nil {
		t.Fatal(err)
	}
	// A machine that was reset meanwhile is another machine.
	w.tpm.Restart(t)
	w.extend(4)
	if stream, err = m.Reattest(t.Context()); err != nil {
		t.Fatal(err)
	}
	var refusal *atls.Refusal
	if err := ch.Reattest(t.Context(), stream); !errors.As(err, &refusal) {
		t.Fatalf("after a reset: %v", err)
	}
	if !strings.Contains(w.logged.String(), "machine changed while the channel lived") {
		t.Error("the log does not say why")
	}
}

// slowStorage lets a test act between the read of a record and its use.
type slowStorage struct {
	storage.Storage
	afterGet func()
}

func (s *slowStorage) Get(ctx context.Context, name string) ([]byte, storage.Version, error) {
	data, v, err := s.Storage.Get(ctx, name)
	if f := s.afterGet; f != nil {
		s.afterGet = nil
		f()
	}
	return data, v, err
}

func TestAChangeThatLandsDuringAReadIsNoRollback(t *testing.T) {
	master, err := secret.Random(32)
	if err != nil {
		t.Fatal(err)
	}
	k, err := cluster.New(cluster.Options{MasterSecret: master})
	if err != nil {
		t.Fatal(err)
	}
	slow := &slowStorage{Storage: memfs.New()}
	r := openVolumes(t, k, slow)
	slow.afterGet = func() {
		if _, err := r.Obtain(t.Context(), "data-1", "grant", 0); err != nil {
			t.Error(err)
		}
	}
	if _, err := r.Get(t.Context(), "data-1"); !errors.Is(err, volume.ErrNoVolume) {
		t.Errorf("while it was created: %v", err)
	}
	slow.afterGet = func() { activate(t, r, "data-1") }
	if rec, err := r.Get(t.Context(), "data-1"); err != nil || rec.State != volume.Pending {
		t.Errorf("while it was confirmed: %+v, %v", rec, err)
	}
}

// openVolumes opens the volumes of a storage without a service.
func openVolumes(t testing.TB, k kms.KMS, s storage.Storage) *volume.Store {
	t.Helper()
	records, err := macstore.Open(t.Context(), k, s, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { records.Close() })
	return volume.NewStore(volume.Options{KMS: k, Records: records, Now: time.Now, Alone: true})
}

// activate takes a pending volume through the three steps of a first format.
func activate(t testing.TB, s *volume.Store, id string) {
	t.Helper()
	c := &volume.Caller{Holder: volume.Holder{Machine: "tpm:1", Name: "tpm:1"}, Channel: strings.Repeat("ab", 32), Protocol: keyservicev1.Protocol}
	attempt := bytesOf(1, 16)
	for _, step := range []func(*volume.Record) error{
		func(r *volume.Record) error {
			return r.Begin(c, attempt, volume.Header{Generation: 1, KeyVersion: 1, MAC: testMAC, CopyMACs: [][]byte{testMAC, testMAC}}, time.Now())
		},
		func(r *volume.Record) error {
			return r.Stands(c, attempt, volume.Terms{Writers: policy.WritersOne, Term: time.Minute}, volume.NewID(), time.Now())
		},
		func(r *volume.Record) error { return r.Confirm(attempt, 1, 1, testMAC, true) },
	} {
		if _, err := s.Update(t.Context(), id, step); err != nil {
			t.Error(err)
		}
	}
}

func TestWhoMayOnlyCreateDoesNotGetTheKeyOfAVolumeWithData(t *testing.T) {
	w := newWorld(t)
	w.writePolicy(w.pcr(4), `["data-*"]`, "[format]")
	if err := w.server.Reload(); err != nil {
		t.Fatal(err)
	}
	m := w.machine()
	w.provision(m, "data-1")
	_, _, err := w.get(m, "data-1", formatOp)
	wantClass(t, err, failure.PolicyDenied)
}

// TestACallerMayNameTheLengthOfAKey: the first one chooses it, and all others are held to
// it (case 16).
func TestACallerMayNameTheLengthOfAKey(t *testing.T) {
	w := newWorld(t)
	m := w.machine()
	ask := func(volume string, length uint32) (int, error) {
		var p peer.Peer
		req := &keyservicev1.GetKeyRequest{VolumeId: volume, Operation: formatOp, Protocol: keyservicev1.Protocol, Length: length}
		resp, err := m.GetKey(t.Context(), req, grpc.Peer(&p))
		if err != nil {
			return 0, failure.FromStatus(err)
		}
		dek, err := openedBy(t, &p, req, resp)
		if err != nil {
			return 0, err
		}
		return dek.Len(), dek.Close()
	}
	for _, length := range []uint32{1, 15, 65, 96, 1<<32 - 1} {
		_, err := ask("data-1", length)
		wantClass(t, err, failure.Usage)
	}
	if _, _, err := w.get(m, "data-1", openOp); failure.Of(err).Class != failure.NotFound {
		t.Errorf("a refused length left a record: %v", err)
	}
	for _, tt := range []struct {
		volume string
		length uint32
		want   int
	}{{"data-1", 64, 64}, {"data-1", 64, 64}, {"data-1", 0, 64}, {"data-2", 16, 16}, {"data-3", 0, 32}, {"data-3", 32, 32}} {
		if got, err := ask(tt.volume, tt.length); err != nil || got != tt.want {
			t.Errorf("%s, %d: %d bytes, %v", tt.volume, tt.length, got, err)
		}
	}
	for volume, length := range map[string]uint32{"data-1": 32, "data-2": 32, "data-3": 64} {
		_, err := ask(volume, length)
		wantClass(t, err, failure.State)
	}
}

// TestADisklessCallerTakesNothingOfADisk: neither its lease nor its attempt.
func TestADisklessCallerTakesNothingOfADisk(t *testing.T) {
	w := newWorld(t)
	m := w.machine()
	n, err := w.creates(m, "node-1", "data-1")
	if err != nil {
		t.Fatal(err)
	}
	if err := n.begin(); err != nil {
		t.Fatal(err)
	}
	if _, err := n.stands(); err != nil {
		t.Fatal(err)
	}
	_, err = m.GetKey(t.Context(), &keyservicev1.GetKeyRequest{VolumeId: "data-1", Operation: formatOp, Protocol: keyservicev1.Protocol, Diskless: true})
	wantClass(t, failure.FromStatus(err), failure.State)
	if err := n.confirm(); err != nil {
		t.Errorf("the node that creates the disk lost it: %v", err)
	}
}

// TestAMachineThatCrashedHoldsNoKeyWithoutADisk: it had said that the key stands, and
// never confirmed it.
func TestAMachineThatCrashedHoldsNoKeyWithoutADisk(t *testing.T) {
	w := newWorld(t)
	n, err := w.creates(w.machine(), "node-1", "data-1")
	if err != nil {
		t.Fatal(err)
	}
	n.copies = [][]byte{n.mac, n.mac}
	if err := n.begin(); err != nil {
		t.Fatal(err)
	}
	if _, err := n.stands(); err != nil {
		t.Fatal(err)
	}
	other := w.another()
	req := &keyservicev1.GetKeyRequest{VolumeId: "data-1", Operation: formatOp, Protocol: keyservicev1.Protocol, Node: "node-2", Diskless: true}
	resp, err := other.GetKey(t.Context(), req)
	if err != nil {
		t.Fatalf("another machine waits for it: %v", failure.FromStatus(err))
	}
	if _, err := other.ConfirmVolume(t.Context(), &keyservicev1.ConfirmVolumeRequest{VolumeId: "data-1", Generation: resp.GetGeneration(),
		KeyVersion: resp.GetKeyVersion(), HeaderMac: resp.GetHeaderMac(), Attempt: resp.GetAttempt()}); err != nil {
		t.Error(failure.FromStatus(err))
	}
	// A caller with a disk waits as ever.
	req.Diskless = false
	if _, err := w.machine().GetKey(t.Context(), req); failure.Of(failure.FromStatus(err)).Class != failure.Held {
		t.Errorf("%v", err)
	}
}
