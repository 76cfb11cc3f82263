package kubernetes

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"github.com/keyagent/keyagent/internal/kubekms"
	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/internal/unixsocket"
)

const (
	kekA = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
	kekB = "BBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBB"
)

// keks is a source: the first encrypts.
type keks []string

func (k keks) Fetch(context.Context) (*kubekms.Keys, error) {
	out := &kubekms.Keys{}
	for i, text := range k {
		s, err := secret.From([]byte(text))
		if err != nil {
			return nil, err
		}
		if i == 0 {
			out.Current = s
		} else {
			out.Old = append(out.Old, s)
		}
	}
	return out, nil
}

// start runs the plugin on a socket; stop ends it.
func start(t *testing.T, socket string, mode kubekms.Mode, source kubekms.Source) (stop func()) {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	r, err := kubekms.NewRefresher(t.Context(), source, kubekms.Options{Mode: mode})
	if err != nil {
		t.Fatal(err)
	}
	l, err := unixsocket.Listen(socket, unixsocket.Options{UID: -1, GID: -1})
	if err != nil {
		t.Fatal(err)
	}
	s := kubekms.NewServer(kubekms.ServerOptions{Ring: r.Ring(), UIDs: []uint32{uint32(os.Getuid())}, Version: "1.0.0", Log: log})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 2)
	go func() { done <- s.Run(ctx, l) }()
	go func() { done <- r.Run(ctx) }()
	ended := false
	stop = func() {
		if ended {
			return
		}
		ended = true
		cancel()
		for range 2 {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
	}
	t.Cleanup(stop)
	return stop
}

func folder(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "kms")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// configuration writes an EncryptionConfiguration with these providers.
func configuration(t *testing.T, providers string) string {
	t.Helper()
	path := filepath.Join(folder(t), "encryption.yaml")
	text := fmt.Sprintf("apiVersion: apiserver.config.k8s.io/v1\nkind: EncryptionConfiguration\nresources:\n- resources: [secrets]\n  providers:\n%s", providers)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func provider(api, name, socket string) string {
	return fmt.Sprintf("  - kms: {apiVersion: %s, name: %s, endpoint: 'unix://%s', timeout: 3s}\n", api, name, socket)
}
