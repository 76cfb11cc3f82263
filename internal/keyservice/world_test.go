package keyservice

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/peer"

	keyservicev1 "github.com/keyagent/keyagent/api/keyagent/keyservice/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/atls"
	"github.com/keyagent/keyagent/attestation/tpm"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/lab/pki"
	"github.com/keyagent/keyagent/internal/proof"
	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/kms/cluster"
	"github.com/keyagent/keyagent/test/sim/swtpm"
)

const (
	formatOp = keyservicev1.Operation_OPERATION_FORMAT
	openOp   = keyservicev1.Operation_OPERATION_OPEN
)

// world is a key service on loopback and a machine with a TPM.
type world struct {
	t      testing.TB
	dir    string
	tpm    *swtpm.TPM
	pki    *pki.Authority
	cfg    *Config
	logged *syncBuffer
	issuer *tpm.Issuer
	// address of the service, if it is a process of its own.
	address string
	// writers is more of the grant, for the next policy that is written.
	writers string
	server  *Server
	stop    func()
}

// syncBuffer is a log that tests read while it is written.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

func newWorld(t testing.TB) *world {
	t.Helper()
	w := &world{t: t, dir: t.TempDir(), tpm: swtpm.New(t, nil), pki: pki.New(t), logged: &syncBuffer{}}
	cert, err := w.pki.Server("127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	if err := w.pki.Write(w.dir, cert); err != nil {
		t.Fatal(err)
	}
	if w.issuer, err = tpm.NewIssuer(tpm.IssuerOptions{Device: w.tpm.Device, EventLog: "/nonexistent"}); err != nil {
		t.Fatal(err)
	}
	w.extend(4)
	w.writePolicy(w.pcr(4), `["data-*"]`, "[open, format]")
	if err := cluster.InitMasterSecret(filepath.Join(w.dir, "master")); err != nil {
		t.Fatal(err)
	}
	w.cfg = &Config{
		Listen: "127.0.0.1:0", Policy: filepath.Join(w.dir, "policy.yaml"),
		TLS:     TLSConfig{filepath.Join(w.dir, "server.pem"), filepath.Join(w.dir, "server.key")},
		KMS:     "kms://cluster-kms?file=" + filepath.Join(w.dir, "master"),
		Storage: "storage://file?dir=" + filepath.Join(w.dir, "records"),
		Audit:   filepath.Join(w.dir, "audit.log"), MaxUnattested: 64,
	}
	w.start()
	t.Cleanup(func() { w.stop() })
	return w
}

func (w *world) start() {
	w.t.Helper()
	log := slog.New(slog.NewTextHandler(w.logged, nil))
	server, err := NewServer(context.Background(), w.cfg, log)
	if err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- server.Run(ctx) }()
	w.server = server
	w.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			w.t.Errorf("server: %v", err)
		}
	})
}

func (w *world) restart() {
	w.t.Helper()
	w.stop()
	w.start()
}

func (w *world) writePolicy(pcr4, volumes, ops string) {
	w.t.Helper()
	text := fmt.Sprintf(`version: 1
lifetime: 1h
trust:
  tpm:
    roots: [{name: lab, file: %s}]
profiles:
  - name: guest
    tpm:
      trust: ["root:lab"]
      bank: sha256
      event_log: optional
      pcrs: [{pcr: 4, accept: ["%s"]}]
grants:
  - {name: data, profiles: [guest], volumes: %s, operations: %s%s}
`, w.tpm.Authority.IssuerPath(), pcr4, volumes, ops, w.writers)
	if err := os.WriteFile(filepath.Join(w.dir, "policy.yaml"), []byte(text), 0o644); err != nil {
		w.t.Fatal(err)
	}
}

// extend measures something into a PCR, as a boot would.
func (w *world) extend(pcr uint32) {
	w.t.Helper()
	dev, err := tpm.OpenDevice(w.tpm.Device)
	if err != nil {
		w.t.Fatal(err)
	}
	defer dev.Close()
	if _, err := (tpm2.PCRExtend{
		PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(pcr), Auth: tpm2.PasswordAuth(nil)},
		Digests:   tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: make([]byte, 32)}}},
	}).Execute(dev); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) pcr(n uint) string {
	w.t.Helper()
	dev, err := tpm.OpenDevice(w.tpm.Device)
	if err != nil {
		w.t.Fatal(err)
	}
	defer dev.Close()
	rsp, err := tpm2.PCRRead{PCRSelectionIn: tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{
		Hash: tpm2.TPMAlgSHA256, PCRSelect: tpm2.PCClientCompatible.PCRs(n)}}}}.Execute(dev)
	if err != nil {
		w.t.Fatal(err)
	}
	return hex.EncodeToString(rsp.PCRValues.Digests[0].Buffer)
}

// machine is a client with this world's TPM.
func (w *world) machine() keyservicev1.KeyServiceClient {
	w.t.Helper()
	return w.machineWith(w.issuer)
}

// another is a machine with a TPM of its own, which fits the policy as well.
func (w *world) another() keyservicev1.KeyServiceClient {
	w.t.Helper()
	other := world{t: w.t, tpm: swtpm.New(w.t, w.tpm.Authority)}
	other.extend(4)
	issuer, err := tpm.NewIssuer(tpm.IssuerOptions{Device: other.tpm.Device, EventLog: "/nonexistent"})
	if err != nil {
		w.t.Fatal(err)
	}
	return w.machineWith(issuer)
}

func (w *world) machineWith(issuer attestation.Issuer) keyservicev1.KeyServiceClient {
	w.t.Helper()
	id, err := atls.NewIdentity()
	if err != nil {
		w.t.Fatal(err)
	}
	conn, err := grpc.NewClient("passthrough:///"+w.at(),
		grpc.WithTransportCredentials(atls.NewClientCredentials(&atls.ClientConfig{
			ServerName: "127.0.0.1", RootCAs: w.pki.Pool(), Identity: id, Issuers: []attestation.Issuer{issuer},
		})))
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { conn.Close() })
	return keyservicev1.NewKeyServiceClient(conn)
}

// at is where the service listens.
func (w *world) at() string {
	if w.address != "" {
		return w.address
	}
	return w.server.Addr().String()
}

// get returns the opened DEK of a volume.
func (w *world) get(m keyservicev1.KeyServiceClient, volume string, op keyservicev1.Operation) (*keyservicev1.GetKeyResponse, string, error) {
	return w.getIn(w.t.Context(), m, volume, op)
}

func (w *world) getIn(ctx context.Context, m keyservicev1.KeyServiceClient, volume string, op keyservicev1.Operation) (*keyservicev1.GetKeyResponse, string, error) {
	var p peer.Peer
	req := &keyservicev1.GetKeyRequest{VolumeId: volume, Operation: op, Protocol: keyservicev1.Protocol, Node: "node-1"}
	resp, err := m.GetKey(ctx, req, grpc.Peer(&p))
	if err != nil {
		return nil, "", failure.FromStatus(err)
	}
	dek, err := openedBy(w.t, &p, req, resp)
	if err != nil {
		return resp, "", err
	}
	defer dek.Close()
	text := ""
	_ = dek.Use(func(b []byte) error { text = hex.EncodeToString(b); return nil })
	return resp, text, nil
}

func openedBy(t testing.TB, p *peer.Peer, req *keyservicev1.GetKeyRequest, resp *keyservicev1.GetKeyResponse) (*secret.Bytes, error) {
	t.Helper()
	ch, ok := atls.FromPeer(p)
	if !ok {
		t.Fatal("the channel is not attested")
	}
	return ch.Open(keyservicev1.SealInfo(req.GetVolumeId(), req.GetOperation(), resp), resp.GetSealedDek())
}

// node is a machine that creates a volume.
type node struct {
	t       testing.TB
	m       keyservicev1.KeyServiceClient
	name    string
	volume  string
	key     *keyservicev1.GetKeyResponse
	dek     *secret.Bytes
	binder  []byte
	attempt []byte
	mac     []byte
	copies  [][]byte
}

// creates gets the key of a volume that is to be created.
func (w *world) creates(m keyservicev1.KeyServiceClient, name, volume string) (*node, error) {
	w.t.Helper()
	var p peer.Peer
	req := &keyservicev1.GetKeyRequest{VolumeId: volume, Operation: formatOp, Protocol: keyservicev1.Protocol, Node: name}
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
	id := make([]byte, proof.AttemptSize)
	rand.Read(id)
	return &node{w.t, m, name, volume, resp, dek, binder[:], id, testMAC, [][]byte{bytesOf(8, 32), bytesOf(9, 32)}}, nil
}

func bytesOf(b byte, n int) []byte { return bytes.Repeat([]byte{b}, n) }

func (n *node) proof(step string) []byte {
	n.t.Helper()
	p, err := proof.Of(n.dek, proof.Input{Volume: n.volume, Generation: n.key.GetGeneration(), Binder: n.binder, Step: step,
		Attempt: n.attempt, HeaderMAC: n.mac, CopyMACs: n.copies})
	if err != nil {
		n.t.Fatal(err)
	}
	return p[:]
}

func (n *node) beginning() *keyservicev1.BeginFormatRequest {
	return &keyservicev1.BeginFormatRequest{VolumeId: n.volume, Generation: n.key.GetGeneration(), KeyVersion: n.key.GetKeyVersion(),
		Attempt: n.attempt, HeaderMac: n.mac, CopyMacs: n.copies, Proof: n.proof(proof.Begin), Node: n.name}
}

func (n *node) begin() error {
	_, err := n.m.BeginFormat(n.t.Context(), n.beginning())
	return failure.FromStatus(err)
}

func (n *node) stands() (*keyservicev1.HeaderStandsResponse, error) {
	resp, err := n.m.HeaderStands(n.t.Context(), &keyservicev1.HeaderStandsRequest{VolumeId: n.volume, Attempt: n.attempt, Proof: n.proof(proof.Stands)})
	return resp, failure.FromStatus(err)
}

func (n *node) confirming() *keyservicev1.ConfirmVolumeRequest {
	return &keyservicev1.ConfirmVolumeRequest{VolumeId: n.volume, Generation: n.key.GetGeneration(), KeyVersion: n.key.GetKeyVersion(), HeaderMac: n.mac, Attempt: n.attempt}
}

func (n *node) confirm() error {
	_, err := n.m.ConfirmVolume(n.t.Context(), n.confirming())
	return failure.FromStatus(err)
}

// provision makes a volume active, as a node does.
func (w *world) provision(m keyservicev1.KeyServiceClient, volume string) (*node, *keyservicev1.Lease) {
	w.t.Helper()
	n, err := w.creates(m, "node-1", volume)
	if err != nil {
		w.t.Fatal(err)
	}
	if err := n.begin(); err != nil {
		w.t.Fatal(err)
	}
	stands, err := n.stands()
	if err != nil {
		w.t.Fatal(err)
	}
	if err := n.confirm(); err != nil {
		w.t.Fatal(err)
	}
	return n, stands.GetLease()
}

func wantErr(t testing.TB, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("got %v, want %v", err, want)
	}
}

func wantClass(t testing.TB, err error, class failure.Class) {
	t.Helper()
	if err == nil || failure.Of(err).Class != class {
		t.Fatalf("got %q (%v), want %q", failure.Of(err).Class, err, class)
	}
}

var testMAC = bytes.Repeat([]byte{7}, 32)
