package keyservice

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/hex"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"filippo.io/age"
	"filippo.io/age/armor"
	"github.com/hiddeco/sshsig"
	"golang.org/x/crypto/ssh"

	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/recovery"
	"github.com/keyagent/keyagent/internal/revocation"
)

// board are operators who may approve.
func board(t *testing.T, names ...string) (operators []recovery.Operator, sign func(who int, request []byte) []byte) {
	t.Helper()
	var signers []ssh.Signer
	for _, name := range names {
		_, private, err := ed25519.GenerateKey(rand.Reader)
		must(t, err)
		s, err := ssh.NewSignerFromKey(private)
		must(t, err)
		signers = append(signers, s)
		operators = append(operators, recovery.Operator{Name: name, Key: string(ssh.MarshalAuthorizedKey(s.PublicKey()))})
	}
	return operators, func(who int, request []byte) []byte {
		t.Helper()
		sig, err := sshsig.Sign(bytes.NewReader(request), signers[who], sshsig.HashSHA512, recovery.Namespace)
		must(t, err)
		return sshsig.Armor(sig)
	}
}

// A person gets the key of a volume when two of three operators approve: this key, once, in
// its time, and the audit log has it.
func TestAPersonGetsAKeyThatOperatorsApprove(t *testing.T) {
	w := newWorld(t)
	m, _ := w.granted("[open, format]")
	_, dek, err := w.get(m, "data-1", openOp)
	must(t, err)
	me, err := age.GenerateX25519Identity()
	must(t, err)
	ask := func() ([]byte, error) {
		return w.server.service.RecoverRequest(t.Context(), "uid:0", "data-1", "case 7", me.Recipient().String(), 0, time.Hour)
	}
	_, err = ask()
	wantClass(t, err, failure.PolicyDenied) // it is off

	operators, sign := board(t, "alice", "bob", "carol")
	w.cfg.Recovery = &RecoveryConfig{Threshold: 2, Operators: operators, PerDay: 2}
	w.restart()
	request, err := ask()
	must(t, err)
	collect := func(request []byte, by ...int) ([]byte, error) {
		t.Helper()
		var approvals [][]byte
		for _, who := range by {
			approvals = append(approvals, sign(who, request))
		}
		return w.server.service.Recover(t.Context(), "uid:0", request, approvals)
	}
	_, err = collect(request, 1)
	wantClass(t, err, failure.PolicyDenied)
	_, err = w.server.service.Recover(t.Context(), "uid:0", request, [][]byte{sign(0, request), sign(1, append(request, ' '))})
	wantClass(t, err, failure.PolicyDenied)
	_, err = collect(bytes.Replace(request, []byte("case 7"), []byte("case 8"), 1))
	wantClass(t, err, failure.PolicyDenied)
	out, err := collect(request, 2, 0)
	must(t, err)
	r, err := age.Decrypt(armor.NewReader(bytes.NewReader(out)), me)
	must(t, err)
	got, err := io.ReadAll(r)
	must(t, err)
	if hex.EncodeToString(got) != dek {
		t.Error("it is another key")
	}
	_, err = collect(request, 0, 1)
	wantClass(t, err, failure.State)
	w.restart() // by its audit log it knows
	_, err = collect(request, 0, 1)
	wantClass(t, err, failure.State)

	second, err := ask()
	must(t, err)
	_, err = collect(second, 0, 1)
	must(t, err)
	third, err := ask()
	must(t, err)
	_, err = collect(third, 0, 1)
	wantClass(t, err, failure.PolicyDenied)
	if err == nil || !strings.Contains(err.Error(), "24 hours") {
		t.Error(err)
	}

	w.stop()
	log, err := os.ReadFile(w.cfg.Audit)
	must(t, err)
	if !strings.Contains(string(log), `"event":"recover","correlation_id"`) || !strings.Contains(string(log), `"holder":"alice, carol"`) || !strings.Contains(string(log), `"detail":"case 7"`) {
		t.Errorf("the audit log does not have it: %s", log)
	}
	if strings.Contains(string(log)+w.logged.String(), dek) {
		t.Error("a log has the key")
	}
	w.start()
}

// A request is for what the volume was when it was made, and for volumes that hold data.
func TestARequestIsForOneKey(t *testing.T) {
	w := newWorld(t)
	operators, sign := board(t, "alice", "bob")
	w.cfg.Recovery = &RecoveryConfig{Threshold: 2, Operators: operators}
	w.restart()
	me, err := age.GenerateX25519Identity()
	must(t, err)
	ask := func(id, to string, window time.Duration) ([]byte, error) {
		return w.server.service.RecoverRequest(t.Context(), "uid:0", id, "case 7", to, 0, window)
	}
	_, err = ask("data-1", me.Recipient().String(), time.Hour)
	wantClass(t, err, failure.NotFound)
	w.granted("[open, format]")
	for _, window := range []time.Duration{0, -time.Hour, 25 * time.Hour} {
		_, err = ask("data-1", me.Recipient().String(), window)
		wantClass(t, err, failure.Usage)
	}
	operator := strings.TrimSpace(operators[0].Key)
	for _, to := range []string{"hunter2", operator + " somebody@somewhere", "no-pty " + operator, operator + "\n" + operator, "age1yubikey1qqq", strings.ToUpper(me.Recipient().String())} {
		_, err = ask("data-1", to, time.Hour)
		wantClass(t, err, failure.Usage)
	}
	_, err = ask("data-1", operator, time.Hour)
	must(t, err)
	_, err = w.server.service.RecoverRequest(t.Context(), "uid:0", "data-1", "case 7", me.Recipient().String(), 2, time.Hour)
	wantClass(t, err, failure.State) // there is no such key
	_, err = w.server.service.Revoke(t.Context(), "uid:0", revocation.Subject{Kind: revocation.Volume, Name: "data-1"}, "", false)
	must(t, err)
	_, err = ask("data-1", operator, time.Hour)
	wantClass(t, err, failure.Revoked)
	_, err = w.server.service.Revoke(t.Context(), "uid:0", revocation.Subject{Kind: revocation.Volume, Name: "data-1"}, "", true)
	must(t, err)
	request, err := ask("data-1", me.Recipient().String(), time.Hour)
	must(t, err)
	for want, change := range map[string]func(*recovery.Request){
		"another key service": func(r *recovery.Request) { r.Service = strings.Repeat("0", len(r.Service)) },
		"generation":          func(r *recovery.Request) { r.Generation++ },
		"version":             func(r *recovery.Request) { r.KeyVersion++ },
		"from ":               func(r *recovery.Request) { r.From, r.Until = r.From.Add(-2*time.Hour), r.From.Add(-time.Hour) },
		"until ":              func(r *recovery.Request) { r.From, r.Until = r.Until, r.Until.Add(time.Hour) },
	} {
		r, err := recovery.Parse(request)
		must(t, err)
		change(&r)
		changed, err := r.Encode()
		must(t, err)
		_, err = w.server.service.Recover(t.Context(), "uid:0", changed, [][]byte{sign(0, changed), sign(1, changed)})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
	_, err = w.server.service.Reset(t.Context(), "uid:0", "data-1")
	must(t, err)
	_, err = w.server.service.Recover(t.Context(), "uid:0", request, [][]byte{sign(0, request), sign(1, request)})
	wantClass(t, err, failure.State)
	_, err = w.server.service.Retire(t.Context(), "uid:0", "data-1")
	must(t, err)
	_, err = w.server.service.Recover(t.Context(), "uid:0", request, [][]byte{sign(0, request), sign(1, request)})
	wantClass(t, err, failure.State)
	_, err = newRecoveries(&RecoveryConfig{Threshold: 3, Operators: operators}, nil)
	wantClass(t, err, failure.Configuration)
}
