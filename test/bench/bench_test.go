package bench

import (
	"context"
	"crypto/hkdf"
	"crypto/sha256"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	keyservicev1 "github.com/keyagent/keyagent/api/keyagent/keyservice/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/atls"
	"github.com/keyagent/keyagent/attestation/tpm"
	"github.com/keyagent/keyagent/internal/lab/pki"
	"github.com/keyagent/keyagent/kms/cluster"
	"github.com/keyagent/keyagent/test/sim/swtpm"
)

// scene is a key service's folder and a machine with a TPM.
type scene struct {
	dir    string
	pki    *pki.Authority
	issuer *tpm.Issuer
	cert   tls.Certificate
}

func newScene(b *testing.B, ek tpm.EKType, dir string) *scene {
	b.Helper()
	s := &scene{dir: dir, pki: pki.New(b)}
	machine := swtpm.New(b, nil)
	var err error
	if s.cert, err = s.pki.Server("127.0.0.1"); err != nil {
		b.Fatal(err)
	}
	if err := s.pki.Write(s.dir, s.cert); err != nil {
		b.Fatal(err)
	}
	dev, err := tpm.OpenDevice(machine.Device)
	if err != nil {
		b.Fatal(err)
	}
	_, err = tpm2.PCRExtend{
		PCRHandle: tpm2.AuthHandle{Handle: 4, Auth: tpm2.PasswordAuth(nil)},
		Digests:   tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: make([]byte, 32)}}},
	}.Execute(dev)
	dev.Close()
	if err != nil {
		b.Fatal(err)
	}
	if s.issuer, err = tpm.NewIssuer(tpm.IssuerOptions{Device: machine.Device, EK: ek, EventLog: "/nonexistent"}); err != nil {
		b.Fatal(err)
	}
	if err := cluster.InitMasterSecret(filepath.Join(s.dir, "master")); err != nil {
		b.Fatal(err)
	}
	for name, text := range map[string]string{
		"serve.yaml": `listen: 127.0.0.1:0
tls: {certificate: server.pem, key: server.key}
policy: policy.yaml
kms: kms://cluster-kms?file=master
storage: storage://file?dir=records
audit: audit.log
`,
		"policy.yaml": fmt.Sprintf(`version: 1
lifetime: 1h
trust:
  tpm:
    roots: [{name: lab, file: %s}]
profiles:
  - name: guest
    tpm: {trust: ["root:lab"], bank: sha256, event_log: optional, pcrs: [{pcr: 4, accept: ["%x"]}]}
grants:
  - {name: data, profiles: [guest], volumes: ["data"], operations: [open, format]}
`, machine.Authority.IssuerPath(), tpm.Extend(make([]byte, 32), make([]byte, 32))),
	} {
		if err := os.WriteFile(filepath.Join(s.dir, name), []byte(text), 0o600); err != nil {
			b.Fatal(err)
		}
	}
	return s
}

// connect attests to the key service.
func (s *scene) connect(b *testing.B, addr string) (*atls.Channel, *grpc.ClientConn) {
	b.Helper()
	id, err := atls.NewIdentity()
	if err != nil {
		b.Fatal(err)
	}
	raw, err := net.Dial("tcp", addr)
	if err != nil {
		b.Fatal(err)
	}
	conn, err := atls.Client(context.Background(), raw, &atls.ClientConfig{
		ServerName: "127.0.0.1", RootCAs: s.pki.Pool(), Identity: id, Issuers: []attestation.Issuer{s.issuer},
	})
	if err != nil {
		b.Fatal(err)
	}
	c, err := atls.NewGRPC(conn)
	if err != nil {
		b.Fatal(err)
	}
	return conn.Channel(), c
}

func getKey(b *testing.B, ch *atls.Channel, c *grpc.ClientConn) {
	b.Helper()
	op := keyservicev1.Operation_OPERATION_FORMAT
	resp, err := keyservicev1.NewKeyServiceClient(c).GetKey(context.Background(), &keyservicev1.GetKeyRequest{VolumeId: "data", Operation: op})
	if err != nil {
		b.Fatal(err)
	}
	dek, err := ch.Open(keyservicev1.SealInfo("data", op, resp), resp.GetSealedDek())
	if err != nil {
		b.Fatal(err)
	}
	dek.Close()
}

// BenchmarkAttestedDelivery compares the server's processor time for one
// attested delivery, from the TCP connection to the sealed key, with that of
// the same TLS handshake and one bare signature verification.
func BenchmarkAttestedDelivery(b *testing.B) {
	for _, ek := range []tpm.EKType{tpm.EKRSA2048, tpm.EKP384} {
		b.Run("ek="+string(ek), func(b *testing.B) {
			s := newScene(b, ek, b.TempDir())
			ours, bare := startServer(b, "keyagent", s.dir), startServer(b, "tls", s.dir)
			var spentOurs, spentBare time.Duration
			n := 0
			// Turn by turn, so that both meet the same noise.
			for b.Loop() {
				before := ours.cpu(b)
				ch, c := s.connect(b, ours.addr)
				getKey(b, ch, c)
				c.Close()
				spentOurs += ours.cpu(b) - before
				before = bare.cpu(b)
				if err := dialBare(bare.addr, s.pki.Pool(), s.cert); err != nil {
					b.Fatal(err)
				}
				spentBare += bare.cpu(b) - before
				n++
			}
			b.ReportMetric(float64(spentOurs.Microseconds())/float64(n), "server-µs/op")
			b.ReportMetric(float64(spentBare.Microseconds())/float64(n), "bare-µs/op")
			b.ReportMetric(float64(spentOurs)/float64(spentBare), "ratio")
		})
	}
}

// minimal is the least that a key server does: gRPC over TLS, one HKDF.
type minimal struct {
	keyservicev1.UnimplementedKeyServiceServer
	master []byte
}

func (m *minimal) GetKey(_ context.Context, r *keyservicev1.GetKeyRequest) (*keyservicev1.GetKeyResponse, error) {
	key, err := hkdf.Key(sha256.New, m.master, nil, r.GetVolumeId(), 32)
	return &keyservicev1.GetKeyResponse{SealedDek: key}, err
}

// BenchmarkGetKey compares GetKey on an open channel with a minimal gRPC server
// over TLS that derives a key by HKDF. Ours also checks the policy, reads and
// authenticates the record, seals the key by HPKE, and has an audit entry on
// the disk before it answers.
func BenchmarkGetKey(b *testing.B) {
	b.Run("audit=disk", func(b *testing.B) { getKeys(b, b.TempDir()) })
	b.Run("audit=memory", func(b *testing.B) {
		dir, err := os.MkdirTemp("/dev/shm", "keyagent-bench")
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { os.RemoveAll(dir) })
		getKeys(b, dir)
	})
}

func getKeys(b *testing.B, dir string) {
	s := newScene(b, tpm.EKRSA2048, dir)
	ours := startServer(b, "keyagent", s.dir)
	ch, c := s.connect(b, ours.addr)
	defer c.Close()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	server := grpc.NewServer(grpc.Creds(credentials.NewServerTLSFromCert(&s.cert)))
	keyservicev1.RegisterKeyServiceServer(server, &minimal{master: make([]byte, 32)})
	go server.Serve(l)
	defer server.Stop()
	bare, err := grpc.NewClient("passthrough:///"+l.Addr().String(),
		grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{RootCAs: s.pki.Pool(), ServerName: "127.0.0.1"})))
	if err != nil {
		b.Fatal(err)
	}
	defer bare.Close()
	var spentOurs, spentBare time.Duration
	n := 0
	for b.Loop() {
		started := time.Now()
		getKey(b, ch, c)
		spentOurs += time.Since(started)
		started = time.Now()
		if _, err := keyservicev1.NewKeyServiceClient(bare).GetKey(context.Background(), &keyservicev1.GetKeyRequest{VolumeId: "data"}); err != nil {
			b.Fatal(err)
		}
		spentBare += time.Since(started)
		n++
	}
	b.ReportMetric(float64(spentOurs.Microseconds())/float64(n), "µs/op")
	b.ReportMetric(float64(spentBare.Microseconds())/float64(n), "bare-µs/op")
	b.ReportMetric(float64(spentOurs)/float64(spentBare), "ratio")
}

// BenchmarkLeftOut builds the program without what a build tag leaves
// out: what that adds to its size and to its start.
func BenchmarkLeftOut(b *testing.B) {
	all := []string{"keyagent_noaws", "keyagent_noazure", "keyagent_nogcp", "keyagent_noetcd"}
	for name, tags := range map[string][]string{
		"nothing": nil, "AWS": all[:1], "Azure": all[1:2], "Google": all[2:3], "etcd": all[3:], "Google and etcd": all[2:], "all": all,
		"key service": {"keyagent_node"},
	} {
		b.Run(name, func(b *testing.B) {
			path := filepath.Join(b.TempDir(), "keyagent")
			build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-tags", "grpcnotrace,"+strings.Join(tags, ","), "-o", path, "../../cmd/keyagent")
			if out, err := build.CombinedOutput(); err != nil {
				b.Fatalf("%v: %s", err, out)
			}
			st, err := os.Stat(path)
			if err != nil {
				b.Fatal(err)
			}
			for b.Loop() {
				if err := exec.Command(path, "version").Run(); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(st.Size())/1e6, "binary-MB")
		})
	}
}

// BenchmarkBinary reports the size of the binary, its cold start, and the
// resident memory of a service that is ready.
func BenchmarkBinary(b *testing.B) {
	path := filepath.Join(b.TempDir(), "keyagent")
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", path, "../../cmd/keyagent")
	if out, err := build.CombinedOutput(); err != nil {
		b.Fatalf("%v: %s", err, out)
	}
	st, err := os.Stat(path)
	if err != nil {
		b.Fatal(err)
	}
	s := newScene(b, tpm.EKRSA2048, b.TempDir())
	waiting := fmt.Sprintf(`servers: [{address: "127.0.0.1:1", ca: ca.pem}]
socket: %s/agent.sock
callers: [{uid: 0, operations: [list], volumes: ["*"]}]
volumes: [{id: data, device: /dev/null}]
`, s.dir)
	if err := os.WriteFile(filepath.Join(s.dir, "agent.yaml"), []byte(waiting), 0o600); err != nil {
		b.Fatal(err)
	}
	serveRSS := resident(b, s.dir, "serving", path, "serve", "--config", "serve.yaml")
	agentRSS := resident(b, s.dir, "trying again", path, "agent", "--config", "agent.yaml")
	for b.Loop() {
		if err := exec.Command(path, "version").Run(); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(st.Size())/1e6, "binary-MB")
	b.ReportMetric(serveRSS, "serve-RSS-MiB")
	b.ReportMetric(agentRSS, "agent-RSS-MiB")
}

// resident starts a command, waits until it says word, and returns the memory
// that it then has in MiB.
func resident(b *testing.B, dir, word string, command ...string) float64 {
	b.Helper()
	cmd := exec.Command(command[0], command[1:]...)
	cmd.Dir = dir
	stderr, err := cmd.StderrPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	buf := make([]byte, 4096)
	for text := ""; !strings.Contains(text, word); {
		n, err := stderr.Read(buf)
		if err != nil {
			b.Fatalf("%v: %s", err, text)
		}
		text += string(buf[:n])
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", cmd.Process.Pid))
	if err != nil {
		b.Fatal(err)
	}
	_ = cmd.Process.Signal(os.Interrupt)
	_, _ = io.Copy(io.Discard, stderr)
	_ = cmd.Wait()
	var kib float64
	_, rest, _ := strings.Cut(string(status), "VmRSS:")
	if _, err := fmt.Sscan(rest, &kib); err != nil {
		b.Fatal(err)
	}
	return kib / 1024
}
