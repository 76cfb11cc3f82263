//go:build linux && amd64

package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"cloud.google.com/go/kms/apiv1/kmspb"

	"github.com/keyagent/keyagent/internal/agent"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/kms/setup"
	"github.com/keyagent/keyagent/luks"
	"github.com/keyagent/keyagent/storage"
	"github.com/keyagent/keyagent/test/cloud/awskms"
	"github.com/keyagent/keyagent/test/cloud/azurevault"
	"github.com/keyagent/keyagent/test/cloud/entra"
	"github.com/keyagent/keyagent/test/cloud/gcpkms"
	"github.com/keyagent/keyagent/test/emulator"
	"github.com/keyagent/keyagent/test/faultproxy"
)

// cloudShape is the URIs of one cloud, and what its owner can do to it.
type cloudShape struct {
	kms, storage string
	disable      func(disabled bool) // the KEK
	throttle     func() (stop func())
	gone         func() (back func()) // the bucket
}

// file writes a file that its owner alone can read, and returns its path.
func file(t *testing.T, dir, name, text string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	must(t, os.WriteFile(path, []byte(text), 0o600))
	return path
}

func uri(name string, params map[string]string) string {
	v := url.Values{}
	for k, p := range params {
		v.Set(k, p)
	}
	return name + "?" + v.Encode()
}

func status(code int) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, _ *http.Request) bool { w.WriteHeader(code); return true }
}

var cloudShapes = map[string]func(t *testing.T) cloudShape{
	"AWS": func(t *testing.T) cloudShape {
		const region = "us-east-1"
		dir, s3 := t.TempDir(), emulator.S3(t)
		service := awskms.New("AKIDEXAMPLE", "secret-of-the-kms")
		arn := service.CreateKey(region)
		service.SetAlias("alias/disks", arn)
		front, bucket := faultproxy.Handle(t, service.Region(region)), faultproxy.New(t, s3.URL)
		return cloudShape{
			kms: uri("kms://aws", map[string]string{
				"keyName": "alias/disks", "region": region, "endpoint": front.URL,
				"accessKeyIDFile": file(t, dir, "kms-id", "AKIDEXAMPLE\n"), "accessKeyFile": file(t, dir, "kms-key", "secret-of-the-kms\n"),
			}),
			storage: uri("storage://aws", map[string]string{
				"bucket": "records", "prefix": "p", "region": region, "endpoint": bucket.URL, "createBucket": "true",
				"accessKeyIDFile": file(t, dir, "s3-id", s3.AccessKey), "accessKeyFile": file(t, dir, "s3-key", s3.Secret),
			}),
			disable: func(off bool) { service.SetState(arn, map[bool]string{true: "Disabled", false: "Enabled"}[off]) },
			throttle: func() func() {
				front.Answer(func(w http.ResponseWriter, _ *http.Request) bool {
					w.WriteHeader(http.StatusBadRequest)
					fmt.Fprint(w, `{"__type":"ThrottlingException","message":"Rate exceeded"}`)
					return true
				})
				return front.Heal
			},
			gone: func() func() {
				bucket.Answer(func(w http.ResponseWriter, _ *http.Request) bool {
					w.WriteHeader(http.StatusNotFound)
					fmt.Fprint(w, `<Error><Code>NoSuchBucket</Code><Message>The specified bucket does not exist</Message></Error>`)
					return true
				})
				return bucket.Heal
			},
		}
	},
	"Google": func(t *testing.T) cloudShape {
		service := &gcpkms.Service{}
		name := gcpkms.KeyName("project", "europe-west3", "ring", "disks")
		service.CreateKey(name, kmspb.CryptoKey_ENCRYPT_DECRYPT)
		front, bucket := faultproxy.New(t, service.Start(t)), faultproxy.New(t, emulator.GCS(t))
		return cloudShape{
			kms: uri("kms://gcp", map[string]string{
				"projectID": "project", "location": "europe-west3", "keyRing": "ring", "keyName": "disks", "endpoint": front.URL,
			}),
			storage: uri("storage://gcp", map[string]string{
				"bucket": "records", "prefix": "p", "projectID": "project", "createBucket": "true", "endpoint": bucket.URL,
			}),
			disable: func(off bool) {
				service.SetState(name, 1, map[bool]kmspb.CryptoKeyVersion_CryptoKeyVersionState{
					true: kmspb.CryptoKeyVersion_DISABLED, false: kmspb.CryptoKeyVersion_ENABLED}[off])
			},
			throttle: func() func() {
				front.Answer(func(w http.ResponseWriter, _ *http.Request) bool {
					w.Header().Set("Content-Type", "application/grpc")
					w.Header().Set("Grpc-Status", "8") // RESOURCE_EXHAUSTED
					w.Header().Set("Grpc-Message", "Quota exceeded")
					return true
				})
				return front.Heal
			},
			gone: func() func() { bucket.Answer(status(http.StatusNotFound)); return bucket.Heal },
		}
	},
	"Azure": func(t *testing.T) cloudShape {
		dir := t.TempDir()
		authority := &entra.Authority{Tenant: "6f1d3a52-1c6b-4f0c-9a53-0d8a4a6b7c11", Client: "0d8a4a6b-1c6b-4f0c-9a53-6f1d3a527c11", Secret: "secret-of-the-client"}
		login := faultproxy.HandleTLS(t, authority)
		vault := &azurevault.Vault{Host: "kek.vault.azure.net", Authority: login.URL + "/" + authority.Tenant}
		vault.Accepts = func(token string) bool { return authority.Accepts(token, vault.Resource()) }
		must(t, vault.CreateKey("disks", "RSA"))
		front := faultproxy.HandleTLS(t, vault)
		blobs := faultproxy.NewTLS(t, strings.TrimSuffix(emulator.AzureBlob(t).URL, "/devstoreaccount1"))
		common := map[string]string{
			"tenantID": authority.Tenant, "clientID": authority.Client, "clientSecretFile": file(t, dir, "secret", authority.Secret+"\n"),
			"authorityHost": login.URL + "/", "caFile": file(t, dir, "ca.pem", string(front.PEM)),
		}
		with := func(more map[string]string) map[string]string {
			for k, v := range common {
				more[k] = v
			}
			return more
		}
		return cloudShape{
			kms: uri("kms://azure", with(map[string]string{
				"vaultName": "kek", "vaultType": "keyvault", "keyName": "disks", "endpoint": front.URL,
			})),
			storage: uri("storage://azure", with(map[string]string{
				"account": "devstoreaccount1", "container": "records", "prefix": "p", "createContainer": "true", "endpoint": blobs.URL + "/devstoreaccount1",
			})),
			disable:  func(off bool) { vault.Enable("disks", !off) },
			throttle: func() func() { front.Answer(status(http.StatusTooManyRequests)); return front.Heal },
			gone: func() func() {
				blobs.Answer(func(w http.ResponseWriter, _ *http.Request) bool {
					w.Header().Set("x-ms-error-code", "ContainerNotFound")
					w.WriteHeader(http.StatusNotFound)
					return true
				})
				return blobs.Heal
			},
		}
	},
}

// cloudService is keyagent serve on one cloud, and a machine with a TPM.
type cloudService struct {
	*lab
	dir     string
	log     string
	process *exec.Cmd
	client  *agent.Client
	raw     setup.Objects // the storage in the hands of whoever can write it
}

func newCloudService(t *testing.T, shape cloudShape) *cloudService {
	t.Helper()
	s := &cloudService{lab: newLab(t)}
	s.dir = s.folder(t)
	s.log = filepath.Join(s.dir, "serve.log")
	config := fmt.Sprintf(labService, s.address)
	config = strings.NewReplacer("kms://cluster-kms?file=master.secret", `"`+shape.kms+`"`, "storage://file?dir=records", `"`+shape.storage+`"`).Replace(config)
	must(t, os.WriteFile(filepath.Join(s.dir, "serve.yaml"), []byte(config), 0o600))
	policy := strings.Replace(fmt.Sprintf(labPolicy, s.tpm.Authority.IssuerPath()), `volumes: ["data"]`, `volumes: ["data", "other"]`, 1)
	must(t, os.WriteFile(filepath.Join(s.dir, "policy.yaml"), []byte(policy), 0o600))
	s.start(t)
	agentConfig, err := os.ReadFile(filepath.Join(s.dir, "agent.yaml"))
	must(t, err)
	// A refusal that another try could change is tried for as long as the slowest
	// of the SDKs needs for all of its own tries.
	must(t, os.WriteFile(filepath.Join(s.dir, "agent.yaml"), bytes.Replace(agentConfig, []byte("budget: 20s"), []byte("budget: 12s"), 1), 0o600))
	s.raw, err = setup.Storage(t.Context(), shape.storage)
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
	k, err := s.client.GetKey(t.Context(), volume, false)
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
		k, err := s.client.GetKey(ctx, "data", format)
		cancel()
		if err == nil {
			t.Errorf("format %v: a key of state pending=%v came", format, k.Pending)
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

// Show 4, cases 40 to 43: keyagent serve runs on each cloud's KMS and storage, and
// delivers to an attested machine. What storage or the KMS does wrong has errors
// of its own, and never a new key.
func TestEachCloudDeliversKeysAndWhatGoesWrongHasAName(t *testing.T) {
	for name, shape := range cloudShapes {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cloud := shape(t)
			s := newCloudService(t, cloud)
			var pending []byte // the record of data before it was confirmed
			for _, volume := range []string{"data", "other"} {
				k, err := s.client.GetKey(t.Context(), volume, true)
				must(t, err)
				if volume == "data" {
					pending, _, err = s.raw.Get(t.Context(), "volumes/data")
					must(t, err)
				}
				must(t, s.client.Confirm(t.Context(), k, luks.MAC{1}))
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
			good, version, err := s.raw.Get(t.Context(), object)
			must(t, err)
			theirs, _, err := s.raw.Get(t.Context(), "volumes/other")
			must(t, err)
			put := func(data []byte) {
				t.Helper()
				version, err = s.raw.Put(t.Context(), object, data, version)
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

			put(pending)
			s.refused(t, failure.Tampered, "has revision 1, 2 was seen")
			put(good)

			cloud.disable(true)
			s.refused(t, failure.Configuration, "key-encryption key cannot be used")
			cloud.disable(false)
			stop := cloud.throttle()
			s.refuses(t, failure.Unreachable, "too many requests", false)
			stop()
			back := cloud.gone()
			s.refused(t, failure.Configuration, "there is no such bucket")
			back()
			if !s.key(t, "data").Equal(want) {
				t.Error("after the KMS was back, another key came")
			}

			must(t, s.raw.Delete(t.Context(), object, version))
			s.refused(t, failure.Tampered, "is gone, its revision 2 was seen")
			if _, _, err := s.raw.Get(t.Context(), object); err == nil {
				t.Error("a new record was made for a volume that was active")
			}
			version = storage.Absent
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
