package kubekms

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"k8s.io/kms/apis/v2"

	"github.com/keyagent/keyagent/internal/unixsocket"
)

// minimal is the least that a plugin can be: one AES-GCM key in the heap.
type minimal struct {
	v2.UnimplementedKeyManagementServiceServer
	aead cipher.AEAD
}

func (m *minimal) Encrypt(_ context.Context, r *v2.EncryptRequest) (*v2.EncryptResponse, error) {
	return &v2.EncryptResponse{Ciphertext: m.aead.Seal(nil, nil, r.GetPlaintext(), nil), KeyId: "1"}, nil
}

func (m *minimal) Decrypt(_ context.Context, r *v2.DecryptRequest) (*v2.DecryptResponse, error) {
	plain, err := m.aead.Open(nil, nil, r.GetCiphertext(), nil)
	return &v2.DecryptResponse{Plaintext: plain}, err
}

func benchSocket(b *testing.B) (*net.UnixListener, v2.KeyManagementServiceClient) {
	b.Helper()
	dir, err := os.MkdirTemp("", "kms")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { os.RemoveAll(dir) })
	socket := filepath.Join(dir, "s")
	l, err := unixsocket.Listen(socket, unixsocket.Options{UID: -1, GID: -1})
	if err != nil {
		b.Fatal(err)
	}
	conn := dial(b, socket)
	b.Cleanup(func() { conn.Close() })
	return l, v2.NewKeyManagementServiceClient(conn)
}

// BenchmarkPlugin is a round trip of 32 bytes on a socket, beside the minimal plugin:
// time, CPU time of both sides together, and the 99th percentile.
func BenchmarkPlugin(b *testing.B) {
	for _, name := range []string{"minimal", "keyagent"} {
		l, client := benchSocket(b)
		var s *grpc.Server
		if name == "minimal" {
			block, err := aes.NewCipher([]byte(kekA))
			if err != nil {
				b.Fatal(err)
			}
			aead, err := cipher.NewGCMWithRandomNonce(block)
			if err != nil {
				b.Fatal(err)
			}
			s = grpc.NewServer()
			v2.RegisterKeyManagementServiceServer(s, &minimal{aead: aead})
		} else {
			s = NewServer(ServerOptions{Ring: ringOf(b, AESGCM, kekA), UIDs: []uint32{self()}, Log: slog.New(slog.DiscardHandler), Metrics: NewMetrics()}).grpc
		}
		go func() { _ = s.Serve(l) }()
		b.Cleanup(s.Stop)
		enc, err := client.Encrypt(b.Context(), &v2.EncryptRequest{Plaintext: []byte(kekB), Uid: "u"})
		if err != nil {
			b.Fatal(err)
		}
		for operation, call := range map[string]func() error{
			"Encrypt": func() error {
				_, err := client.Encrypt(b.Context(), &v2.EncryptRequest{Plaintext: []byte(kekB), Uid: "u"})
				return err
			},
			"Decrypt": func() error {
				_, err := client.Decrypt(b.Context(), &v2.DecryptRequest{Ciphertext: enc.GetCiphertext(), KeyId: enc.GetKeyId(), Uid: "u"})
				return err
			},
		} {
			for _, parallel := range []int{1, 64} {
				b.Run(fmt.Sprintf("%s/%s/%d", operation, name, parallel), func(b *testing.B) { roundTrips(b, parallel, call) })
			}
		}
	}
}

func roundTrips(b *testing.B, parallel int, call func() error) {
	var mu sync.Mutex
	var all []time.Duration
	before := cpu(b)
	b.ResetTimer()
	var group sync.WaitGroup
	for i := range parallel {
		n := b.N / parallel
		if i < b.N%parallel {
			n++
		}
		group.Go(func() {
			took := make([]time.Duration, 0, n)
			for range n {
				began := time.Now()
				if err := call(); err != nil {
					b.Error(err)
					return
				}
				took = append(took, time.Since(began))
			}
			mu.Lock()
			defer mu.Unlock()
			all = append(all, took...)
		})
	}
	group.Wait()
	b.StopTimer()
	if len(all) == 0 {
		return
	}
	slices.Sort(all)
	b.ReportMetric(float64(cpu(b)-before)/float64(b.N), "cpu-ns/op")
	b.ReportMetric(float64(all[len(all)*99/100].Microseconds()), "p99-µs")
}

// cpu is what this process has used, in nanoseconds.
func cpu(b *testing.B) int64 {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return u.Utime.Nano() + u.Stime.Nano()
}

func BenchmarkEnvelope(b *testing.B) {
	k := counting(b, 32)
	blob, err := k.seal(purposeV2, []byte(kekB))
	if err != nil {
		b.Fatal(err)
	}
	b.Run("seal", func(b *testing.B) {
		for b.Loop() {
			if _, err := k.seal(purposeV2, []byte(kekB)); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("open", func(b *testing.B) {
		for b.Loop() {
			if _, err := k.open(purposeV2, blob); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkAfterARestart is what an API server asks that has restarted and whose
// objects have 10 000 seeds: each decrypted once, 64 at a time, by a plugin that has
// just begun as well.
func BenchmarkAfterARestart(b *testing.B) {
	const distinct, parallel = 10_000, 64
	ring := ringOf(b, AESGCM, kekA)
	before := NewServer(ServerOptions{Ring: ring, UIDs: []uint32{self()}, Log: slog.New(slog.DiscardHandler), Metrics: NewMetrics()}).grpc
	l, client := benchSocket(b)
	go func() { _ = before.Serve(l) }()
	b.Cleanup(before.Stop)
	requests := make([]*v2.DecryptRequest, distinct)
	for n := range requests {
		plain := fmt.Sprintf("%032d", n)
		enc, err := client.Encrypt(b.Context(), &v2.EncryptRequest{Plaintext: []byte(plain), Uid: "u"})
		if err != nil {
			b.Fatal(err)
		}
		requests[n] = &v2.DecryptRequest{Ciphertext: enc.GetCiphertext(), KeyId: enc.GetKeyId(), Annotations: enc.GetAnnotations(), Uid: "u"}
	}
	for b.Loop() {
		l, client := benchSocket(b)
		s := NewServer(ServerOptions{Ring: ringOf(b, AESGCM, kekA), UIDs: []uint32{self()}, Log: slog.New(slog.DiscardHandler), Metrics: NewMetrics()}).grpc
		go func() { _ = s.Serve(l) }()
		var group sync.WaitGroup
		for first := range parallel {
			group.Go(func() {
				for n := first; n < distinct; n += parallel {
					rsp, err := client.Decrypt(b.Context(), requests[n])
					if err != nil || string(rsp.GetPlaintext()) != fmt.Sprintf("%032d", n) {
						b.Errorf("%d: %v", n, err)
						return
					}
				}
			})
		}
		group.Wait()
		s.Stop()
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	b.ReportMetric(float64(m.Sys)/(1<<20), "MiB-of-both-sides")
}
