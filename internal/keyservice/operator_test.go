package keyservice

import (
	"bytes"
	"errors"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/volume"
	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/storage"
	"github.com/keyagent/keyagent/storage/file"
	"github.com/keyagent/keyagent/storage/memfs"
)

func (w *world) operator() *AdminClient {
	w.t.Helper()
	dir, err := os.MkdirTemp("", "admin") // a socket's path is short
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { os.RemoveAll(dir) })
	w.cfg.Admin = filepath.Join(dir, "s")
	w.restart()
	c := NewAdminClient(w.cfg.Admin)
	w.t.Cleanup(func() { c.Close() })
	return c
}

// Case 48: an operator's word lets another node write, and the first one is told.
func TestAnOperatorTakesAVolumeOver(t *testing.T) {
	w := newWorld(t)
	c := w.operator()
	first, second := w.machine(), w.another()
	_, lease := w.provision(first, "data-1")
	_, _, err := w.get(second, "data-1", openOp)
	wantClass(t, err, failure.Held)
	if _, err := c.Do(t.Context(), "takeover", "data-1"); err != nil {
		t.Fatal(err)
	}
	_, err = renew(t, first, lease.GetId())
	wantClass(t, err, failure.Held)
	if _, _, err := w.get(second, "data-1", openOp); err != nil {
		t.Errorf("after it: %v", err)
	}
	all, err := c.Volumes(t.Context())
	if err != nil || len(all) != 1 || all[0].Lease == nil || all[0].Ends == nil || all[0].KEK == "" {
		t.Errorf("%+v, %v", all, err)
	}
	log, err := os.ReadFile(w.cfg.Audit)
	if err != nil || !strings.Contains(string(log), `"event":"volume-takeover"`) || !strings.Contains(string(log), `"identity":"uid:0"`) || !strings.Contains(string(log), `"holder":"node-1 tpm:`) {
		t.Errorf("the audit log does not say who took it from whom, %v", err)
	}
}

// Case 64: the end of a life, and the beginning of the next one.
func TestARetiredVolumeGivesItsKeyToNobody(t *testing.T) {
	w := newWorld(t)
	c := w.operator()
	m := w.machine()
	n, _ := w.provision(m, "data-1")
	if i, err := c.Do(t.Context(), "retire", "data-1"); err != nil || i.State != volume.Retired || i.KEK != "" {
		t.Fatalf("%+v, %v", i, err)
	}
	_, _, err := w.get(m, "data-1", openOp)
	wantClass(t, err, failure.State)
	_, _, err = w.get(m, "data-1", formatOp)
	wantClass(t, err, failure.State)
	if _, err := c.Do(t.Context(), "reset", "data-1"); err != nil {
		t.Fatal(err)
	}
	resp, _, err := w.get(m, "data-1", formatOp)
	if err != nil || resp.GetGeneration() != 2 || resp.GetKeyVersion() != 2 {
		t.Fatalf("%v, %v", resp, err)
	}
	wantClass(t, n.begin(), failure.State) // the key of the life before
	again, _ := w.provision(m, "data-1")
	if again.dek.Equal(n.dek) {
		t.Error("the new life has the old key")
	}
	for _, verb := range []string{"retire", "reset", "takeover", "accept-restore"} {
		_, err := c.Do(t.Context(), verb, "data-9")
		wantClass(t, err, failure.NotFound)
		_, err = c.Do(t.Context(), verb, "../x")
		wantClass(t, err, failure.Usage)
	}
}

// Case 64: only root and the service's own user administer.
func TestTheAdminSocketIsForItsOwner(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("this test needs root, to become somebody else")
	}
	w := newWorld(t)
	w.operator()
	if err := errors.Join(os.Chmod(filepath.Dir(w.cfg.Admin), 0o755), os.Chmod(w.cfg.Admin, 0o666)); err != nil {
		t.Fatal(err)
	}
	ask := `my $s = IO::Socket::UNIX->new(Peer => $ARGV[0]) or die $!; $SIG{PIPE} = "IGNORE";
print $s "POST /v1/list HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}"; $s->flush; my $line = <$s> // "nothing"; print "ANSWER $line"`
	for uid, want := range map[string]string{"0": "200 OK", "65534": "ANSWER nothing"} {
		out, err := exec.Command("setpriv", "--reuid", uid, "--clear-groups", "perl", "-MIO::Socket::UNIX", "-MIO::Handle", "-e", ask, w.cfg.Admin).CombinedOutput()
		if err != nil || !strings.Contains(string(out), want) {
			t.Errorf("uid %s: %s, %v", uid, out, err)
		}
	}
}

// Case 64: five bytes that are no object stop neither a status, nor an export, nor a
// change of the KEK.
func TestJunkInTheStorageStopsNothing(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "records")
	s, err := file.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	was := fill(t, clusterKMS(t, oldMaster), struct{ storage.Storage }{s})
	junk := filepath.Join(dir, "volumes", "zzz.obj")
	if err := os.WriteFile(junk, []byte("junk!"), 0o600); err != nil {
		t.Fatal(err)
	}
	to := clusterKMS(t, newMaster)
	a := admin(t, kms.WithOld(to, clusterKMS(t, oldMaster)), s)
	status, err := a.Status(t.Context())
	if err != nil || len(status.Refused) != 1 || status.Volumes[volume.Active] != 4 {
		t.Errorf("%+v, %v", status, err)
	}
	p, err := a.Rewrap(t.Context(), nil)
	if failure.Of(err).Class != failure.Tampered || p.Changed != 6 {
		t.Errorf("%+v, %v", p, err)
	}
	if status, err = a.Status(t.Context()); err != nil || status.MACKey != to.KEK() || status.Outdated != 0 {
		t.Errorf("the MAC key stays under the old KEK: %+v, %v", status, err)
	}
	id, recipient := identity(t)
	var out bytes.Buffer
	digest, p, err := a.Export(t.Context(), &out, recipient, nil)
	if failure.Of(err).Class != failure.Tampered || digest == "" || p.Refused != 1 {
		t.Fatalf("%q, %+v, %v", digest, p, err)
	}
	other, there := clusterKMS(t, "a master secret of somebody else"), memfs.New()
	b, err := OpenNewAdmin(t.Context(), other, there, "", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if done, err := imports(t, b, out.Bytes(), id, digest); err != nil || done.Created != 6 {
		t.Errorf("what was exported beside it: %+v, %v", done, err)
	}
	sameKeys(t, keysOf(t, other, there), was)
}

// FuzzAdminRequest: what is not a request of this program is refused, and nothing is
// read beyond its bound.
func FuzzAdminRequest(f *testing.F) {
	f.Add([]byte(`{"volume":"data-1"}`))
	f.Add([]byte(`{"lost":{"volume":"data-1","generation":1}}`))
	f.Add([]byte(`{"more":1}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		var in adminRequest
		req, err := http.NewRequest(http.MethodPost, "/", bytes.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		if err := readAdmin(req, &in); err != nil && failure.Of(err).Class != failure.Usage {
			t.Fatal(err)
		}
	})
}
