//go:build linux && amd64

package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/keyclient"
	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/kms/setup"
	"github.com/keyagent/keyagent/storage"
	"github.com/keyagent/keyagent/test/sim/cloud"
)

// cloudService is keyagent serve on one cloud, and a machine with a TPM.
type cloudService struct {
	*site
	dir     string
	log     string
	process *exec.Cmd
	client  *keyclient.Client
	raw     setup.Objects // the storage in the hands of anyone who can write it
}

func newCloudService(t *testing.T, shape cloud.Shape) *cloudService {
	t.Helper()
	s := &cloudService{site: newSite(t)}
	s.dir = s.folder(t)
	s.log = filepath.Join(s.dir, "serve.log")
	config := fmt.Sprintf(labService, s.address)
	config = strings.NewReplacer("kms://cluster-kms?file=master.secret", `"`+shape.KMS+`"`, "storage://file?dir=records", `"`+shape.Storage("p")+`"`).Replace(config)
	must(t, os.WriteFile(filepath.Join(s.dir, "serve.yaml"), []byte(config), 0o600))
	policy := strings.Replace(fmt.Sprintf(labPolicy, s.tpm.Authority.IssuerPath()), `volumes: ["data"]`, `volumes: ["data", "other"]`, 1)
	must(t, os.WriteFile(filepath.Join(s.dir, "policy.yaml"), []byte(policy), 0o600))
	s.start(t)
	agentConfig, err := os.ReadFile(filepath.Join(s.dir, "agent.yaml"))
	must(t, err)
	// A refusal that another try could change is tried for as long as the slowest
	// of the SDKs needs for all of its own tries.
	must(t, os.WriteFile(filepath.Join(s.dir, "agent.yaml"), bytes.Replace(agentConfig, []byte("budget: 20s"), []byte("budget: 12s"), 1), 0o600))
	s.raw, err = setup.Storage(t.Context(), shape.Storage("p"))
	must(t, err)
	t.Cleanup(func() { must(t, s.raw.Close()) })
	return s
}

func (s *cloudService) start(t *testing.T) {
	t.Helper()
	log, err := os.OpenFile(s.log, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	must(t, err)
	defer log.Close()
	s.process = keyagentIn(s.dir, "serve", "--config", "serve.yaml")
	s.process.Stderr = log
	must(t, s.process.Start())
	t.Cleanup(func() { s.stop(t) })
	s.ready(t)
	if s.client != nil {
		must(t, s.client.Close())
	}
	s.client = newClient(t, s.dir)
	t.Cleanup(func() { _ = s.client.Close() })
}

// ready waits until the service says that it serves.
func (s *cloudService) ready(t *testing.T) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		text, err := os.ReadFile(s.log)
		must(t, err)
		if strings.Contains(string(text), "msg=serving") {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("the service did not start: %s", text)
		}
	}
}

func (s *cloudService) stop(t *testing.T) {
	if s.process.ProcessState != nil {
		return
	}
	must(t, s.process.Process.Signal(os.Interrupt))
	if err := s.process.Wait(); err != nil {
		text, _ := os.ReadFile(s.log)
		t.Errorf("the service ended with %v: %s", err, text)
	}
}

// key returns the DEK of a volume, which must be there.
func (s *cloudService) key(t *testing.T, volume string) *secret.Bytes {
	t.Helper()
	k, err := s.client.GetKey(t.Context(), keyclient.Request{Volume: volume})
	must(t, err)
	t.Cleanup(func() { must(t, k.Close()) })
	return k.DEK
}

// refused demands that neither opening nor formatting gets a key, with one class
// for both, and that the service's log says why.
func (s *cloudService) refused(t *testing.T, class failure.Class, why string) {
	t.Helper()
	s.refuses(t, class, why, false, true)
}

func (s *cloudService) refuses(t *testing.T, class failure.Class, why string, formats ...bool) {
	t.Helper()
	before, err := os.ReadFile(s.log)
	must(t, err)
	for _, format := range formats {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		k, err := s.client.GetKey(ctx, keyclient.Request{Volume: "data", Format: format})
		cancel()
		if err == nil {
			t.Errorf("format %v: a key of state pending=%v came", format, k.State == keyclient.Pending)
			must(t, k.Close())
		} else if got := failure.Of(err).Class; got != class {
			t.Errorf("format %v: %q, %v, want %q", format, got, err, class)
		}
	}
	after, err := os.ReadFile(s.log)
	must(t, err)
	if said := string(after[len(before):]); !strings.Contains(said, why) {
		t.Errorf("the log does not say %q: %s", why, said)
	}
}

// Cases 40 to 43: keyagent serve runs on each cloud's KMS and storage, and
// delivers to an attested machine. What storage or the KMS does wrong has errors
// of its own, and never a new key.
func TestEachCloudDeliversKeysAndWhatGoesWrongHasAName(t *testing.T) {
	for name, shape := range cloud.Shapes {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			shape := shape(t)
			s := newCloudService(t, shape)
			var pending []byte // the record of data before it was confirmed
			for _, volume := range []string{"data", "other"} {
				k, err := s.client.GetKey(t.Context(), keyclient.Request{Volume: volume, Format: true})
				must(t, err)
				must(t, k.Close())
				if volume == "data" {
					pending, _, err = s.raw.Get(t.Context(), "volumes/data")
					must(t, err)
				}
				k, err = create(t.Context(), s.client, volume, someMACs)
				must(t, err)
				must(t, k.Close())
			}
			want := s.key(t, "data")
			if want.Equal(s.key(t, "other")) {
				t.Fatal("two volumes have one key")
			}
			s.stop(t)
			must(t, os.Remove(s.log))
			s.start(t) // another process over the same cloud
			if !s.key(t, "data").Equal(want) {
				t.Fatal("another key came back")
			}

			const object = "volumes/data"
			good, _, err := s.raw.Get(t.Context(), object)
			must(t, err)
			theirs, _, err := s.raw.Get(t.Context(), "volumes/other")
			must(t, err)
			put := func(data []byte) {
				t.Helper()
				// The service itself wrote a lease into it meanwhile.
				_, version, err := s.raw.Get(t.Context(), object)
				if errors.Is(err, storage.ErrNotFound) {
					version, err = storage.Absent, nil
				}
				must(t, err)
				_, err = s.raw.Put(t.Context(), object, data, version)
				must(t, err)
			}

			put(theirs)
			s.refused(t, failure.Tampered, "its MAC does not verify")
			put(withKeysOf(t, good, theirs))
			s.refused(t, failure.Tampered, "its MAC does not verify")
			put(good[:len(good)-2])
			s.refused(t, failure.Tampered, "its MAC does not verify")
			put(good)
			if !s.key(t, "data").Equal(want) {
				t.Error("put back, another key came")
			}
			good, _, err = s.raw.Get(t.Context(), object) // with the lease of that key
			must(t, err)

			put(pending)
			s.refused(t, failure.Tampered, "has revision 1, ")
			put(good)

			shape.Disable(true)
			s.refuses(t, failure.Unreachable, "key-encryption key cannot be used", false)
			shape.Disable(false)
			stop := shape.Throttle()
			s.refuses(t, failure.Unreachable, "too many requests", false)
			stop()
			back := shape.Gone()
			s.refuses(t, failure.Unreachable, "there is no such bucket", true)
			back()
			if !s.key(t, "data").Equal(want) {
				t.Error("after the KMS was back, another key came")
			}

			good, version, err := s.raw.Get(t.Context(), object)
			must(t, err)
			must(t, s.raw.Delete(t.Context(), object, version))
			s.refused(t, failure.Tampered, "is gone, its revision ")
			if _, _, err := s.raw.Get(t.Context(), object); err == nil {
				t.Error("a new record was made for a volume that was active")
			}
			put(good)
			if !s.key(t, "data").Equal(want) {
				t.Error("put back, another key came")
			}
		})
	}
}

// withKeysOf is a record with the wrapped keys of another one: what a writer of
// storage plants.
func withKeysOf(t *testing.T, record, other []byte) []byte {
	t.Helper()
	line, body, _ := bytes.Cut(record, []byte("\n"))
	_, theirs, _ := bytes.Cut(other, []byte("\n"))
	var mine, his map[string]json.RawMessage
	must(t, json.Unmarshal(body, &mine))
	must(t, json.Unmarshal(theirs, &his))
	planted := bytes.Replace(body, mine["keys"], his["keys"], 1)
	if bytes.Equal(planted, body) {
		t.Fatal("the records have the same keys")
	}
	return append(append(bytes.Clone(line), '\n'), planted...)
}
