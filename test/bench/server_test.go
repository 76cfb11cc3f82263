package bench

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/pprof"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/keyagent/keyagent/internal/keyservice"
)

// The server whose CPU time is measured is a process of its own, so that the
// client's and the TPM's work does not count. It is this test binary again.
const (
	roleVariable = "KEYAGENT_BENCH_SERVER"
	dirVariable  = "KEYAGENT_BENCH_DIR"
	// profileVariable names a file for a CPU profile of the key service.
	profileVariable = "KEYAGENT_BENCH_PROFILE"
)

func TestMain(m *testing.M) {
	if role := os.Getenv(roleVariable); role != "" {
		if err := serve(role, os.Getenv(dirVariable)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// serve prints its address, then its CPU time for each line that it reads.
func serve(role, dir string) error {
	var addr net.Addr
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	switch role {
	case "keyagent":
		cfg, err := keyservice.LoadConfig(filepath.Join(dir, "serve.yaml"), keyservice.Config{})
		if err != nil {
			return err
		}
		s, err := keyservice.NewServer(ctx, cfg, slog.New(slog.DiscardHandler))
		if err != nil {
			return err
		}
		go s.Run(ctx)
		addr = s.Addr()
	case "tls":
		l, err := bareTLS(dir)
		if err != nil {
			return err
		}
		addr = l.Addr()
	}
	fmt.Println(addr)
	if path := os.Getenv(profileVariable); path != "" && role == "keyagent" {
		f, err := os.Create(path)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := pprof.StartCPUProfile(f); err != nil {
			return err
		}
		defer pprof.StopCPUProfile()
	}
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		var u syscall.Rusage
		if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
			return err
		}
		fmt.Println(u.Utime.Nano() + u.Stime.Nano())
	}
	return nil
}

// bareTLS is the least that a server must do for an attested delivery: the same
// TLS 1.3 handshake with certificates on both sides, one signature verified,
// one small answer.
func bareTLS(dir string) (net.Listener, error) {
	cert, err := tls.LoadX509KeyPair(filepath.Join(dir, "server.pem"), filepath.Join(dir, "server.key"))
	if err != nil {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	digest := sha256.Sum256([]byte("a quote"))
	signature, err := ecdsa.SignASN1(rand.Reader, key, digest[:])
	if err != nil {
		return nil, err
	}
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{
		MinVersion: tls.VersionTLS13, CurvePreferences: []tls.CurveID{tls.X25519MLKEM768},
		SessionTicketsDisabled: true, ClientAuth: tls.RequireAnyClientCert, Certificates: []tls.Certificate{cert},
	})
	if err != nil {
		return nil, err
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				buf := make([]byte, 64)
				if _, err := io.ReadFull(c, buf); err != nil || !ecdsa.VerifyASN1(&key.PublicKey, digest[:], signature) {
					return
				}
				_, _ = c.Write(buf)
			}()
		}
	}()
	return l, nil
}

// server is a server in a process of its own.
type server struct {
	addr string
	in   io.Writer
	out  *bufio.Scanner
}

func startServer(b *testing.B, role, dir string) *server {
	b.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), roleVariable+"="+role, dirVariable+"="+dir)
	cmd.Dir, cmd.Stderr = dir, os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { in.Close(); _ = cmd.Wait() })
	s := &server{in: in, out: bufio.NewScanner(out)}
	if !s.out.Scan() {
		b.Fatal("the server said nothing")
	}
	s.addr = s.out.Text()
	return s
}

// cpu is the processor time that the server has used so far.
func (s *server) cpu(b *testing.B) time.Duration {
	b.Helper()
	fmt.Fprintln(s.in, "cpu")
	var ns int64
	if !s.out.Scan() {
		b.Fatal("the server ended")
	}
	if _, err := fmt.Sscan(strings.TrimSpace(s.out.Text()), &ns); err != nil {
		b.Fatal(err)
	}
	return time.Duration(ns)
}

// dialBare is the client of bareTLS.
func dialBare(addr string, roots *x509.CertPool, cert tls.Certificate) error {
	c, err := tls.Dial("tcp", addr, &tls.Config{
		MinVersion: tls.VersionTLS13, CurvePreferences: []tls.CurveID{tls.X25519MLKEM768},
		RootCAs: roots, ServerName: "127.0.0.1", Certificates: []tls.Certificate{cert},
	})
	if err != nil {
		return err
	}
	defer c.Close()
	buf := make([]byte, 64)
	if _, err := c.Write(buf); err != nil {
		return err
	}
	_, err = io.ReadFull(c, buf)
	return err
}
