//go:build linux && amd64

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/kms/cluster"
	"github.com/keyagent/keyagent/kms/setup"
	"github.com/keyagent/keyagent/test/suite/e2e/inject"
)

const (
	underOld = "kms://cluster-kms?file=master.secret"
	underNew = "kms://cluster-kms?file=new.secret"
)

// Case 38: keyagent kms rewrap is killed at each call that
// writes. Run again, it ends with all keys under the new KEK, and they are the same.
func TestAKilledRewrapConverges(t *testing.T) {
	l := newSite(t)
	dir := l.folder(t)
	client := newClient(t, dir)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	service := l.serve(t, dir, 0)
	must(t, provision(ctx, client))
	must(t, client.Close())
	must(t, service.Signal(syscall.SIGTERM))
	_, err := service.Wait()
	must(t, err)
	must(t, cluster.InitMasterSecret(filepath.Join(dir, "new.secret")))
	want := deks(t, dir, underOld)

	for n := 1; ; n++ {
		copied := t.TempDir()
		must(t, os.CopyFS(copied, os.DirFS(dir)))
		for _, name := range []string{"master.secret", "new.secret"} {
			must(t, os.Chmod(filepath.Join(copied, name), 0o600))
		}
		res := rewrap(t, copied, n)
		if !res.Killed {
			t.Logf("killed at each of %d calls that write:\n%s", n-1, strings.Join(res.Calls, "\n"))
			if n < 20 {
				t.Errorf("six records and a MAC key are written by %d calls: the calls are not followed", n-1)
			}
			break
		}
		at := fmt.Sprintf("killed at call %d, %s", n, res.Calls[len(res.Calls)-1])
		if res := rewrap(t, copied, 0); res.ExitCode != 0 {
			t.Fatalf("%s: run again, it ended with %d", at, res.ExitCode)
		}
		status, err := keyagentIn(copied, "kms", "status", "--kms", underNew, "--storage", "storage://file?dir=records", "--output", "json").Output()
		must(t, err)
		var s struct {
			Current string         `json:"current_kek"`
			MACKey  string         `json:"record_key_kek"`
			Keys    map[string]int `json:"keys"`
		}
		must(t, json.Unmarshal(status, &s))
		if len(s.Keys) != 1 || s.Keys[s.Current] != 6 || s.MACKey != s.Current {
			t.Errorf("%s: %s", at, status)
		}
		for id, key := range deks(t, copied, underNew) {
			if !key.Equal(want[id]) {
				t.Errorf("%s: %s has another key", at, id)
			}
		}
	}
}

// deks makes five keys, or gets them again.
func deks(t *testing.T, dir, uri string) map[string]*secret.Bytes {
	t.Helper()
	absolute := func(uri string) string { return strings.Replace(uri, "=", "="+dir+"/", 1) }
	d, err := setup.DEKs(t.Context(), absolute(uri), absolute("storage://file?dir=records"))
	must(t, err)
	defer d.Close()
	keys := map[string]*secret.Bytes{}
	for i := range 5 {
		id := fmt.Sprintf("pvc-%d", i)
		keys[id], err = d.GetOrCreate(t.Context(), id, 32)
		must(t, err)
		t.Cleanup(func() { keys[id].Close() })
	}
	return keys
}

func rewrap(t *testing.T, dir string, n int) inject.Result {
	t.Helper()
	log, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	must(t, err)
	defer log.Close()
	cmd := keyagentIn(dir, "kms", "rewrap", "--kms", underNew, "--old-kms", underOld, "--storage", "storage://file?dir=records")
	cmd.Stderr, cmd.Stdout = log, log
	p, err := inject.Start(cmd, n)
	must(t, err)
	res, err := p.Wait()
	must(t, err)
	return res
}
