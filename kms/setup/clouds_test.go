//go:build !keyagent_noaws && !keyagent_noazure && !keyagent_nogcp && !keyagent_noetcd

package setup

import (
	"crypto/sha256"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/keyagent/keyagent/kms/dek"
	"github.com/keyagent/keyagent/kms/dek/dektest"
	"github.com/keyagent/keyagent/test/sim/cloud"
	"github.com/keyagent/keyagent/test/sim/emulator"
)

// pairs runs the suite of dek over one KMS and storage by their URIs.
func pairs(t *testing.T, kmsURI string, storageURI func(t *testing.T) string) {
	dektest.Run(t, func(t *testing.T) dektest.Bed {
		uri := storageURI(t)
		raw, err := Storage(t.Context(), uri)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { raw.Close() })
		return dektest.Bed{Open: func() (*dek.Store, error) { return DEKs(t.Context(), kmsURI, uri) }, Storage: raw}
	})
}

// prefix is one that no other test has.
func prefix(t *testing.T) string { return fmt.Sprintf("p%x", sha256.Sum256([]byte(t.Name()))) }

func TestTheSuiteHoldsOnEachCloudByURI(t *testing.T) {
	for name, start := range cloud.Shapes {
		t.Run(name, func(t *testing.T) {
			shape := start(t)
			pairs(t, shape.KMS, func(t *testing.T) string { return shape.Storage(prefix(t)) })
		})
	}
}

func TestTheSuiteHoldsWithoutACloudByURI(t *testing.T) {
	master := filepath.Join(t.TempDir(), "master")
	if err := os.WriteFile(master, make([]byte, 32), 0o600); err != nil {
		t.Fatal(err)
	}
	etcd := emulator.Etcd(t)
	for kmsName, kmsURI := range map[string]string{
		"cluster": "kms://cluster-kms?file=" + master, "command": "kms://command?command=printf%200123456789abcdef",
	} {
		for storageName, storageURI := range map[string]func(t *testing.T) string{
			"file": func(t *testing.T) string { return "storage://file?dir=" + filepath.Join(t.TempDir(), "records") },
			"etcd": func(t *testing.T) string {
				return "storage://etcd?" + url.Values{"endpoints": {etcd}, "prefix": {prefix(t)}}.Encode()
			},
		} {
			t.Run(kmsName+" and "+storageName, func(t *testing.T) { pairs(t, kmsURI, storageURI) })
		}
	}
}

// Case 46: the parameters of every backend, each missing, unknown or contradicting
// another; and no error repeats a value.
func TestEachCloudsURIIsStrict(t *testing.T) {
	storage := map[string]string{
		"aws": "bucket=hunter2", "gcp": "bucket=hunter2", "azure": "account=hunter2&container=hunter2", "etcd": "endpoints=http://127.0.0.1:1",
	}
	keys := map[string]string{
		"aws": "keyName=hunter2&region=eu-central-1", "gcp": "projectID=hunter2&location=l&keyRing=r&keyName=k",
		"azure": "vaultName=hunter2&vaultType=keyvault&keyName=k",
	}
	refused := func(uri string) error {
		var err error
		if strings.HasPrefix(uri, "kms") {
			_, err = KMS(t.Context(), uri)
		} else {
			_, err = Storage(t.Context(), uri)
		}
		if err == nil || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: %v", uri, err)
		}
		return err
	}
	for scheme, backends := range map[string]map[string]string{"kms": keys, "storage": storage} {
		for name, good := range backends {
			base := scheme + "://" + name + "?"
			refused(base + good + "&unknown=hunter2")
			for left := range strings.SplitSeq(good, "&") {
				if param, _, _ := strings.Cut(left, "="); param != "region" {
					err := refused(base + strings.Trim(strings.ReplaceAll("&"+good+"&", "&"+left+"&", "&"), "&"))
					if !strings.Contains(fmt.Sprint(err), `"`+param+`"`) {
						t.Errorf("%s without %s: %v", name, param, err)
					}
				}
			}
		}
	}
	for _, uri := range []string{
		"kms://aws?" + keys["aws"] + "&accessKeyID=hunter2", "kms://aws?" + keys["aws"] + "&sessionToken=hunter2",
		"kms://aws?" + keys["aws"] + "&accessKeyID=x&accessKey=hunter2&accessKeyFile=hunter2", "kms://aws?" + keys["aws"] + "&endpoint=http://hunter2",
		"kms://azure?" + keys["azure"] + "&cloud=hunter2", "kms://azure?" + keys["azure"] + "&clientSecret=hunter2", "kms://azure?" + keys["azure"] + "&tenantID=hunter2",
		"kms://azure?" + strings.Replace(keys["azure"], "keyvault", "hunter2", 1) + "&tenantID=t&clientID=c&clientSecret=s",
		"kms://azure?" + strings.Replace(keys["azure"], "keyvault", "vault.microsoftazure.de", 1) + "&tenantID=t&clientID=c&clientSecret=s",
		"kms://azure?" + keys["azure"] + "&tenantID=t&clientID=c&clientSecret=s&authorityHost=http://hunter2",
		"kms://gcp?" + keys["gcp"] + "&credentialsPath=hunter2&credentialsCredential=hunter2",
		"storage://azure?" + storage["azure"] + "&createContainer=hunter2", "storage://gcp?" + storage["gcp"] + "&createBucket=hunter2",
		"storage://etcd?endpoints=http://hunter2:1", "storage://etcd?" + storage["etcd"] + "&certFile=hunter2",
	} {
		refused(uri)
	}
}

func TestGoogleCredentialsAreThoseOfAWorkload(t *testing.T) {
	for name, text := range map[string]string{
		"a person's": `{"type":"authorized_user","client_id":"a","client_secret":"hunter2","refresh_token":"hunter2"}`,
		"no type":    `{"private_key":"hunter2"}`, "no JSON": "hunter2", "a service account without a key": `{"type":"service_account","private_key":"hunter2"}`,
	} {
		path := filepath.Join(t.TempDir(), "credentials")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		k, err := KMS(t.Context(), "kms://gcp?projectID=project&location=l&keyRing=r&keyName=k&credentialsPath="+path)
		if err == nil || k != nil || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestADocumentCommandIsBounded(t *testing.T) {
	for text, want := range map[string]string{
		"cat": "a public key", "true": "", "exit 3": "", "head -c 20000 /dev/zero": "",
	} {
		got, err := documentCommand(text).Document(t.Context(), []byte("a public key"))
		if string(got) != want || (err == nil) != (want != "") {
			t.Errorf("%s: %q, %v", text, got, err)
		}
	}
}
