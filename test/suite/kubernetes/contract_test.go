package kubernetes

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/server/options/encryptionconfig"
	"k8s.io/apiserver/pkg/storage/value"
	utilfeature "k8s.io/apiserver/pkg/util/feature"

	"github.com/keyagent/keyagent/internal/kubekms"
	"github.com/keyagent/keyagent/internal/kubekms/encryption"
)

func TestMain(m *testing.M) {
	if err := utilfeature.DefaultMutableFeatureGate.Set("KMSv1=true"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// apiServer is what of kube-apiserver reads and writes encrypted objects.
type apiServer struct {
	secrets value.Transformer
	ready   func() error
}

func load(t *testing.T, path string) *apiServer {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	c, err := encryptionconfig.LoadEncryptionConfig(ctx, path, true, "api-server-1")
	if err != nil {
		t.Fatal(err)
	}
	return &apiServer{
		secrets: encryptionconfig.StaticTransformers(c.Transformers).TransformerForResource(schema.GroupResource{Resource: "secrets"}),
		ready: func() error {
			r, err := http.NewRequest(http.MethodGet, "/", nil)
			if err != nil {
				return err
			}
			for _, check := range c.HealthChecks {
				if err := check.Check(r); err != nil {
					return err
				}
			}
			return nil
		},
	}
}

var place = value.DefaultContext("/registry/secrets/default/one")

func (a *apiServer) write(t *testing.T, text string) []byte {
	t.Helper()
	out, err := a.secrets.TransformToStorage(t.Context(), []byte(text), place)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(out, []byte(text)) {
		t.Fatalf("%q is in etcd in plaintext", text)
	}
	return out
}

func (a *apiServer) read(t *testing.T, stored []byte, want string) (stale bool) {
	t.Helper()
	got, stale, err := a.secrets.TransformFromStorage(t.Context(), stored, place)
	if err != nil || string(got) != want {
		t.Errorf("%q, %v", got, err)
	}
	return stale
}

// TestRestartsOfEitherSideInAnyOrder: what was written is read.
func TestRestartsOfEitherSideInAnyOrder(t *testing.T) {
	for _, tt := range []struct {
		api  string
		mode kubekms.Mode
	}{{"v2", kubekms.AESGCM}, {"v2", kubekms.AESCBC}, {"v1", kubekms.AESGCM}, {"v1", kubekms.AESCBC}} {
		t.Run(tt.api+" "+string(tt.mode), func(t *testing.T) {
			socket := filepath.Join(folder(t), "s")
			stop := start(t, socket, tt.mode, keks{kekA})
			path := configuration(t, provider(tt.api, "keyagent-"+tt.api+string(tt.mode), socket))
			one := load(t, path)
			if err := one.ready(); err != nil {
				t.Fatal(err)
			}
			first := one.write(t, "the first secret")
			stop()
			start(t, socket, kubekms.AESGCM, keks{kekA})
			second := one.write(t, "the second secret")
			two := load(t, path)
			for _, a := range []*apiServer{one, two} {
				a.read(t, first, "the first secret")
				a.read(t, second, "the second secret")
			}
			if err := two.ready(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestARotationUnderAWriteLoadLosesNothing changes the KEK while objects are written:
// no write and no read fails, and what was written before is stale afterwards.
func TestARotationUnderAWriteLoadLosesNothing(t *testing.T) {
	socket := filepath.Join(folder(t), "s")
	stop := start(t, socket, kubekms.AESGCM, keks{kekA})
	a := load(t, configuration(t, provider("v2", "keyagent-rotation", socket)))
	if err := a.ready(); err != nil {
		t.Fatal(err)
	}
	before := a.write(t, "before")
	if a.read(t, before, "before") {
		t.Error("it is stale already")
	}
	ctx, cancel := context.WithCancel(t.Context())
	var load sync.WaitGroup
	writes := 0
	load.Go(func() {
		for ctx.Err() == nil {
			out, err := a.secrets.TransformToStorage(context.Background(), []byte("load"), place)
			if err == nil {
				_, _, err = a.secrets.TransformFromStorage(context.Background(), out, place)
			}
			if err != nil {
				t.Errorf("after %d writes: %v", writes, err)
				return
			}
			writes++
			time.Sleep(time.Millisecond)
		}
	})
	stop()
	start(t, socket, kubekms.AESGCM, keks{kekB, kekA})
	// The API server's own health check asks for Status at most each 20 seconds.
	stale := false
	for end := time.Now().Add(80 * time.Second); !stale && time.Now().Before(end); time.Sleep(time.Second) {
		_ = a.ready()
		stale = a.read(t, before, "before")
	}
	if !stale {
		t.Error("the API server does not notice another key_id")
	}
	if a.read(t, a.write(t, "after"), "after") {
		t.Error("what is written now is stale")
	}
	cancel()
	load.Wait()
	if writes < 100 {
		t.Errorf("only %d writes", writes)
	}
}

// TestTheMigrationFrom2018 goes through the runbook's steps: v1 with the old format,
// then v2 before it.
func TestTheMigrationFrom2018(t *testing.T) {
	socket := filepath.Join(folder(t), "s")
	stop := start(t, socket, kubekms.AESCBC, keks{kekA})
	old := load(t, configuration(t, provider("v1", "old", socket))).write(t, "a secret of 2018")
	stop()
	start(t, socket, kubekms.AESGCM, keks{kekA})
	both := load(t, configuration(t, provider("v2", "new", socket)+provider("v1", "old", socket)))
	if !both.read(t, old, "a secret of 2018") {
		t.Error("it is not stale, although another provider writes")
	}
	rewritten := both.write(t, "a secret of 2018")
	load(t, configuration(t, provider("v2", "new2", socket)+provider("v2", "new", socket+""))).read(t, rewritten, "a secret of 2018")
}

// TestTheDoctorRefusesWhatKubeAPIServerRefuses compares both ways.
func TestTheDoctorRefusesWhatKubeAPIServerRefuses(t *testing.T) {
	const head = "apiVersion: apiserver.config.k8s.io/v1\nkind: EncryptionConfiguration\n"
	kms := func(fields string) string {
		return head + "resources:\n- resources: [secrets]\n  providers:\n  - kms: {" + fields + "}\n"
	}
	list := func(names string) string {
		return head + "resources:\n- resources: [" + names + "]\n  providers:\n  - identity: {}\n"
	}
	key := func(kind, secret string) string {
		return head + "resources:\n- resources: [secrets]\n  providers:\n  - " + kind + ": {keys: [{name: k, secret: " + secret + "}]}\n"
	}
	const k16, k32 = "MDEyMzQ1Njc4OWFiY2RlZg==", "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
	for i, text := range []string{
		head, head + "resources: []\n",
		kms("apiVersion: v2, name: d1, endpoint: 'unix:///s'"), kms("name: d2, endpoint: 'unix:///s'"),
		kms("apiVersion: v3, name: d3, endpoint: 'unix:///s'"), kms("apiVersion: v2, name: '', endpoint: 'unix:///s'"),
		kms("apiVersion: v2, name: 'd:4', endpoint: 'unix:///s'"), kms("apiVersion: v1, name: 'd:5', endpoint: 'unix:///s'"),
		kms("apiVersion: v2, name: d6"), kms("apiVersion: v2, name: d7, endpoint: 'tcp:///s'"),
		kms("apiVersion: v2, name: d8, endpoint: 'unix:///s', cachesize: 1"), kms("apiVersion: v1, name: d9, endpoint: 'unix:///s', cachesize: 0"),
		kms("apiVersion: v1, name: d10, endpoint: 'unix:///s', cachesize: -1"), kms("apiVersion: v2, name: d11, endpoint: 'unix:///s', timeout: 0s"),
		kms("apiVersion: v2, name: d12, endpoint: 'unix:///s', timeout: -1s"), kms("apiVersion: v2, name: d13, endpoint: 'unix:///s', typo: 1"),
		kms("apiVersion: v2, name: d14, endpoint: 'unix:///s'}\n  - kms: {apiVersion: v2, name: d14, endpoint: 'unix:///s'"),
		list("secrets"), list(""), list("secrets, secrets"), list("secrets, '*.'"), list("'*'"), list("'*.*'"), list("'*.*', secrets"),
		list("Secrets"), list("'secrets.*'"), list("'*.apps', deployments.apps"), list("'*.apps', secrets"), list("x.extensions"), list("'*.events.k8s.io'"), list("x.events.k8s.io"),
		list("apiserveripinfo"), list("serviceipallocations"),
		head + "resources:\n- resources: [secrets]\n  providers: []\n", head + "resources:\n- resources: [secrets]\n  providers: [{}]\n",
		head + "resources:\n- resources: [secrets]\n  providers:\n  - identity: {}\n    aesgcm: {keys: [{name: k, secret: " + k16 + "}]}\n",
		key("aesgcm", k16), key("aescbc", k32), key("secretbox", k32), key("secretbox", k16), key("aesgcm", "AAAA"), key("aesgcm", "'not base64'"), key("aesgcm", "''"),
		head + "resources:\n- resources: [secrets]\n  providers:\n  - aesgcm: {keys: []}\n",
		"apiVersion: v1\nkind: Pod\n", "",
		strings.Replace(list("secrets"), head, "apiVersion: v1\nkind: EncryptionConfig\n", 1),
		strings.Replace(list("secrets"), head, "apiVersion: v1\nkind: EncryptionConfiguration\n", 1),
		strings.Replace(list("secrets"), head, "apiVersion: apiserver.config.k8s.io/v1\nkind: EncryptionConfig\n", 1),
	} {
		path := filepath.Join(folder(t), "e.yaml")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		_, err := encryptionconfig.LoadEncryptionConfig(ctx, path, true, "api-server-1")
		cancel()
		ours := false
		if f, err := encryption.Read(path); err != nil {
			ours = true
		} else {
			for _, one := range encryption.Diagnose(f) {
				ours = ours || one.Severity == encryption.Refused
			}
		}
		if ours != (err != nil) {
			t.Errorf("%d: the doctor refuses: %v; kube-apiserver: %v\n%s", i, ours, err, text)
		}
	}
}
