package replicas

import (
	"context"
	"crypto/sha256"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-sev-guest/abi"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/endorsement"
	"github.com/keyagent/keyagent/attestation/snp"
	"github.com/keyagent/keyagent/internal/keyclient"
	"github.com/keyagent/keyagent/internal/lab/pki"
	"github.com/keyagent/keyagent/test/sim/amd"
	"github.com/keyagent/keyagent/test/sim/cluster"
	"github.com/keyagent/keyagent/test/sim/intel"
	"github.com/keyagent/keyagent/test/sim/swtpm"
)

func must[T any](t testing.TB) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// program is the keyagent under test, built as it is released.
var program = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "keyagent-replicas-")
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "keyagent")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", path, "./cmd/keyagent")
	cmd.Dir = "../../.."
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	return path, nil
})

// world is a storage, the key services over it, and who makes the processors of the nodes.
type world struct {
	t         *testing.T
	dir       string
	program   string
	storage   string
	env       []string
	pki       *pki.Authority
	authority *amd.Authority
	lists     endorsement.Source // of revoked certificates, which evidence brings along
	maker     *swtpm.Authority   // of the TPMs by which key services prove themselves to each other
	replicas  []*replica
}

// replica is keyagent serve, which can be killed and started again.
type replica struct {
	w       *world
	dir     string
	address string
	metrics string
	p       *cluster.Process
}

func newWorld(t *testing.T, storage string) *world {
	t.Helper()
	w := &world{t: t, dir: t.TempDir(), storage: storage, pki: pki.New(t), program: must[string](t)(program()),
		authority: must[*amd.Authority](t)(amd.New(amd.Options{Product: "Genoa"}))}
	kds := httptest.NewServer(amd.NewKDS(must[*amd.Chip](t)(w.authority.Chip(amd.ChipOptions{}))))
	t.Cleanup(kds.Close)
	lists := must[*endorsement.Cache](t)(endorsement.NewCache(endorsement.CacheOptions{Source: must[*endorsement.HTTP](t)(amd.Source(kds.URL))}))
	t.Cleanup(func() { _ = lists.Close() })
	w.lists = lists
	w.maker = must[*swtpm.Authority](t)(swtpm.NewAuthority(t.TempDir()))
	w.write("amd.pem", string(intel.PEM(w.authority.ARK, w.authority.ASK)))
	return w
}

// writePolicy comes after the first TPM was made, and its maker's certificate with it.
func (w *world) writePolicy() {
	w.t.Helper()
	w.write("policy.yaml", `version: 1
lifetime: 1h
trust:
  snp: {roots: [{name: amd, product: Genoa, file: amd.pem}]}
  tpm: {roots: [{name: lab, file: `+w.maker.IssuerPath()+`}]}
profiles:
  - name: service
    tpm:
      trust: ["root:lab"]
      bank: sha256
      event_log: optional
      # One extension by zeros.
      pcrs: [{pcr: 4, accept: ["f5a5fd42d16a20302798ef6ed309979b43003d2320d9f0e8ea9831a92759fb4b"]}]
  - name: guest
    snp:
      trust: ["root:amd"]
      products: [Genoa]
      signers: [vcek]
      measurement: {accept: ["`+fmt.Sprintf("a1%094d", 0)+`"]}
      min_tcb: {bootloader: 4, tee: 1, snp: 24, microcode: 219}
      any_chip: true
      allow: [smt, multi-socket, alias-check-incomplete, visible-ciphertext, rapl]
grants:
  - {name: own, profiles: [guest], volumes: ["own-*"], operations: [open, format], lease: 30s}
  - {name: shared, profiles: [guest], volumes: ["shared-*"], operations: [open, format], writers: many}
replicas: {profiles: [service]}
`)
}

func (w *world) write(name, text string) {
	w.t.Helper()
	if err := os.WriteFile(filepath.Join(w.dir, name), []byte(text), 0o600); err != nil {
		w.t.Fatal(err)
	}
}

// addReplicas makes key services over the storage, each with an audit log of its own. The
// last one has no master secret: the others give it, each time that it starts.
func (w *world) addReplicas(n int) {
	w.t.Helper()
	for i := range n {
		w.replicas = append(w.replicas, &replica{w: w, dir: filepath.Join(w.dir, fmt.Sprint("replica-", i)), address: freeAddress(w.t), metrics: freeAddress(w.t)})
	}
	for i, r := range w.replicas {
		tpm := swtpm.New(w.t, w.maker)
		if err := swtpm.Extend(tpm.Device, 4, make([]byte, 32)); err != nil {
			w.t.Fatal(err)
		}
		if i == 0 {
			w.writePolicy()
		}
		w.configure(r, tpm, i == n-1)
	}
	for i, r := range w.replicas {
		r.start(map[bool]string{true: "--init-master-secret", false: "--init-audit"}[i == 0])
	}
}

func (w *world) configure(r *replica, tpm *swtpm.TPM, joined bool) {
	w.t.Helper()
	if err := os.Mkdir(r.dir, 0o700); err != nil {
		w.t.Fatal(err)
	}
	cert, err := w.pki.Server("127.0.0.1")
	if err == nil {
		err = w.pki.Write(r.dir, cert)
	}
	if err != nil {
		w.t.Fatal(err)
	}
	kms := "file=" + filepath.Join(w.dir, "master")
	if joined {
		kms = "joined=true"
	}
	var join []string
	for _, other := range w.replicas {
		if other != r {
			join = append(join, fmt.Sprintf("{address: %q, ca: ca.pem}", other.address))
		}
	}
	w.write(filepath.Join(filepath.Base(r.dir), "serve.yaml"), fmt.Sprintf(`listen: %s
tls: {certificate: server.pem, key: server.key}
policy: ../policy.yaml
kms: kms://cluster-kms?%s
storage: %s
audit: audit.log
metrics: %s
tpm: {device: %q, event_log: /nonexistent}
join: [%s]
`, r.address, kms, w.storage, r.metrics, tpm.Device, strings.Join(join, ", ")))
}

func freeAddress(t testing.TB) string {
	t.Helper()
	l := must[net.Listener](t)(net.Listen("tcp", "127.0.0.1:0"))
	defer l.Close()
	return l.Addr().String()
}

// start returns when the replica is ready, which it may have to be started for several times:
// the storage is being killed as well.
func (r *replica) start(more ...string) {
	t := r.w.t
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); ; {
		r.p = cluster.Start(t, r.dir, "/usr/bin/env", append(append(append([]string{}, r.w.env...), r.w.program, "serve", "--config", "serve.yaml"), more...)...)
		for !r.p.Ended() {
			if resp, err := http.Get("http://" + r.metrics + "/readyz"); err == nil {
				resp.Body.Close()
				if resp.StatusCode == http.StatusOK {
					return
				}
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s is not ready: %s", r.dir, r.p.Log.Tail())
			}
			time.Sleep(20 * time.Millisecond) // of a process that starts
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s ended: %s", r.dir, r.p.Log.Tail())
		}
	}
}

// Kill ends it at once, with what it has under way.
func (r *replica) Kill() { r.p.Kill() }

// node is a confidential VM on a processor of its own. It asks any of the replicas.
type node struct {
	name   string
	client *keyclient.Client
	// lease of its own volume. A chip does not name a machine: who forgets its lease has to wait
	// until that ends.
	lease []byte
}

func (w *world) node(n int) *node {
	w.t.Helper()
	chip := must[*amd.Chip](w.t)(w.authority.Chip(amd.ChipOptions{}))
	guest := &amd.Guest{Chip: chip, Table: chip.Table(), Report: amd.Report{
		Measurement: [48]byte{0xA1}, Policy: abi.SnpPolicy{ABIMajor: 1, SMT: true, SingleSocket: true}}}
	issuer := must[*snp.Issuer](w.t)(snp.NewIssuer(snp.IssuerOptions{TSM: guest.TSM(), Endorsements: w.lists}))
	var servers []keyclient.Server
	for i := range w.replicas {
		// Each begins with another one.
		r := w.replicas[(n+i)%len(w.replicas)]
		servers = append(servers, keyclient.Server{Address: r.address, Name: "127.0.0.1", Roots: w.pki.Pool()})
	}
	c := must[*keyclient.Client](w.t)(keyclient.New(keyclient.Options{
		Servers: servers, Log: slog.New(slog.DiscardHandler), Node: fmt.Sprint("node-", n),
		Issuers: func(context.Context) ([]attestation.Issuer, error) { return []attestation.Issuer{issuer}, nil },
	}))
	w.t.Cleanup(func() { c.Close() })
	return &node{name: fmt.Sprint("node-", n), client: c}
}

// digest names a key without keeping it.
func digest(k *keyclient.Key) (sum [sha256.Size]byte) {
	_ = k.DEK.Use(func(b []byte) error { sum = sha256.Sum256(b); return nil })
	return sum
}
