package kubekms

//lint:file-ignore SA1019 v1beta1 is deprecated as a whole, and clusters of 2018 speak it.

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"k8s.io/kms/apis/v1beta1"
	"k8s.io/kms/apis/v2"

	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/unixsocket"
)

// ringOf returns a ring that serves these KEKs, the first of which encrypts.
func ringOf(t testing.TB, mode Mode, keks ...string) *Ring {
	t.Helper()
	r := newRing(mode, 1, time.Hour)
	give(t, r, keks...)
	t.Cleanup(func() { _ = r.purge(failure.Newf(failure.State, "", "the test is over")) })
	return r
}

func give(t testing.TB, r *Ring, keks ...string) {
	t.Helper()
	k := &Keys{}
	for i, text := range keks {
		s := secretOf(t, text)
		if i == 0 {
			k.Current = s
		} else {
			k.Old = append(k.Old, s)
		}
	}
	if _, err := r.accept(k, time.Now()); err != nil {
		t.Fatal(err)
	}
}

// plugin is a server on a socket with what kube-apiserver dials it with.
type plugin struct {
	v2     v2.KeyManagementServiceClient
	v1     v1beta1.KeyManagementServiceClient
	health healthv1.HealthClient
	log    *lockedBuffer
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func serve(t testing.TB, ring *Ring, uids ...uint32) *plugin {
	t.Helper()
	dir, err := os.MkdirTemp("", "kms")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket := filepath.Join(dir, "s")
	l, err := unixsocket.Listen(socket, unixsocket.Options{UID: -1, GID: -1})
	if err != nil {
		t.Fatal(err)
	}
	p := &plugin{log: &lockedBuffer{}}
	s := NewServer(ServerOptions{Ring: ring, UIDs: uids, Version: "1.2.3", Metrics: NewMetrics(),
		Log: slog.New(slog.NewTextHandler(p.log, &slog.HandlerOptions{Level: slog.LevelDebug}))})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx, l) }()
	conn := dial(t, socket)
	t.Cleanup(func() {
		conn.Close()
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	p.v2, p.v1, p.health = v2.NewKeyManagementServiceClient(conn), v1beta1.NewKeyManagementServiceClient(conn), healthv1.NewHealthClient(conn)
	return p
}

// dial is what kube-apiserver does: no credentials, the authority localhost.
func dial(t testing.TB, socket string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+socket, grpc.WithAuthority("localhost"), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
			return net.DialUnix("unix", nil, &net.UnixAddr{Name: socket, Net: "unix"})
		}))
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

func self() uint32 { return uint32(os.Getuid()) }

// TestTheRulesOfKubeAPIServerHold repeats what k8s.io/apiserver's envelope and
// encryptionconfig packages check of each answer.
func TestTheRulesOfKubeAPIServerHold(t *testing.T) {
	for _, mode := range []Mode{AESGCM, AESCBC} {
		t.Run(string(mode), func(t *testing.T) {
			p := serve(t, ringOf(t, mode, kekA), self())
			st, err := p.v2.Status(t.Context(), &v2.StatusRequest{})
			if err != nil || st.GetVersion() != "v2" || st.GetHealthz() != "ok" || st.GetKeyId() == "" || len(st.GetKeyId()) > MaxKeyID {
				t.Fatalf("status: %v, %v", st, err)
			}
			for _, n := range []int{32, 0, 1, 16, 900} {
				plain := bytes.Repeat([]byte{7}, n)
				enc, err := p.v2.Encrypt(t.Context(), &v2.EncryptRequest{Plaintext: plain, Uid: "u-1"})
				if err != nil || len(enc.GetCiphertext()) == 0 || len(enc.GetCiphertext()) > MaxCiphertextV2 || enc.GetKeyId() != st.GetKeyId() || len(enc.GetAnnotations()) != 0 {
					t.Fatalf("%d bytes: %v, %v", n, enc, err)
				}
				dec, err := p.v2.Decrypt(t.Context(), &v2.DecryptRequest{Ciphertext: enc.GetCiphertext(), KeyId: enc.GetKeyId(), Uid: "u-2"})
				if err != nil || !bytes.Equal(dec.GetPlaintext(), plain) {
					t.Errorf("%d bytes come back as %d, %v", n, len(dec.GetPlaintext()), err)
				}
			}
			if _, err := p.v2.Encrypt(t.Context(), &v2.EncryptRequest{Plaintext: make([]byte, 1000)}); status.Code(err) != codes.InvalidArgument {
				t.Errorf("a plaintext whose ciphertext would be refused: %v", err)
			}
			version, err := p.v1.Version(t.Context(), &v1beta1.VersionRequest{Version: "v1beta1"})
			if err != nil || version.GetVersion() != "v1beta1" || version.GetRuntimeName() == "" || version.GetRuntimeVersion() != "1.2.3" {
				t.Errorf("version: %v, %v", version, err)
			}
			enc, err := p.v1.Encrypt(t.Context(), &v1beta1.EncryptRequest{Version: "v1beta1", Plain: []byte("ping")})
			if err != nil || bytes.HasPrefix(enc.GetCipher(), []byte(legacyPrefix)) != (mode == AESCBC) {
				t.Fatalf("%v, %v", enc, err)
			}
			dec, err := p.v1.Decrypt(t.Context(), &v1beta1.DecryptRequest{Version: "v1beta1", Cipher: enc.GetCipher()})
			if err != nil || string(dec.GetPlain()) != "ping" {
				t.Errorf("%v, %v", dec, err)
			}
		})
	}
}

func TestRequestsOutsideTheBoundsAreRefused(t *testing.T) {
	p := serve(t, ringOf(t, AESGCM, kekA), self())
	enc, err := p.v2.Encrypt(t.Context(), &v2.EncryptRequest{Plaintext: []byte(kekB)})
	if err != nil {
		t.Fatal(err)
	}
	good := func() *v2.DecryptRequest {
		return &v2.DecryptRequest{Ciphertext: bytes.Clone(enc.GetCiphertext()), KeyId: enc.GetKeyId(), Uid: "u"}
	}
	for name, tt := range map[string]struct {
		change func(*v2.DecryptRequest)
		code   codes.Code
	}{
		"no key_id":                {func(r *v2.DecryptRequest) { r.KeyId = "" }, codes.InvalidArgument},
		"a key_id of 1025 bytes":   {func(r *v2.DecryptRequest) { r.KeyId = strings.Repeat("k", 1025) }, codes.InvalidArgument},
		"another key_id":           {func(r *v2.DecryptRequest) { r.KeyId = idOf(t, kekB) }, codes.NotFound},
		"an annotation":            {func(r *v2.DecryptRequest) { r.Annotations = map[string][]byte{"a.example": nil} }, codes.InvalidArgument},
		"a ciphertext of 1025":     {func(r *v2.DecryptRequest) { r.Ciphertext = make([]byte, 1025) }, codes.InvalidArgument},
		"no ciphertext":            {func(r *v2.DecryptRequest) { r.Ciphertext = nil }, codes.DataLoss},
		"a changed ciphertext":     {func(r *v2.DecryptRequest) { r.Ciphertext[50] ^= 1 }, codes.DataLoss},
		"an envelope's other name": {func(r *v2.DecryptRequest) { r.Ciphertext[1] ^= 1 }, codes.DataLoss},
		"an IV alone":              {func(r *v2.DecryptRequest) { r.Ciphertext = []byte(legacyPrefix + "iiiiiiiiiiiiiiii") }, codes.DataLoss},
		"a wrong padding": {func(r *v2.DecryptRequest) {
			r.Ciphertext = []byte(legacyPrefix + strings.Repeat("i", 16) + strings.Repeat("x", 32))
		}, codes.DataLoss},
	} {
		r := good()
		tt.change(r)
		_, err := p.v2.Decrypt(t.Context(), r)
		if status.Code(err) != tt.code {
			t.Errorf("%s: %v", name, err)
		}
		if st, _ := status.FromError(err); tt.code == codes.DataLoss && (st.Message() != ErrDecrypt.Error() || len(st.Details()) != 0) {
			t.Errorf("%s has a shape of its own: %v", name, st)
		}
	}
	if _, err := p.v1.Decrypt(t.Context(), &v1beta1.DecryptRequest{Cipher: enc.GetCiphertext()}); status.Code(err) != codes.DataLoss {
		t.Errorf("a ciphertext of v2 opens in v1beta1: %v", err)
	}
	if _, err := p.v1.Decrypt(t.Context(), &v1beta1.DecryptRequest{Cipher: make([]byte, 1<<20)}); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("a megabyte: %v", err)
	}
	if _, err := p.v2.Decrypt(t.Context(), good()); err != nil {
		t.Errorf("the good one: %v", err)
	}
}

// TestWhatKubeAPIServerIsToldInAnOutage: coasting lets it write on, a purge does not.
func TestWhatKubeAPIServerIsToldInAnOutage(t *testing.T) {
	r := ringOf(t, AESGCM, kekA)
	p := serve(t, r, self())
	lost := failure.Newf(failure.Unreachable, "", "no route")
	r.mark(Failing, lost)
	if st, err := p.v2.Status(t.Context(), &v2.StatusRequest{}); err != nil || st.GetHealthz() != "ok" {
		t.Errorf("failing: %v, %v", st, err)
	}
	r.mark(Coasting, lost)
	st, err := p.v2.Status(t.Context(), &v2.StatusRequest{})
	if err != nil || st.GetHealthz() == "ok" || st.GetKeyId() != idOf(t, kekA) {
		t.Errorf("coasting: %v, %v", st, err)
	}
	if enc, err := p.v2.Encrypt(t.Context(), &v2.EncryptRequest{Plaintext: []byte(kekB)}); err != nil || enc.GetKeyId() != st.GetKeyId() {
		t.Errorf("coasting: %v", err)
	}
	if err := r.purge(lost); err != nil {
		t.Fatal(err)
	}
	_, statusErr := p.v2.Status(t.Context(), &v2.StatusRequest{})
	_, encErr := p.v2.Encrypt(t.Context(), &v2.EncryptRequest{})
	_, decErr := p.v2.Decrypt(t.Context(), &v2.DecryptRequest{KeyId: "x"})
	_, enc1Err := p.v1.Encrypt(t.Context(), &v1beta1.EncryptRequest{})
	_, dec1Err := p.v1.Decrypt(t.Context(), &v1beta1.DecryptRequest{})
	for _, err := range []error{statusErr, encErr, decErr, enc1Err, dec1Err} {
		if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "no route") {
			t.Errorf("purged: %v", err)
		}
	}
	give(t, r, kekA)
	if st, err := p.v2.Status(t.Context(), &v2.StatusRequest{}); err != nil || st.GetHealthz() != "ok" || st.GetKeyId() != idOf(t, kekA) {
		t.Errorf("recovered: %v, %v", st, err)
	}
}

// TestAChangedKEKOpensOldCiphertexts: the daemon of 2018 lost them (case 44).
func TestAChangedKEKOpensOldCiphertexts(t *testing.T) {
	for _, mode := range []Mode{AESGCM, AESCBC} {
		r := ringOf(t, mode, kekA)
		p := serve(t, r, self())
		old2, err := p.v2.Encrypt(t.Context(), &v2.EncryptRequest{Plaintext: []byte(kekB)})
		if err != nil {
			t.Fatal(err)
		}
		old1, err := p.v1.Encrypt(t.Context(), &v1beta1.EncryptRequest{Plain: []byte(kekB)})
		if err != nil {
			t.Fatal(err)
		}
		give(t, r, kekC)
		new2, err := p.v2.Encrypt(t.Context(), &v2.EncryptRequest{Plaintext: []byte(kekB)})
		if err != nil || new2.GetKeyId() == old2.GetKeyId() {
			t.Errorf("%s: %v, %v", mode, new2, err)
		}
		if dec, err := p.v2.Decrypt(t.Context(), &v2.DecryptRequest{Ciphertext: old2.GetCiphertext(), KeyId: old2.GetKeyId()}); err != nil || string(dec.GetPlaintext()) != kekB {
			t.Errorf("%s: %v", mode, err)
		}
		if dec, err := p.v1.Decrypt(t.Context(), &v1beta1.DecryptRequest{Cipher: old1.GetCipher()}); err != nil || string(dec.GetPlain()) != kekB {
			t.Errorf("%s: %v", mode, err)
		}
	}
}

func TestCallersThatAreNotAllowedGetNoAnswer(t *testing.T) {
	p := serve(t, ringOf(t, AESGCM, kekA), self()+1)
	if _, err := p.v2.Status(t.Context(), &v2.StatusRequest{}); status.Code(err) != codes.Unavailable {
		t.Errorf("%v", err)
	}
	if !strings.Contains(p.log.String(), "caller refused") {
		t.Errorf("the log: %s", p.log)
	}
}

func TestTheLogHasUIDsAndNoPlaintext(t *testing.T) {
	p := serve(t, ringOf(t, AESGCM, kekA), self())
	plain := "0123456789abcdef0123456789abcdef"
	enc, err := p.v2.Encrypt(t.Context(), &v2.EncryptRequest{Plaintext: []byte(plain), Uid: "uid-of-encrypt"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.v2.Decrypt(t.Context(), &v2.DecryptRequest{Ciphertext: enc.GetCiphertext(), KeyId: enc.GetKeyId(), Uid: strings.Repeat("u", 10000)}); err != nil {
		t.Fatal(err)
	}
	for range 100 {
		if strings.Contains(p.log.String(), "operation=decrypt") {
			break
		}
		time.Sleep(10 * time.Millisecond) // the answer is sent before the line is written
	}
	log := p.log.String()
	if !strings.Contains(log, "uid=uid-of-encrypt") || strings.Contains(log, plain) || strings.Contains(log, kekA) || len(log) > 2000 {
		t.Errorf("%s", log)
	}
}

func TestHealthIsTheStates(t *testing.T) {
	r := ringOf(t, AESGCM, kekA)
	m := NewMetrics()
	m.Watch(r)
	h := httptest.NewServer(m.Handler(r))
	t.Cleanup(h.Close)
	get := func(path string) (int, string) {
		resp, err := http.Get(h.URL + path)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		var b bytes.Buffer
		_, _ = b.ReadFrom(resp.Body)
		return resp.StatusCode, b.String()
	}
	p := serve(t, r, self())
	if resp, err := p.health.Check(t.Context(), &healthv1.HealthCheckRequest{Service: "v2.KeyManagementService"}); err != nil || resp.GetStatus() != healthv1.HealthCheckResponse_SERVING {
		t.Errorf("%v, %v", resp, err)
	}
	if code, _ := get("/readyz"); code != http.StatusOK {
		t.Errorf("ready: %d", code)
	}
	if err := r.purge(failure.Newf(failure.Unreachable, "", "secret text of an error")); err != nil {
		t.Fatal(err)
	}
	if code, _ := get("/readyz"); code != http.StatusServiceUnavailable {
		t.Errorf("purged: %d", code)
	}
	if code, _ := get("/healthz"); code != http.StatusOK {
		t.Errorf("alive: %d", code)
	}
	m.request("v2", "encrypt", errors.New("secret text of an error"), time.Second)
	_, text := get("/metrics")
	if !strings.Contains(text, `keyagent_kubekms_state{state="purged"} 1`) || !strings.Contains(text, `keyagent_kubekms_keys 0`) || strings.Contains(text, "secret text") {
		t.Errorf("%s", text)
	}
	for range 300 {
		if resp, err := p.health.Check(t.Context(), &healthv1.HealthCheckRequest{}); err == nil && resp.GetStatus() == healthv1.HealthCheckResponse_NOT_SERVING {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Error("gRPC's health does not follow")
}
