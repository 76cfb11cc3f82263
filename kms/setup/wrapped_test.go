package setup

import (
	"encoding/json"
	"errors"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/kms/cluster"
	"github.com/keyagent/keyagent/test/sim/cloud"
)

// The master secret comes from each cloud at the start, and gives the keys that it gave as a
// file. The cloud is not asked again.
func TestAMasterSecretIsUnwrappedAtTheStart(t *testing.T) {
	for name, shape := range cloud.Shapes {
		t.Run(name, func(t *testing.T) {
			shape := shape(t)
			dir := t.TempDir()
			plain, path := filepath.Join(dir, "master"), filepath.Join(dir, "wrapped")
			if err := cluster.InitMasterSecret(plain); err != nil {
				t.Fatal(err)
			}
			master, err := cluster.LoadMasterSecret(plain)
			if err != nil {
				t.Fatal(err)
			}
			defer master.Close()
			if err := WrapMaster(t.Context(), master, path, shape.KMS); err != nil {
				t.Fatal(err)
			}
			if err := WrapMaster(t.Context(), master, path, shape.KMS); !errors.Is(err, fs.ErrExist) {
				t.Errorf("over one that is there: %v", err)
			}
			uri := wrappedURI(path, shape.KMS)
			k, err := KMS(t.Context(), uri)
			if err != nil {
				t.Fatal(err)
			}
			defer k.Close()
			same, err := KMS(t.Context(), "kms://cluster-kms?file="+plain)
			if err != nil {
				t.Fatal(err)
			}
			defer same.Close()
			shape.Disable(true)
			b := kms.Binding{VolumeID: "data-1", Purpose: kms.VolumeDEK, Version: 1, Length: 32}
			one, _, err := k.Generate(t.Context(), b)
			if err != nil {
				t.Fatal(err)
			}
			defer one.Close()
			two, _, err := same.Generate(t.Context(), b)
			if err != nil {
				t.Fatal(err)
			}
			defer two.Close()
			if !one.Equal(two) {
				t.Error("it gives other keys")
			}
			if _, err := KMS(t.Context(), uri); !errors.Is(err, kms.ErrKEK) {
				t.Errorf("a KEK that is disabled: %v", err)
			}
			shape.Disable(false)

			// Another length, version or blob is another secret, or none.
			data, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			var w wrappedMaster
			if err := json.Unmarshal(data, &w); err != nil {
				t.Fatal(err)
			}
			w.Length = 16
			changed, err := json.Marshal(w)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, changed, 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := KMS(t.Context(), uri); err == nil {
				t.Error("another length than was wrapped")
			}
		})
	}
}

func wrappedURI(path, by string) string {
	return "kms://cluster-kms?wrappedFile=" + url.QueryEscape(path) + "&wrappedBy=" + url.QueryEscape(by)
}

// A first start makes it, a second one leaves it alone.
func TestAWrappedMasterSecretIsMadeOnce(t *testing.T) {
	dir := t.TempDir()
	path, kek := filepath.Join(dir, "wrapped"), filepath.Join(dir, "kek")
	if err := os.WriteFile(kek, []byte(strings.Repeat("k", 32)), 0o600); err != nil {
		t.Fatal(err)
	}
	uri := wrappedURI(path, "kms://command?command="+url.QueryEscape("cat "+kek))
	if _, err := KMS(t.Context(), uri); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "--init-master-secret") {
		t.Fatal(err)
	}
	var first []byte
	for range 2 {
		if err := InitMaster(t.Context(), uri); err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if first == nil {
			first = data
		}
		if string(data) != string(first) {
			t.Error("the second start made another one")
		}
	}
	k, err := KMS(t.Context(), uri)
	if err != nil {
		t.Fatal(err)
	}
	k.Close()
	if err := InitMaster(t.Context(), "kms://aws?keyName=k"); !errors.Is(err, kms.ErrURI) {
		t.Error(err)
	}
	if err := os.WriteFile(kek, []byte(strings.Repeat("x", 32)), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := KMS(t.Context(), uri); !errors.Is(err, kms.ErrWrongKey) && !errors.Is(err, kms.ErrKEKVersion) {
		t.Errorf("under another KEK: %v", err)
	}
}

func TestAURIOfAWrappedMasterSecretIsStrict(t *testing.T) {
	for name, uri := range map[string]string{
		"by nobody":                "kms://cluster-kms?wrappedFile=x",
		"no file":                  "kms://cluster-kms?wrappedBy=kms%3A%2F%2Faws%3FkeyName%3Dk",
		"a file and a wrapped one": "kms://cluster-kms?file=y&wrappedFile=x&wrappedBy=kms%3A%2F%2Faws%3FkeyName%3Dk",
	} {
		if _, err := KMS(t.Context(), uri); !errors.Is(err, kms.ErrURI) {
			t.Errorf("%s: %v", name, err)
		}
	}
	dir := t.TempDir()
	path := filepath.Join(dir, "wrapped")
	good := `{"version":1,"length":32,"wrapped":{"scheme":"x","kek":"x"}}`
	if err := os.WriteFile(path, []byte(good), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, by := range []string{"kms://cluster-kms?file=x", "nonsense", "kms://nobody", "kms://vault?address=x"} {
		if _, err := KMS(t.Context(), wrappedURI(path, by)); !errors.Is(err, kms.ErrURI) && !strings.Contains(err.Error(), "wrappedBy") {
			t.Errorf("%s: %v", by, err)
		}
	}
	// Not even one whose master secret is there: it would have to lie somewhere.
	master := filepath.Join(dir, "master")
	if err := cluster.InitMasterSecret(master); err != nil {
		t.Fatal(err)
	}
	if _, err := KMS(t.Context(), wrappedURI(path, "kms://cluster-kms?file="+url.QueryEscape(master))); !errors.Is(err, kms.ErrURI) {
		t.Errorf("wrapped by another cluster KMS: %v", err)
	}
	if _, err := parseWrapped([]byte(good)); err != nil {
		t.Error(err)
	}
	for _, bad := range []string{
		"", "{}", good + good, good + "x", good[:len(good)-1] + `,"more":1}`, strings.Replace(good, "1", "2", 1), strings.Replace(good, "32", "8", 1), strings.Replace(good, "32", "65", 1),
	} {
		if _, err := parseWrapped([]byte(bad)); !errors.Is(err, ErrWrapped) {
			t.Errorf("%s: %v", bad, err)
		}
	}
	if name, _ := HoldsSecret(wrappedURI(path, "kms://aws?keyName=k&accessKey=hunter2")); name != "accessKey" {
		t.Errorf("a secret within: %q", name)
	}
	r, err := ReachOf(wrappedURI(path, "kms://command?command=x"))
	if err != nil || !r.Commands || len(r.Read) != 1 || r.Read[0] != path {
		t.Errorf("%+v, %v", r, err)
	}
}

func FuzzWrappedMaster(f *testing.F) {
	f.Add([]byte(`{"version":1,"length":32,"wrapped":{"scheme":"x","kek":"y","blob":"aa=="}}`))
	f.Add([]byte(`{"version":2}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		w, err := parseWrapped(data)
		if err != nil && !errors.Is(err, ErrWrapped) {
			t.Fatal(err)
		}
		if err == nil && (w.Version != 1 || masterBinding(w.Length).Validate() != nil) {
			t.Fatalf("%+v", w)
		}
	})
}
