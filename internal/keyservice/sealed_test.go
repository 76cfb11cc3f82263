package keyservice

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/keyagent/keyagent/attestation/atls"
	"github.com/keyagent/keyagent/attestation/kinds"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/policysource"
	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/internal/shares"
	"github.com/keyagent/keyagent/internal/unseal"
	"github.com/keyagent/keyagent/kms/cluster"
)

// sealedWorld is a world whose service had a master secret, and has it in shares now.
type sealedWorld struct {
	*world
	split  *shares.Sealed
	all    []*shares.Share
	result chan error
	cancel context.CancelFunc
}

func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer l.Close()
	return l.Addr().String()
}

func newSealedWorld(t *testing.T, evidence bool) *sealedWorld {
	t.Helper()
	w := &sealedWorld{world: newWorld(t)}
	w.stop()
	w.divide()
	w.cfg.KMS = "kms://cluster-kms?sealedFile=" + filepath.Join(w.dir, "master.sealed")
	w.cfg.Listen, w.cfg.Metrics = freePort(t), freePort(t)
	if evidence {
		w.cfg.TPM = &kinds.TPMConfig{Device: w.tpm.Device, EventLog: "/nonexistent"}
	}
	w.seal()
	t.Cleanup(func() { w.cancel(); <-w.result })
	return w
}

// divide puts the world's master secret into five shares, of which three are needed.
func (w *sealedWorld) divide() {
	w.t.Helper()
	master, err := cluster.LoadMasterSecret(filepath.Join(w.dir, "master"))
	must(w.t, err)
	defer master.Close()
	w.split, w.all, err = shares.Split(master, 3, 5)
	must(w.t, err)
	data, err := w.split.Encode()
	must(w.t, err)
	must(w.t, os.WriteFile(filepath.Join(w.dir, "master.sealed"), data, 0o600))
}

// seal starts the service, sealed.
func (w *sealedWorld) seal() {
	w.t.Helper()
	s, err := OpenSealed(w.cfg, slog.New(slog.NewTextHandler(w.logged, nil)))
	must(w.t, err)
	ctx, cancel := context.WithCancel(context.Background())
	w.cancel, w.result = cancel, make(chan error, 1)
	go func() {
		server, err := s.Unseal(ctx, func() {})
		if err == nil {
			err = server.Run(ctx)
		}
		w.result <- err
	}()
	for range 200 {
		if c, err := net.Dial("tcp", w.cfg.Listen); err == nil {
			c.Close()
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	w.t.Fatal("it does not listen")
}

func (w *sealedWorld) operator(evidence bool) *atls.ClientConfig {
	w.t.Helper()
	id, err := atls.NewIdentity()
	must(w.t, err)
	cfg := &atls.ClientConfig{ServerName: "127.0.0.1", RootCAs: w.pki.Pool(), Identity: id}
	if evidence {
		source, err := policysource.New(w.cfg.Policy, slog.New(slog.DiscardHandler))
		must(w.t, err)
		cfg.Server, err = source.Peers(nil, nil)
		must(w.t, err)
	}
	return cfg
}

func (w *sealedWorld) give(i int, evidence bool) (unseal.Progress, error) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), 30*time.Second)
	defer cancel()
	return unseal.Submit(ctx, w.cfg.Listen, w.operator(evidence), w.all[i-1])
}

func (w *sealedWorld) web(path string) (int, string) {
	w.t.Helper()
	resp, err := http.Get("http://" + w.cfg.Metrics + path)
	must(w.t, err)
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	must(w.t, err)
	return resp.StatusCode, string(text)
}

// A sealed service tells the truth of itself, gives nobody anything, and serves when three
// of five have given their share: with the keys that it had.
func TestASealedServiceOpensWithItsShares(t *testing.T) {
	for _, evidence := range []bool{true, false} {
		t.Run(fmt.Sprintf("evidence %v", evidence), func(t *testing.T) {
			w := newSealedWorld(t, evidence)
			if code, text := w.web("/healthz"); code != 200 {
				t.Errorf("healthz: %d %s", code, text)
			}
			if code, text := w.web("/readyz"); code != 503 || !strings.Contains(text, "sealed: 0 of 3 shares") {
				t.Errorf("readyz: %d %s", code, text)
			}
			w.address = w.cfg.Listen
			_, _, err := w.get(w.machine(), "data-1", openOp)
			wantClass(t, err, failure.Unreachable)
			if f := failure.Of(err); !strings.Contains(f.Hint, "keyagent kms unseal") {
				t.Errorf("a node hears %v", err)
			}
			_, err = w.give(1, !evidence)
			if evidence {
				wantClass(t, err, failure.Usage) // in the clear, to one that proves what it is
			} else {
				wantClass(t, err, failure.ServerUntrusted)
			}
			for n, i := range []int{2, 5, 5} {
				p, err := w.give(i, evidence)
				if err != nil || p.Unsealed || p.Have != min(n+1, 2) {
					t.Fatalf("share %d: %+v, %v", i, p, err)
				}
			}
			forged := w.all[0]
			w.all[0] = forge(t, forged)
			_, err = w.give(1, evidence)
			wantClass(t, err, failure.WrongKey)
			if !strings.Contains(err.Error(), "share 1: ") {
				t.Errorf("it is not named: %v", err)
			}
			w.all[0] = forged
			p, err := w.give(1, evidence)
			if err != nil || !p.Unsealed {
				t.Fatalf("%+v, %v", p, err)
			}
			var opened bool
			for range 500 {
				if code, _ := w.web2("/readyz"); code == 200 {
					opened = true
					break
				}
				time.Sleep(10 * time.Millisecond)
			}
			if !opened {
				t.Fatalf("it never serves: %s", w.logged)
			}
			if _, _, err := w.get(w.machine(), "data-1", formatOp); err != nil {
				t.Error(err)
			}
			_, err = w.give(3, evidence)
			wantClass(t, err, failure.State)
			log := w.logged.String()
			for _, share := range w.all {
				text, err := share.Encode()
				must(t, err)
				must(t, text.Use(func(raw []byte) error {
					_, value, _ := strings.Cut(string(raw), `"value":"`)
					if strings.Contains(log, value[:20]) {
						t.Error("the log has a share")
					}
					return nil
				}))
			}
		})
	}
}

// web2 is web of a service that may be between two listeners.
func (w *sealedWorld) web2(path string) (int, error) {
	resp, err := http.Get("http://" + w.cfg.Metrics + path)
	if err != nil {
		return 0, err
	}
	return resp.StatusCode, resp.Body.Close()
}

// forge changes a share.
func forge(t *testing.T, s *shares.Share) *shares.Share {
	t.Helper()
	text, err := s.Encode()
	must(t, err)
	defer text.Close()
	var changed *secret.Bytes
	must(t, text.Use(func(raw []byte) (err error) {
		out := []byte(string(raw))
		at := strings.Index(string(out), `"value":"`) + len(`"value":"`)
		if out[at] == 'A' {
			out[at] = 'B'
		} else {
			out[at] = 'A'
		}
		changed, err = secret.From(out)
		return err
	}))
	defer changed.Close()
	forged, err := shares.ParseShare(changed)
	must(t, err)
	return forged
}

// A stranger whose call does not end keeps nothing from being served.
func TestAStrangersCallDoesNotKeepAServiceSealed(t *testing.T) {
	w := newSealedWorld(t, false)
	tcp, err := net.Dial("tcp", w.cfg.Listen)
	must(t, err)
	conn, err := atls.Client(t.Context(), tcp, w.operator(false))
	must(t, err)
	client, err := atls.NewGRPC(conn)
	must(t, err)
	defer client.Close()
	if _, err := client.NewStream(t.Context(), &grpc.StreamDesc{ClientStreams: true}, "/keyagent.unseal.v1.Unseal/Submit"); err != nil {
		t.Fatal(err)
	}
	for _, i := range []int{1, 2, 3} {
		_, err := w.give(i, false)
		must(t, err)
	}
	deadline := time.Now().Add(30 * time.Second)
	for {
		if code, _ := w.web2("/readyz"); code == 200 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("it never serves: %s", w.logged)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func TestWhatIsSealedIsChecked(t *testing.T) {
	w := newWorld(t)
	log := slog.New(slog.DiscardHandler)
	if s, err := OpenSealed(w.cfg, log); s != nil || err != nil {
		t.Errorf("a service that is not sealed: %v", err)
	}
	path := filepath.Join(w.dir, "master.sealed")
	w.cfg.KMS = "kms://cluster-kms?sealedFile=" + path
	_, err := OpenSealed(w.cfg, log)
	wantClass(t, err, failure.Configuration)
	must(t, os.WriteFile(path, []byte("{}"), 0o600))
	_, err = OpenSealed(w.cfg, log)
	wantClass(t, err, failure.Configuration)
	if !errors.Is(err, shares.ErrFormat) {
		t.Error(err)
	}
	master, err := cluster.LoadMasterSecret(filepath.Join(w.dir, "master"))
	must(t, err)
	defer master.Close()
	split, _, err := shares.Split(master, 2, 2)
	must(t, err)
	data, err := split.Encode()
	must(t, err)
	must(t, os.WriteFile(path, data, 0o600))
	for name, change := range map[string]func(*Config){
		"a policy that is none":         func(c *Config) { c.Policy = path },
		"another sealed one":            func(c *Config) { c.OldKMS = []string{c.KMS} },
		"a URI of two":                  func(c *Config) { c.KMS += "&file=x" },
		"another KMS that is not there": func(c *Config) { c.OldKMS = []string{"kms://cluster-kms?file=/nonexistent"} },
	} {
		cfg := *w.cfg
		change(&cfg)
		s, err := OpenSealed(&cfg, log)
		if err == nil {
			err = s.Check(t.Context(), true)
		}
		if err == nil {
			t.Errorf("%s: nothing is said before operators are asked", name)
		}
	}
	w.cfg.Listen = "127.0.0.1:0"
	_, err = NewServer(t.Context(), w.cfg, log)
	if err == nil || !strings.Contains(err.Error(), "sealed") {
		t.Errorf("without its shares it starts: %v", err)
	}
}
