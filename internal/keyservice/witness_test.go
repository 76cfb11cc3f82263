package keyservice

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	keyservicev1 "github.com/keyagent/keyagent/api/keyagent/keyservice/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/internal/checkpoint"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/keyclient"
	"github.com/keyagent/keyagent/internal/witness"
)

// returning is a node with a memory, which asks as the agent does.
type returning struct {
	w      *world
	memory bytesMemory
	logged syncBuffer
}

type bytesMemory struct{ data []byte }

func (m *bytesMemory) Load() ([]byte, error) { return m.data, nil }
func (m *bytesMemory) Store(p []byte) error  { m.data = append([]byte{}, p...); return nil }

// get asks in a process of its own.
func (r *returning) get(volume string) error {
	r.w.t.Helper()
	log := slog.New(slog.NewTextHandler(&r.logged, nil))
	c, err := keyclient.New(keyclient.Options{
		Servers: []keyclient.Server{{Address: r.w.at(), Name: "127.0.0.1", Roots: r.w.pki.Pool()}},
		Issuers: func(context.Context) ([]attestation.Issuer, error) { return []attestation.Issuer{r.w.issuer}, nil },
		Log:     log, Node: "node-1", Witness: witness.New(witness.Options{Memory: &r.memory, Log: log}),
	})
	if err != nil {
		r.w.t.Fatal(err)
	}
	k, err := c.GetKey(r.w.t.Context(), keyclient.Request{Volume: volume, Format: true})
	if err == nil {
		err = k.Close()
	}
	return errors.Join(err, c.Close())
}

// snapshot copies storage and audit log; back puts them there again.
func (w *world) snapshot() (back func()) {
	w.t.Helper()
	dir := w.t.TempDir()
	copyTo := func(from, to string) {
		w.t.Helper()
		if err := os.CopyFS(filepath.Join(to, "records"), os.DirFS(filepath.Join(from, "records"))); err != nil {
			w.t.Fatal(err)
		}
		data, err := os.ReadFile(filepath.Join(from, "audit.log"))
		if err == nil {
			err = os.WriteFile(filepath.Join(to, "audit.log"), data, 0o600)
		}
		if err != nil {
			w.t.Fatal(err)
		}
	}
	copyTo(w.dir, dir)
	return func() {
		w.t.Helper()
		if err := errors.Join(os.RemoveAll(filepath.Join(w.dir, "records")), os.Remove(w.cfg.Audit)); err != nil {
			w.t.Fatal(err)
		}
		copyTo(dir, w.dir)
	}
}

// Case 104: storage and audit log are rolled back together. Each fits the other; the first node
// that comes back notices, and from then on nobody gets a key.
func TestAServiceThatWasPutBackIsNoticedByTheFirstNode(t *testing.T) {
	for name, goesOn := range map[string]int{"and nothing more": 0, "and went on, to more entries than before": 4} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			node, stranger := &returning{w: w}, &returning{w: w}
			if err := node.get("data-1"); err != nil {
				t.Fatal(err)
			}
			w.stop()
			back := w.snapshot()
			w.start()
			for _, v := range []string{"data-2", "data-3"} {
				if err := node.get(v); err != nil {
					t.Fatal(err)
				}
			}
			w.stop()
			good := w.snapshot()
			back()
			w.start()
			for range goesOn {
				if err := stranger.get("data-1"); err != nil {
					t.Fatalf("nobody can know: %v", err)
				}
			}
			err := node.get("data-1")
			wantClass(t, err, failure.Tampered)
			for _, says := range []string{"4 entries", "correlation id"} {
				if !strings.Contains(err.Error(), says) {
					t.Errorf("%q is not in %v", says, err)
				}
			}
			if goesOn == 0 && !strings.Contains(err.Error(), "2 entries") {
				t.Errorf("not both checkpoints are named: %v", err)
			}
			if !strings.Contains(w.logged.String(), "THE AUDIT LOG WENT BACK") {
				t.Error("the service is silent about it")
			}
			if err := w.server.ready(); !errors.Is(err, errWentBack) {
				t.Errorf("it is ready: %v", err)
			}
			wantClass(t, stranger.get("data-1"), failure.Tampered)
			w.stop()
			_, err = NewServer(t.Context(), w.cfg, slog.New(slog.DiscardHandler))
			wantClass(t, err, failure.Tampered)
			good()
			w.start()
			if err := errors.Join(node.get("data-1"), (&returning{w: w}).get("data-1")); err != nil {
				t.Errorf("with the right log back: %v", err)
			}
			if goesOn == 0 {
				return
			}
			// Who got a key meanwhile has seen the other log. A third one is for all.
			wantClass(t, stranger.get("data-1"), failure.Tampered)
			w.stop()
			if err := os.Remove(w.cfg.Audit); err != nil {
				t.Fatal(err)
			}
			w.cfg.InitAudit = true
			w.start()
			if err := errors.Join(node.get("data-1"), stranger.get("data-1")); err != nil {
				t.Errorf("with a log that was begun anew: %v", err)
			}
		})
	}
}

// An operator who has lost the log begins another one: nodes take it, and say so.
func TestALogThatIsLostIsBegunAnew(t *testing.T) {
	w := newWorld(t)
	node := &returning{w: w}
	if err := node.get("data-1"); err != nil {
		t.Fatal(err)
	}
	w.stop()
	if err := os.Remove(w.cfg.Audit); err != nil {
		t.Fatal(err)
	}
	w.cfg.InitAudit = true
	w.start()
	w.cfg.InitAudit = false
	if err := node.get("data-1"); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(node.logged.String(), "has not seen") {
		t.Errorf("the node is silent about it:\n%s", node.logged.String())
	}
}

// Two replicas run on copies of one log: a node that meets both notices.
func TestASplitViewOfTwoReplicasIsNoticed(t *testing.T) {
	w := newWorld(t)
	node := &returning{w: w}
	if err := node.get("data-1"); err != nil {
		t.Fatal(err)
	}
	w.stop()
	back := w.snapshot()
	w.start()
	if err := node.get("data-2"); err != nil { // of the one
		t.Fatal(err)
	}
	w.stop()
	back() // the other, on the copy
	w.start()
	if err := (&returning{w: w}).get("data-3"); err != nil {
		t.Fatal(err)
	}
	wantClass(t, node.get("data-1"), failure.Tampered)
}

// A checkpoint that the log's key has not signed stops no service.
func TestCheckpointsOfStrangersStopNobody(t *testing.T) {
	w := newWorld(t)
	m := w.machine()
	resp, err := m.GetKey(t.Context(), &keyservicev1.GetKeyRequest{VolumeId: "data-1", Operation: formatOp, Protocol: keyservicev1.Protocol})
	if err != nil {
		t.Fatal(err)
	}
	good, err := checkpoint.Parse(resp.GetCheckpointKey(), resp.GetCheckpoint())
	if err != nil || good.Size != w.server.service.audit.Size() {
		t.Fatalf("%+v, %v", good, err)
	}
	note := string(good.Note)
	ask := func(notes ...string) error {
		req := &keyservicev1.GetKeyRequest{VolumeId: "data-1", Operation: formatOp, Protocol: keyservicev1.Protocol}
		for _, n := range notes {
			req.Checkpoints = append(req.Checkpoints, []byte(n))
		}
		resp, err := m.GetKey(t.Context(), req)
		if err == nil && len(notes) > 0 && notes[0] == note {
			c, errParse := checkpoint.Parse(resp.GetCheckpointKey(), resp.GetCheckpoint())
			if err := errors.Join(errParse, c.Follows(good.Checkpoint, resp.GetConsistency())); err != nil {
				t.Error(err)
			}
		}
		return failure.FromStatus(err)
	}
	for name, n := range map[string]string{
		"the right one":  note,
		"a larger size":  strings.Replace(note, "\n2\n", "\n2000\n", 1),
		"garbage":        "x",
		"nothing":        "",
		"a long one":     note + strings.Repeat("x", 1<<18),
		"another log":    strings.ReplaceAll(note, good.Log.String(), strings.Repeat("0", 32)),
		"no such prefix": "keyagent-audit-\n",
	} {
		if err := ask(n, n); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	wantClass(t, ask(make([]string, maxNotes+1)...), failure.Usage)
	if err := w.server.ready(); err != nil {
		t.Error(err)
	}
}

func TestAnOperatorGetsACheckpoint(t *testing.T) {
	w := newWorld(t)
	c, err := w.server.service.Checkpoint()
	if err != nil {
		t.Fatal(err)
	}
	if _, key, err := checkpoint.ParseVerifierKey(c.Key); err != nil {
		t.Error(err)
	} else if _, err := checkpoint.Parse(key, []byte(c.Note)); err != nil {
		t.Error(err)
	}
}
