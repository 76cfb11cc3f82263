// Package cloud puts together what stands in for a whole cloud in tests: a KMS of
// the packages below, a storage of package emulator, and the URIs by which keyagent
// finds both.
package cloud

import (
	"fmt"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"cloud.google.com/go/kms/apiv1/kmspb"

	"github.com/keyagent/keyagent/test/sim/cloud/awskms"
	"github.com/keyagent/keyagent/test/sim/cloud/azurevault"
	"github.com/keyagent/keyagent/test/sim/cloud/entra"
	"github.com/keyagent/keyagent/test/sim/cloud/gcpkms"
	"github.com/keyagent/keyagent/test/sim/emulator"
	"github.com/keyagent/keyagent/test/sim/faultproxy"
)

// Shape is one cloud's KMS and storage, and what its owner can do to them.
type Shape struct {
	// KMS is the URI of a KEK.
	KMS string
	// Storage is the URI of a bucket, which is made, with a prefix in it.
	Storage func(prefix string) string
	// Disable disables the KEK, or enables it again.
	Disable func(disabled bool)
	// Throttle has the KMS refuse every call as one too many until stop is
	// called.
	Throttle func() (stop func())
	// Deny takes the permission to wrap from anyone who asks; Permission is what the
	// cloud calls it.
	Deny       func()
	Permission string
	// Gone has the bucket be gone until back is called.
	Gone func() (back func())
}

func grpcStatus(w http.ResponseWriter, code, message string) bool {
	w.Header().Set("Content-Type", "application/grpc")
	w.Header().Set("Grpc-Status", code)
	w.Header().Set("Grpc-Message", message)
	return true
}

// Shapes are the clouds by name. Each of them starts its services on loopback, for
// as long as the test takes.
var Shapes = map[string]func(t testing.TB) Shape{"AWS": AWS, "Google": Google, "Azure": Azure}

// file writes a file that its owner alone can read, and returns its path.
func file(t testing.TB, dir, name, text string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	must(t, os.WriteFile(path, []byte(text), 0o600))
	return path
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
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

// AWS is AWS KMS and S3.
func AWS(t testing.TB) Shape {
	const region = "us-east-1"
	dir, s3 := t.TempDir(), emulator.S3(t)
	service := awskms.New("AKIDEXAMPLE", "secret-of-the-kms")
	arn := service.CreateKey(region)
	service.SetAlias("alias/disks", arn)
	front, bucket := faultproxy.Handle(t, service.Region(region)), faultproxy.New(t, s3.URL)
	return Shape{
		KMS: uri("kms://aws", map[string]string{
			"keyName": "alias/disks", "region": region, "endpoint": front.URL,
			"accessKeyIDFile": file(t, dir, "kms-id", "AKIDEXAMPLE\n"), "accessKeyFile": file(t, dir, "kms-key", "secret-of-the-kms\n"),
		}),
		Storage: func(prefix string) string {
			return uri("storage://aws", map[string]string{
				"bucket": "records", "prefix": prefix, "region": region, "endpoint": bucket.URL, "createBucket": "true",
				"accessKeyIDFile": file(t, dir, "s3-id", s3.AccessKey), "accessKeyFile": file(t, dir, "s3-key", s3.Secret),
			})
		},
		Disable: func(off bool) { service.SetState(arn, map[bool]string{true: "Disabled", false: "Enabled"}[off]) },
		Throttle: func() func() {
			front.Answer(func(w http.ResponseWriter, _ *http.Request) bool {
				w.WriteHeader(http.StatusBadRequest)
				fmt.Fprint(w, `{"__type":"ThrottlingException","message":"Rate exceeded"}`)
				return true
			})
			return front.Heal
		},
		Deny: func() {
			front.Answer(func(w http.ResponseWriter, r *http.Request) bool {
				denied := strings.HasSuffix(r.Header.Get("X-Amz-Target"), ".Encrypt")
				if denied {
					w.WriteHeader(http.StatusBadRequest)
					fmt.Fprint(w, `{"__type":"AccessDeniedException","Message":"User is not authorized to perform: kms:Encrypt"}`)
				}
				return denied
			})
		},
		Permission: "kms:Encrypt",
		Gone: func() func() {
			bucket.Answer(func(w http.ResponseWriter, _ *http.Request) bool {
				w.WriteHeader(http.StatusNotFound)
				fmt.Fprint(w, `<Error><Code>NoSuchBucket</Code><Message>The specified bucket does not exist</Message></Error>`)
				return true
			})
			return bucket.Heal
		},
	}
}

// Google is Cloud KMS and Cloud Storage of Google.
func Google(t testing.TB) Shape {
	service := &gcpkms.Service{}
	name := gcpkms.KeyName("project", "europe-west3", "ring", "disks")
	service.CreateKey(name, kmspb.CryptoKey_ENCRYPT_DECRYPT)
	front, bucket := faultproxy.New(t, service.Start(t)), faultproxy.New(t, emulator.GCS(t))
	return Shape{
		KMS: uri("kms://gcp", map[string]string{
			"projectID": "project", "location": "europe-west3", "keyRing": "ring", "keyName": "disks", "endpoint": front.URL,
		}),
		Storage: func(prefix string) string {
			return uri("storage://gcp", map[string]string{
				"bucket": "records", "prefix": prefix, "projectID": "project", "createBucket": "true", "endpoint": bucket.URL,
			})
		},
		Disable: func(off bool) {
			service.SetState(name, 1, map[bool]kmspb.CryptoKeyVersion_CryptoKeyVersionState{
				true: kmspb.CryptoKeyVersion_DISABLED, false: kmspb.CryptoKeyVersion_ENABLED}[off])
		},
		Throttle: func() func() {
			front.Answer(func(w http.ResponseWriter, _ *http.Request) bool {
				return grpcStatus(w, "8", "Quota exceeded") // RESOURCE_EXHAUSTED
			})
			return front.Heal
		},
		Deny: func() {
			front.Answer(func(w http.ResponseWriter, r *http.Request) bool {
				return strings.HasSuffix(r.URL.Path, "/Encrypt") && grpcStatus(w, "7", "Permission denied on resource") // PERMISSION_DENIED
			})
		},
		Permission: "cloudkms.cryptoKeyVersions.useToEncrypt",
		Gone:       func() func() { bucket.Answer(status(http.StatusNotFound)); return bucket.Heal },
	}
}

// Azure is Key Vault, Blob Storage and Entra ID of Azure.
func Azure(t testing.TB) Shape {
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
	return Shape{
		KMS: uri("kms://azure", with(map[string]string{
			"vaultName": "kek", "vaultType": "keyvault", "keyName": "disks", "endpoint": front.URL,
		})),
		Storage: func(prefix string) string {
			return uri("storage://azure", with(map[string]string{
				"account": "devstoreaccount1", "container": "records", "prefix": prefix, "createContainer": "true", "endpoint": blobs.URL + "/devstoreaccount1",
			}))
		},
		Disable:    func(off bool) { vault.Enable("disks", !off) },
		Throttle:   func() func() { front.Answer(status(http.StatusTooManyRequests)); return front.Heal },
		Deny:       func() { vault.Deny("wrapkey", "ForbiddenByRbac") },
		Permission: "keys/wrapKey",
		Gone: func() func() {
			blobs.Answer(func(w http.ResponseWriter, _ *http.Request) bool {
				w.Header().Set("x-ms-error-code", "ContainerNotFound")
				w.WriteHeader(http.StatusNotFound)
				return true
			})
			return blobs.Heal
		},
	}
}
