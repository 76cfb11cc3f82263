package keyservice

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	keyservicev1 "github.com/keyagent/keyagent/api/keyagent/keyservice/v1"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/revocation"
)

// identity is the one of a machine that got a key, as the audit log has it.
func (w *world) identity() string {
	w.t.Helper()
	log, err := os.ReadFile(w.cfg.Audit)
	must(w.t, err)
	_, rest, ok := strings.Cut(string(log), `"identity":"`)
	if !ok {
		w.t.Fatal("the audit log names nobody")
	}
	id, _, _ := strings.Cut(rest, `"`)
	return id
}

func TestARevokedMachineGetsNothingAndGivesBackWhatItHas(t *testing.T) {
	w := newWorld(t)
	m, _ := w.granted("[open, format, rotate, retire]")
	resp, _, err := w.get(m, "data-1", openOp)
	must(t, err)
	lease := resp.GetLease().GetId()
	renew := func(verdict bool) error {
		_, err := m.RenewLease(t.Context(), &keyservicev1.RenewLeaseRequest{VolumeId: "data-1", LeaseId: lease, Verdict: verdict})
		return failure.FromStatus(err)
	}
	must(t, renew(false))
	must(t, renew(true))
	for _, subject := range []revocation.Subject{{Kind: revocation.Node, Name: w.identity()}, {Kind: revocation.Volume, Name: "data-1"}} {
		_, err := w.server.service.Revoke(t.Context(), "uid:0", subject, "stolen", false)
		must(t, err)
		for _, op := range []keyservicev1.Operation{openOp, formatOp, rotateOp} {
			_, _, err = w.get(m, "data-1", op)
			wantClass(t, err, failure.Revoked)
		}
		wantClass(t, renew(false), failure.Revoked)
		wantClass(t, renew(true), failure.Revoked)
		var header metadata.MD
		_, err = m.RenewLease(t.Context(), &keyservicev1.RenewLeaseRequest{VolumeId: "data-1", Verdict: true}, grpc.Header(&header))
		if err == nil || len(header.Get(keyservicev1.VerdictHeader)) != 1 {
			t.Errorf("a refusal does not show that the question was understood: %v, %v", err, header)
		}
		_, err = retire(t, m, lease)
		wantClass(t, err, failure.Revoked)
		if _, _, err := w.get(m, "data-2", formatOp); subject.Kind == revocation.Volume {
			must(t, err)
		} else {
			wantClass(t, err, failure.Revoked)
		}
		_, err = w.server.service.Revoke(t.Context(), "uid:0", subject, "found again", true)
		must(t, err)
		must(t, renew(false))
	}
	_, err = w.server.service.Revoke(t.Context(), "uid:0", revocation.Subject{Kind: revocation.Volume, Name: "data-1"}, "", false)
	must(t, err)
	_, err = m.ReleaseLease(t.Context(), &keyservicev1.ReleaseLeaseRequest{VolumeId: "data-1", LeaseId: lease})
	must(t, failure.FromStatus(err))
	// A revocation says what is wrong in the log, and no more than its class to the machine.
	_, _, err = w.get(m, "data-1", openOp)
	if err == nil || strings.Contains(err.Error(), "uid:0") {
		t.Error(err)
	}
	log, err := os.ReadFile(w.cfg.Audit)
	must(t, err)
	for _, want := range []string{`"event":"revoke"`, `"event":"lift-revocation"`, `"subject":"volume:data-1","word":3`, `"class":"revoked"`, `"detail":"stolen"`} {
		if !strings.Contains(string(log), want) {
			t.Errorf("the audit log does not have %s", want)
		}
	}
}

// A storage that lost the word, by a restored backup or on purpose, does not have it forgotten
// by the key service whose audit log has it.
func TestARevocationOutlivesItsStorage(t *testing.T) {
	w := newWorld(t)
	w.granted("[open, format]")
	_, err := w.server.service.Revoke(t.Context(), "uid:0", revocation.Subject{Kind: revocation.Volume, Name: "data-1"}, "", false)
	must(t, err)
	w.restart()
	m := w.machine()
	_, _, err = w.get(m, "data-1", openOp)
	wantClass(t, err, failure.Revoked)
	w.stop()
	must(t, os.RemoveAll(filepath.Join(w.dir, "records", "revocations")))
	w.start()
	m = w.machine()
	_, _, err = w.get(m, "data-1", openOp)
	wantClass(t, err, failure.Revoked)
	if all, err := w.server.service.Revocations(t.Context()); err != nil || len(all) != 1 || all[0].By != "uid:0" {
		t.Errorf("%+v, %v", all, err)
	}
	// The number of the volume's record is another one, and is not confused with the word's.
	if rec, err := w.server.service.Volume(t.Context(), "data-1"); err != nil || rec.Seen != 0 {
		t.Errorf("%+v, %v", rec, err)
	}
	_, err = w.server.service.Revoke(t.Context(), "uid:0", revocation.Subject{Kind: revocation.Volume, Name: "data-1"}, "", true)
	must(t, err)
	_, _, err = w.get(m, "data-1", openOp)
	must(t, err)
}
