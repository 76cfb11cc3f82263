package keyservice

import (
	"context"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"

	replicav1 "github.com/keyagent/keyagent/api/keyagent/replica/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/atls"
	"github.com/keyagent/keyagent/attestation/kinds"
	"github.com/keyagent/keyagent/attestation/tpm"
	"github.com/keyagent/keyagent/internal/audit"
	"github.com/keyagent/keyagent/internal/config"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/keyclient"
	"github.com/keyagent/keyagent/internal/lab/pki"
	"github.com/keyagent/keyagent/internal/policysource"
	"github.com/keyagent/keyagent/internal/replica"
	"github.com/keyagent/keyagent/internal/revocation"
	"github.com/keyagent/keyagent/internal/volume"
	"github.com/keyagent/keyagent/kms/cluster"
	"github.com/keyagent/keyagent/kms/setup"
	"github.com/keyagent/keyagent/test/sim/emulator"
	"github.com/keyagent/keyagent/test/sim/swtpm"
)

// replicaWorld is a world whose service has its records in etcd and proves what it is, so that
// others can join it. Nodes are told from key services by their registers.
type replicaWorld struct {
	*world
	etcd  string
	value string // of PCR 7 of a key service
	count int
}

func newReplicaWorld(t *testing.T) *replicaWorld {
	t.Helper()
	w := &replicaWorld{world: newWorld(t), etcd: emulator.Etcd(t)}
	w.stop()
	w.cfg.TPM = w.machineOfService()
	w.cfg.Storage = w.storage("records")
	w.policyFor(w.cfg, "replicas: {profiles: [service]}")
	w.start()
	return w
}

func (w *replicaWorld) storage(prefix string) string {
	return "storage://etcd?" + url.Values{"endpoints": {w.etcd}, "prefix": {prefix}}.Encode()
}

// machineOfService makes a TPM of a machine that booted as a key service does.
func (w *replicaWorld) machineOfService() *kinds.TPMConfig {
	w.t.Helper()
	m := world{t: w.t, tpm: swtpm.New(w.t, w.tpm.Authority)}
	m.extend(7)
	w.value = m.pcr(7)
	return &kinds.TPMConfig{Device: m.tpm.Device, EventLog: "/nonexistent"}
}

// policyFor writes a policy with what it says of replicas.
func (w *replicaWorld) policyFor(cfg *Config, replicas string) {
	w.t.Helper()
	tpmOf := func(pcr int, value string) string {
		return fmt.Sprintf(`tpm: {trust: ["root:lab"], bank: sha256, event_log: optional, pcrs: [{pcr: %d, accept: ["%s"]}]}`, pcr, value)
	}
	text := fmt.Sprintf(`version: 1
lifetime: 1h
trust: {tpm: {roots: [{name: lab, file: %s}]}}
profiles:
  - {name: service, %s}
  - {name: guest, %s}
grants:
  - {name: data, profiles: [guest], volumes: ["data-*"], operations: [open, format]}
%s
`, w.tpm.Authority.IssuerPath(), tpmOf(7, w.value), tpmOf(4, w.pcr(4)), replicas)
	must(w.t, os.WriteFile(cfg.Policy, []byte(text), 0o644))
}

// replica is a configuration of a key service beside the first, on a machine of its own.
func (w *replicaWorld) replica() *Config {
	w.t.Helper()
	w.count++
	dir := filepath.Join(w.dir, fmt.Sprintf("replica-%d", w.count))
	must(w.t, os.Mkdir(dir, 0o700))
	cfg := *w.cfg
	cfg.TPM = w.machineOfService()
	cfg.Policy, cfg.Audit = filepath.Join(dir, "policy.yaml"), filepath.Join(dir, "audit.log")
	cfg.KMS, cfg.InitAudit = "kms://cluster-kms?joined=true", true
	cfg.Join = []keyclient.ServerConfig{{Address: w.at()}}
	w.policyFor(&cfg, "replicas: {profiles: [service]}")
	return &cfg
}

// opened is the key service of a configuration that waits for a replica.
func (w *replicaWorld) opened(cfg *Config) (*Server, error) {
	w.t.Helper()
	s, err := OpenSealed(cfg, slog.New(slog.NewTextHandler(w.logged, nil)))
	must(w.t, err)
	ctx, cancel := context.WithTimeout(w.t.Context(), time.Minute)
	defer cancel()
	return s.Unseal(ctx, func() {})
}

// run serves until the test ends, as a world of its own. It returns when the first exchange is
// over; the test itself says when the next one is.
func (w *replicaWorld) run(server *Server, cfg *Config) *world {
	w.t.Helper()
	server.peers.after = func(time.Duration) <-chan time.Time { return nil }
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- server.Run(ctx) }()
	other := *w.world
	other.cfg, other.server = cfg, server
	other.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			w.t.Errorf("replica: %v", err)
		}
	})
	w.t.Cleanup(other.stop)
	_, _, err := other.get(other.machine(), "data-0", openOp)
	wantClass(w.t, err, failure.NotFound)
	return &other
}

func (w *replicaWorld) joined(cfg *Config) *world {
	w.t.Helper()
	server, err := w.opened(cfg)
	must(w.t, err)
	return w.run(server, cfg)
}

// entries are lines of an audit log that have each of the words.
func entries(t *testing.T, log string, words ...string) (n int) {
	t.Helper()
	text, err := os.ReadFile(log)
	must(t, err)
	for _, line := range strings.Split(string(text), "\n") {
		has := line != ""
		for _, word := range words {
			has = has && strings.Contains(line, word)
		}
		if has {
			n++
		}
	}
	return n
}

// ask is what a machine asks the first service, and demands of it, by a policy.
func (w *replicaWorld) ask(machine *kinds.TPMConfig, policy string) (*replica.Session, error) {
	w.t.Helper()
	s, err := replica.Dial(w.t.Context(), w.at(), w.asking(machine, policy))
	if err == nil {
		w.t.Cleanup(func() { s.Close() })
	}
	return s, err
}

// asking is how a machine asks, by its own policy.
func (w *replicaWorld) asking(machine *kinds.TPMConfig, policy string) *atls.ClientConfig {
	w.t.Helper()
	source, err := policysource.New(policy, slog.New(slog.DiscardHandler))
	must(w.t, err)
	demand, err := source.Replicas(nil, nil)
	must(w.t, err)
	id, err := atls.NewIdentity()
	must(w.t, err)
	issuer, err := tpm.NewIssuer(tpm.IssuerOptions{Device: machine.Device, EventLog: "/nonexistent"})
	must(w.t, err)
	return &atls.ClientConfig{ServerName: "127.0.0.1", RootCAs: w.pki.Pool(), Identity: id, Issuers: []attestation.Issuer{issuer}, Server: demand, Timeout: askTimeout}
}

func (w *replicaWorld) join(machine *kinds.TPMConfig, policy string) error {
	w.t.Helper()
	s, err := w.ask(machine, policy)
	if err != nil {
		return err
	}
	master, err := s.Join(w.t.Context())
	if err == nil {
		must(w.t, master.Close())
	}
	return err
}

// A replica that has nothing but its evidence serves the same keys, and the secret is nowhere but
// in its memory. It gives it to the next one when the first is gone.
func TestAReplicaJoinsByItsEvidence(t *testing.T) {
	w := newReplicaWorld(t)
	w.provision(w.machine(), "data-1")
	_, want, err := w.get(w.machine(), "data-1", openOp)
	must(t, err)
	first := w.replica()
	second := w.replica()
	joined := w.joined(first)
	_, got, err := joined.get(joined.machine(), "data-1", openOp)
	if err != nil || got != want {
		t.Fatalf("another key, or %v", err)
	}
	if n := entries(t, w.cfg.Audit, "replica-join", `"allowed"`, `"profile":"service"`); n != 1 {
		t.Errorf("the giver's audit log has %d entries", n)
	}
	if n := entries(t, first.Audit, `"unseal"`, "the master secret came from the replica "+w.at()); n != 1 {
		t.Errorf("the joiner's audit log has %d entries", n)
	}
	// The one that had it is gone for good, and the one that joined restarts beside the next.
	second.Join = []keyclient.ServerConfig{{Address: w.at()}, {Address: joined.at()}}
	w.stop()
	next := w.joined(second)
	first.InitAudit, first.Join = false, []keyclient.ServerConfig{{Address: next.at()}}
	joined.stop()
	again := w.joined(first)
	if _, got, err = again.get(again.machine(), "data-1", openOp); err != nil || got != want {
		t.Fatalf("after its restart another key, or %v", err)
	}
	master, err := cluster.LoadMasterSecret(filepath.Join(w.dir, "master"))
	must(t, err)
	defer master.Close()
	must(t, os.Remove(filepath.Join(w.dir, "master")))
	must(t, master.Use(func(raw []byte) error {
		forms := []string{string(raw), hex.EncodeToString(raw), base64.StdEncoding.EncodeToString(raw)}
		return filepath.WalkDir(w.dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			text, err := os.ReadFile(path)
			for _, form := range forms {
				if strings.Contains(string(text)+w.logged.String(), form) {
					t.Errorf("%s, or the log, has the master secret", path)
				}
			}
			return err
		})
	}))
}

// Who is not a key service by the giver's policy gets nothing, and the audit log has it.
func TestNobodyElseJoins(t *testing.T) {
	w := newReplicaWorld(t)
	good := w.replica()
	must(t, w.join(good.TPM, good.Policy))

	changed := w.replica()
	(&world{t: t, tpm: &swtpm.TPM{Device: changed.TPM.Device}}).extend(7)
	wantClass(t, w.join(changed.TPM, changed.Policy), failure.EvidenceRefused)
	if n := entries(t, w.cfg.Audit, `"attest"`, `"refused"`); n != 1 {
		t.Errorf("a changed measurement is %d times in the audit log", n)
	}
	server, err := w.once(changed)
	if server != nil || err == nil || !strings.Contains(w.logged.String(), "a replica does not give the master secret") {
		t.Errorf("%v", err)
	}

	node := &kinds.TPMConfig{Device: w.tpm.Device}
	wantClass(t, w.join(node, good.Policy), failure.PolicyDenied)
	if n := entries(t, w.cfg.Audit, `"replica-join"`, `"refused"`, "guest"); n != 1 {
		t.Errorf("a node that joins is %d times in the audit log", n)
	}

	id := joinedIdentity(t, w.cfg.Audit)
	_, err = w.server.service.Revoke(t.Context(), "uid:0", revocation.Subject{Kind: revocation.Node, Name: id}, "stolen", false)
	must(t, err)
	wantClass(t, w.join(good.TPM, good.Policy), failure.Revoked)
	_, err = w.server.service.Revoke(t.Context(), "uid:0", revocation.Subject{Kind: revocation.Node, Name: id}, "found", true)
	must(t, err)

	// One that is connected, and not in the policy any more.
	s, err := w.ask(good.TPM, good.Policy)
	must(t, err)
	w.policyFor(w.cfg, "")
	must(t, w.server.Reload())
	_, err = s.Join(t.Context())
	wantClass(t, err, failure.PolicyDenied)
	if n := entries(t, w.cfg.Audit, "replica-join", `"allowed"`); n != 1 {
		t.Errorf("%d were given the master secret", n)
	}
}

// once is opened for one that is refused: it gives up after its first round.
func (w *replicaWorld) once(cfg *Config) (*Server, error) {
	w.t.Helper()
	s, err := OpenSealed(cfg, slog.New(slog.NewTextHandler(w.logged, nil)))
	must(w.t, err)
	ctx, cancel := context.WithCancel(w.t.Context())
	defer cancel()
	stop := time.AfterFunc(5*time.Second, cancel)
	defer stop.Stop()
	return s.Unseal(ctx, func() {})
}

func joinedIdentity(t *testing.T, log string) string {
	t.Helper()
	text, err := os.ReadFile(log)
	must(t, err)
	for _, line := range strings.Split(string(text), "\n") {
		if strings.Contains(line, "replica-join") && strings.Contains(line, `"allowed"`) {
			_, rest, _ := strings.Cut(line, `"identity":"`)
			id, _, _ := strings.Cut(rest, `"`)
			return id
		}
	}
	t.Fatal("nobody joined")
	return ""
}

// A peer that the joiner's own policy does not list is not asked, and learns nothing of it.
func TestAPeerThatIsNoReplicaIsNotAsked(t *testing.T) {
	w := newReplicaWorld(t)
	cfg := w.replica()
	w.policyFor(cfg, "replicas: {profiles: [guest]}")
	err := w.join(cfg.TPM, cfg.Policy)
	wantClass(t, err, failure.ServerUntrusted)
	if !strings.Contains(failure.Of(err).Hint, "replicas") {
		t.Error(failure.Of(err).Hint)
	}
	if n := entries(t, w.cfg.Audit, "replica-join") + entries(t, w.cfg.Audit, `"attest"`); n != 0 {
		t.Errorf("it was asked %d times", n)
	}
	// One that proves nothing, and one that knows no replicas.
	tpmConfig := w.cfg.TPM
	w.cfg.TPM = nil
	w.restart()
	good := w.replica()
	wantClass(t, w.join(good.TPM, good.Policy), failure.ServerUntrusted)
	w.cfg.TPM = tpmConfig
	w.policyFor(w.cfg, "")
	w.restart()
	err = w.join(good.TPM, good.Policy)
	wantClass(t, err, failure.State)
	if !strings.Contains(failure.Of(err).Hint, "replicas") {
		t.Error(failure.Of(err).Hint)
	}
}

// A secret that does not fit the storage begins nothing.
func TestAWrongSecretOfAReplicaIsNamed(t *testing.T) {
	w := newReplicaWorld(t)
	empty := w.replica()
	empty.Storage, empty.InitAudit = w.storage("empty"), false
	_, err := w.opened(empty)
	wantClass(t, err, failure.Tampered)
	if !strings.Contains(err.Error(), w.at()) {
		t.Error(err)
	}
	// Records of others, under a secret of their own.
	other := *w.cfg
	other.KMS, other.Storage, other.Audit = "kms://cluster-kms?file="+filepath.Join(w.dir, "other"), w.storage("other"), filepath.Join(w.dir, "other.log")
	must(t, cluster.InitMasterSecret(filepath.Join(w.dir, "other")))
	server, err := NewServer(t.Context(), &other, slog.New(slog.DiscardHandler))
	must(t, err)
	must(t, server.Close())
	wrong := w.replica()
	wrong.Storage, wrong.InitAudit = other.Storage, false
	_, err = w.opened(wrong)
	wantClass(t, err, failure.WrongKey)
	if !strings.Contains(err.Error(), "not that of the storage's records") {
		t.Error(err)
	}
	st, err := setup.Storage(t.Context(), w.storage("empty"))
	must(t, err)
	defer st.Close()
	if names, err := st.List(t.Context(), "", "", 10); err != nil || len(names) != 0 {
		t.Errorf("the empty storage has %q, %v", names, err)
	}
	empty.InitRecords = true // by an operator's word
	server, err = w.opened(empty)
	must(t, err)
	must(t, server.Close())
}

// A sealed replica opens by a peer, in place of its shares; and two that are sealed have nothing
// to give each other.
func TestASealedReplicaOpensByAPeer(t *testing.T) {
	w := newReplicaWorld(t)
	w.provision(w.machine(), "data-1")
	split := &sealedWorld{world: w.world}
	split.divide()
	first, second := w.replica(), w.replica()
	first.KMS, second.KMS = "kms://cluster-kms?sealedFile="+filepath.Join(w.dir, "master.sealed"), "kms://cluster-kms?sealedFile="+filepath.Join(w.dir, "master.sealed")
	first.Listen, second.Listen = freePort(t), freePort(t)
	first.Join, second.Join = []keyclient.ServerConfig{{Address: second.Listen}}, []keyclient.ServerConfig{{Address: first.Listen}}
	first.Metrics = freePort(t)
	servers := make(chan *Server, 2)
	var waiting sync.WaitGroup
	waiting.Add(2)
	for _, cfg := range []*Config{first, second} {
		go func() {
			s, err := OpenSealed(cfg, slog.New(slog.NewTextHandler(w.logged, nil)))
			if err == nil {
				var server *Server
				if server, err = s.Unseal(t.Context(), waiting.Done); err == nil {
					servers <- server
					return
				}
			}
			t.Errorf("%s: %v", cfg.Listen, err)
			servers <- nil
		}()
	}
	waiting.Wait()
	split.cfg = first
	if code, text := split.web("/readyz"); code != 503 || !strings.Contains(text, "sealed: 0 of 3 shares, and no replica gives the master secret") {
		t.Errorf("readyz: %d %s", code, text)
	}
	// Operators open the first, and the second needs none of them.
	for _, i := range []int{1, 2, 3} {
		split.address = first.Listen
		_, err := split.give(i, true)
		must(t, err)
	}
	for range 2 {
		server := <-servers
		if server == nil {
			t.FailNow()
		}
		cfg := map[string]*Config{first.Listen: first, second.Listen: second}[server.Addr().String()]
		one := w.run(server, cfg)
		if _, _, err := one.get(one.machine(), "data-1", openOp); err != nil {
			t.Error(err)
		}
	}
	if n := entries(t, first.Audit, "unseal", "shares 1, 2, 3") + entries(t, second.Audit, "unseal", "the replica "+first.Listen); n != 2 {
		t.Errorf("%d of them say how they were opened", n)
	}
}

// A wrapped secret is unwrapped only if no peer gives it, and one that is at hand asks nobody.
func TestWhoHasTheSecretNeedsNoReplica(t *testing.T) {
	w := newReplicaWorld(t)
	w.provision(w.machine(), "data-1")
	_, want, err := w.get(w.machine(), "data-1", openOp)
	must(t, err)
	master, err := cluster.LoadMasterSecret(filepath.Join(w.dir, "master"))
	must(t, err)
	defer master.Close()
	by := "kms://command?command=printf%200123456789abcdef0123456789abcdef"
	wrapped := filepath.Join(w.dir, "master.wrapped")
	must(t, setup.WrapMaster(t.Context(), master, wrapped, by))
	uri := func(by string) string {
		return "kms://cluster-kms?" + url.Values{"wrappedFile": {wrapped}, "wrappedBy": {by}}.Encode()
	}
	cfg := w.replica()
	cfg.KMS = uri("kms://command?command=false") // which nobody asks
	one := w.joined(cfg)
	if _, got, err := one.get(one.machine(), "data-1", openOp); err != nil || got != want {
		t.Errorf("another key, or %v", err)
	}
	cfg = w.replica()
	cfg.KMS, cfg.Join = uri(by), []keyclient.ServerConfig{{Address: freePort(t)}}
	one = w.joined(cfg)
	if _, got, err := one.get(one.machine(), "data-1", openOp); err != nil || got != want {
		t.Errorf("another key, or %v", err)
	}
	cfg = w.replica()
	cfg.KMS = w.cfg.KMS
	if s, err := OpenSealed(cfg, slog.New(slog.DiscardHandler)); s != nil || err != nil {
		t.Errorf("one that has its secret waits for others: %v", err)
	}
	if n := entries(t, w.cfg.Audit, "replica-join"); n != 1 {
		t.Errorf("%d asked", n)
	}
	for name, change := range map[string]func(*Config){
		"a policy without replicas": func(c *Config) { w.policyFor(c, "") },
	} {
		cfg := w.replica()
		change(cfg)
		_, err := w.opened(cfg)
		wantClass(t, err, failure.Configuration)
		cfg.KMS = w.cfg.KMS
		_, err = NewServer(t.Context(), cfg, slog.New(slog.DiscardHandler))
		wantClass(t, err, failure.Configuration)
		if !strings.Contains(err.Error(), "replicas") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// snapshot is all that the storage has, and goes back to it.
func (w *replicaWorld) snapshot() (back func()) {
	w.t.Helper()
	st, err := setup.Storage(w.t.Context(), w.cfg.Storage)
	must(w.t, err)
	names, err := st.List(w.t.Context(), "", "", 1000)
	must(w.t, err)
	kept := map[string][]byte{}
	for _, name := range names {
		kept[name], _, err = st.Get(w.t.Context(), name)
		must(w.t, err)
	}
	return func() {
		w.t.Helper()
		defer st.Close()
		for name, data := range kept {
			_, version, err := st.Get(w.t.Context(), name)
			must(w.t, err)
			_, err = st.Put(w.t.Context(), name, data, version)
			must(w.t, err)
		}
	}
}

// A storage that goes back under one key service is noticed by another that never served the
// volume; whichever of the two asks the other.
func TestARollbackIsNoticedByAll(t *testing.T) {
	w := newReplicaWorld(t)
	w.provision(w.machine(), "data-1")
	// Two that start at once, and name each other and themselves, ask each other before they serve.
	first, second := w.replica(), w.replica()
	first.Listen, second.Listen = freePort(t), freePort(t)
	for _, cfg := range []*Config{first, second} {
		cfg.Join = []keyclient.ServerConfig{{Address: w.at()}, {Address: first.Listen}, {Address: second.Listen}}
	}
	var wait sync.WaitGroup
	servers := make([]*Server, 2)
	for i, cfg := range []*Config{first, second} {
		wait.Go(func() {
			var err error
			if servers[i], err = w.opened(cfg); err != nil {
				t.Error(err)
			}
		})
	}
	wait.Wait()
	if t.Failed() {
		t.FailNow()
	}
	joined, other := w.run(servers[0], first), w.run(servers[1], second)
	back := w.snapshot()
	_, _, err := w.get(w.another(), "data-1", openOp) // held: writes nothing
	wantClass(t, err, failure.Held)
	_, err = w.server.service.Takeover(t.Context(), "uid:0", "data-1")
	must(t, err)
	_, _, err = joined.get(joined.machine(), "data-1", openOp)
	must(t, err)
	// joined knows more than w now, and tells w; other hears of it from w.
	joined.server.peers.exchange(t.Context(), joined.server.service)
	if w.server.service.volumes.Seen("data-1") != joined.server.service.volumes.Seen("data-1") {
		t.Error("who is asked learned nothing")
	}
	other.server.peers.exchange(t.Context(), other.server.service)
	joined.stop()
	back()
	for name, one := range map[string]*world{"the first": w.world, "one that never served it": other} {
		_, _, err = one.get(one.machine(), "data-1", openOp)
		if err == nil || failure.Of(err).Class != failure.Tampered {
			t.Errorf("%s: %v", name, err)
		}
	}
	// One that starts after it is told before it serves.
	late := w.joined(w.replica())
	_, _, err = late.get(late.machine(), "data-1", openOp)
	wantClass(t, err, failure.Tampered)
	restored, err := late.server.service.Restored(t.Context())
	if err != nil || len(restored) == 0 {
		t.Errorf("an operator sees %v, %v", restored, err)
	}
}

// What was seen of other records, or of those that an operator gave up, counts no more.
func TestWhatWasGivenUpDoesNotComeBack(t *testing.T) {
	w := newReplicaWorld(t)
	w.provision(w.machine(), "data-1")
	for range 3 { // the new record is behind the one that was given up
		_, err := w.server.service.Takeover(t.Context(), "uid:0", "data-1")
		must(t, err)
		_, _, err = w.get(w.machine(), "data-1", openOp)
		must(t, err)
	}
	one := w.joined(w.replica())
	if one.server.service.volumes.Seen("data-1") == 0 {
		t.Fatal("it was told nothing")
	}
	w.stop()
	st, err := setup.Storage(t.Context(), w.cfg.Storage)
	must(t, err)
	names, err := st.List(t.Context(), "", "", 1000)
	must(t, err)
	for _, name := range names {
		_, version, err := st.Get(t.Context(), name)
		must(t, err)
		must(t, st.Delete(t.Context(), name, version))
	}
	must(t, st.Close())
	_, _, err = one.get(one.machine(), "data-1", openOp)
	wantClass(t, err, failure.Tampered)
	before := one.server.service.volumes.Seen("data-1")
	w.cfg.InitRecords, w.cfg.Listen = true, w.at()
	w.start()
	w.cfg.InitRecords = false
	w.provision(w.machine(), "data-1")
	// The one that knows too much asks, and is told that it does not count.
	one.server.peers.exchange(t.Context(), one.server.service)
	for name, service := range map[string]*Service{"who asked": one.server.service, "who was asked": w.server.service} {
		if seen, epoch := service.volumes.Seen("data-1"), service.volumes.Epoch(); seen != w.server.service.volumes.Seen("data-1") || epoch == 0 || epoch != w.server.service.volumes.Epoch() {
			t.Errorf("%s has seen revision %d in epoch %d", name, seen, epoch)
		}
	}
	if now := one.server.service.volumes.Seen("data-1"); now >= before {
		t.Errorf("revision %d was given up, and %d is what it knows", before, now)
	}
	_, _, err = one.get(one.machine(), "data-1", openOp)
	must(t, err)
	if n := entries(t, one.cfg.Audit, "init-records", "by the word of a replica", fmt.Sprintf(`"revision":%d`, w.server.service.volumes.Epoch())); n != 1 {
		t.Errorf("its audit log has it %d times", n)
	}
	// And it is so after a restart, whose first page is of the epoch.
	one.stop()
	one.cfg.InitAudit = false
	again := w.joined(one.cfg)
	if again.server.service.volumes.Epoch() != w.server.service.volumes.Epoch() {
		t.Error("after its restart it does not know of it")
	}
	// Another record MAC key: nothing is believed.
	err = again.server.service.Note(t.Context(), "x", again.server.service.volumes.Epoch(), []volume.Sighting{{Volume: "data-9", Revision: 1}})
	must(t, err)
	s, err := w.ask(again.cfg.TPM, again.cfg.Policy)
	must(t, err)
	wantClass(t, s.Exchange(t.Context(), otherRecords{again.server.service}), failure.State)
	if w.server.service.volumes.Seen("data-9") != 0 {
		t.Error("it was told of other records")
	}
}

// otherRecords are those of another storage.
type otherRecords struct{ *Service }

func (otherRecords) RecordKey() (string, error) { return strings.Repeat("0", 32), nil }

// What a replica says is bounded, however well it proved itself.
func TestAReplicaThatTellsNonsenseIsRefused(t *testing.T) {
	w := newReplicaWorld(t)
	cfg := w.replica()
	conn, err := grpc.NewClient("passthrough:///"+w.at(), grpc.WithTransportCredentials(atls.NewClientCredentials(w.asking(cfg.TPM, cfg.Policy))))
	must(t, err)
	defer conn.Close()
	peer := replicav1.NewReplicaClient(conn)
	many := make([]volume.Sighting, replica.PageSize+1)
	for i := range many {
		many[i] = volume.Sighting{Volume: fmt.Sprintf("data-%d", i), Revision: 1}
	}
	// What this program writes leaves out what its reader refuses.
	if got := string(replica.EncodePage([]volume.Sighting{{Volume: "../data-1", Revision: 1}, {Volume: "data-1"}, {Volume: "data-1", Revision: replica.MaxRevision + 1}})); got != "" {
		t.Errorf("it tells %q", got)
	}
	key, err := w.server.service.RecordKey()
	must(t, err)
	for name, r := range map[string]*replicav1.SeenRequest{
		"no volume":     {Page: []byte("../data-1 1\n")},
		"no revision":   {Page: []byte("data-1 0\n")},
		"one too large": {Page: fmt.Appendf(nil, "data-1 %d\n", uint64(replica.MaxRevision+1))},
		"too many":      {Page: replica.EncodePage(many)},
		"the far end":   {Epoch: replica.MaxEpoch + 1},
	} {
		r.RecordKey = key
		_, err := peer.Seen(t.Context(), r)
		if err = failure.FromStatus(err); failure.Of(err).Class != failure.Usage {
			t.Errorf("%s: %v", name, err)
		}
	}
	if n := entries(t, w.cfg.Audit, "replica-seen", `"refused"`); n != 5 {
		t.Errorf("the audit log has %d of 5", n)
	}
	if len(w.server.service.volumes.Volumes()) != 0 || w.server.service.volumes.Epoch() != 0 {
		t.Error("it was believed")
	}
}

// With an external KMS there is nothing to give, and what was seen is exchanged all the same.
func TestAnExternalKMSHasNothingToGive(t *testing.T) {
	w := newReplicaWorld(t)
	w.stop()
	w.cfg.KMS = "kms://command?command=printf%200123456789abcdef0123456789abcdef"
	w.cfg.Storage, w.cfg.Audit = w.storage("external"), filepath.Join(w.dir, "external.log")
	w.start()
	w.provision(w.machine(), "data-1")
	cfg := w.replica()
	cfg.KMS = w.cfg.KMS
	if s, err := OpenSealed(cfg, slog.New(slog.DiscardHandler)); s != nil || err != nil {
		t.Fatalf("it waits for what nobody has: %v", err)
	}
	server, err := NewServer(t.Context(), cfg, slog.New(slog.DiscardHandler))
	must(t, err)
	other := w.run(server, cfg)
	if other.server.service.volumes.Seen("data-1") == 0 {
		t.Error("it was told nothing")
	}
	wantClass(t, w.join(cfg.TPM, cfg.Policy), failure.State)
	if n := entries(t, w.cfg.Audit, "replica-join", `"refused"`); n != 1 {
		t.Errorf("the audit log has it %d times", n)
	}
}

// A peer has this service's own certificate, unless the configuration says who signed it.
func TestWhoseCertificateAPeerHas(t *testing.T) {
	w := newReplicaWorld(t)
	cfg := w.replica()
	dir := filepath.Dir(cfg.Audit)
	authority := pki.New(t)
	cert, err := authority.Server("127.0.0.1")
	must(t, err)
	must(t, authority.Write(dir, cert))
	cfg.TLS = TLSConfig{filepath.Join(dir, "server.pem"), filepath.Join(dir, "server.key")}
	_, err = w.once(cfg)
	if err == nil || !strings.Contains(w.logged.String(), `class="server not trusted"`) {
		t.Fatalf("another certificate: %v", err)
	}
	doc, err := config.Decode("serve.yaml", []byte("join: []"), &struct {
		Join []keyclient.ServerConfig `yaml:"join"`
	}{})
	must(t, err)
	for ca, good := range map[string]bool{"ca.pem": false, filepath.Join(w.dir, "ca.pem"): true} {
		cfg.Join = []keyclient.ServerConfig{{Address: w.at(), CA: ca}}
		must(t, cfg.Join[0].Check(doc, dir, "join", 0))
		if !good {
			if _, err := w.once(cfg); err == nil {
				t.Error("by another authority it is trusted")
			}
			continue
		}
		server, err := w.opened(cfg)
		must(t, err)
		must(t, server.Close())
	}
	for name, bad := range map[string]keyclient.ServerConfig{
		"no port": {Address: "keys-1"}, "no CA there": {Address: w.at(), CA: "none.pem"}, "a key as a CA": {Address: w.at(), CA: "server.key"}, "a short pin": {Address: w.at(), Pins: []string{"sha256:00"}},
	} {
		if err := bad.Check(doc, dir, "join", 0); err == nil || !strings.Contains(err.Error(), "join[0]") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A peer that hangs or talks nonsense costs its time, and the next one is asked.
func TestAPeerThatHangsIsLeft(t *testing.T) {
	w := newReplicaWorld(t)
	for name, act := range map[string]func(net.Conn){
		"closes at once": func(c net.Conn) { c.Close() },
		"is no TLS":      func(c net.Conn) { _, _ = c.Write([]byte("HTTP/1.1 400 Bad Request\r\n\r\n")) },
	} {
		t.Run(name, func(t *testing.T) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			must(t, err)
			defer l.Close()
			go func() {
				for {
					c, err := l.Accept()
					if err != nil {
						return
					}
					act(c)
				}
			}()
			cfg := w.replica()
			cfg.Join = []keyclient.ServerConfig{{Address: l.Addr().String()}, {Address: w.at()}}
			w.joined(cfg)
		})
	}
	// One that accepts and says nothing is bounded by time alone.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer l.Close()
	cfg := w.replica()
	source, err := policysource.New(cfg.Policy, slog.New(slog.DiscardHandler))
	must(t, err)
	server, err := w.opened(w.replica())
	must(t, err)
	defer server.Close()
	p := server.peers
	p.policy, p.all = source, []*endpoint{{Server: keyclient.Server{Address: l.Addr().String()}}}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if master, _ := p.ask(ctx); master != nil || !errors.Is(ctx.Err(), context.DeadlineExceeded) {
		t.Error("it did not end with its time")
	}
}

// An attacker who writes the disk of one replica cannot make the others forget what they have
// seen: an entry of its audit log that no key service wrote counts nowhere.
func TestAnEpochThatNobodyBeganIsNotTold(t *testing.T) {
	w := newReplicaWorld(t)
	w.provision(w.machine(), "data-1")
	one := w.joined(w.replica())
	for name, mac := range map[string]string{"without a MAC": "", "with another": strings.Repeat("ab", 32)} {
		one.stop()
		log, err := audit.Open(one.cfg.Audit, time.Now, nil)
		must(t, err)
		must(t, log.Append(audit.Entry{Event: initRecords, Revision: uint64(time.Now().Unix()), Result: "allowed", MAC: mac}))
		must(t, log.Close())
		one.cfg.InitAudit = false
		one = w.joined(one.cfg)
		one.server.peers.exchange(t.Context(), one.server.service)
		if w.server.service.volumes.Epoch() != 0 || w.server.service.volumes.Seen("data-1") == 0 {
			t.Errorf("%s: the other one has forgotten", name)
		}
		if one.server.service.volumes.Seen("data-1") == 0 {
			t.Errorf("%s: it was not told again", name)
		}
	}
}

// A replica that an operator revoked by name is no longer believed, whichever side dials.
func TestARevokedReplicaIsNotBelieved(t *testing.T) {
	w := newReplicaWorld(t)
	one := w.joined(w.replica())
	with := one.server.peers.all[0]
	must(t, one.server.peers.tryExchange(t.Context(), with, one.server.service))
	peer, err := with.session.Peer()
	must(t, err)
	_, err = one.server.service.Revoke(t.Context(), "uid:0", revocation.Subject{Kind: revocation.Node, Name: peer.Identity()}, "broken into", false)
	must(t, err)
	wantClass(t, one.server.peers.tryExchange(t.Context(), with, one.server.service), failure.Revoked)
}
