package bench

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path"
	"strings"
	"testing"

	gcpservice "cloud.google.com/go/kms/apiv1"
	"cloud.google.com/go/kms/apiv1/kmspb"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/cloud"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
	"github.com/Azure/azure-sdk-for-go/sdk/security/keyvault/azkeys"
	"github.com/aws/aws-sdk-go-v2/aws"
	awscredentials "github.com/aws/aws-sdk-go-v2/credentials"
	awskms "github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"google.golang.org/api/option"
	gcs "google.golang.org/api/storage/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/kms/kmstest"
	"github.com/keyagent/keyagent/kms/setup"
	clouds "github.com/keyagent/keyagent/test/sim/cloud"
)

const benchPrefix, benchVolume = "bench", "pvc-1"

// bareCall makes what a program would call that gets a wrapped key from a bucket and
// has it unwrapped, with the SDKs alone and no checks.
type bareCall func(b *testing.B, keys, bucket url.Values, w kms.Wrapped) func(context.Context) error

// BenchmarkGetOrCreate compares a volume's key through kms/dek with the bare calls of
// the SDKs on the same servers: an object is read, a key is unwrapped.
func BenchmarkGetOrCreate(b *testing.B) {
	for name, bare := range map[string]bareCall{"AWS": bareAWS, "Google": bareGoogle, "Azure": bareAzure} {
		b.Run(name, func(b *testing.B) {
			shape := clouds.Shapes[name](b)
			ctx := context.Background()
			store, err := setup.DEKs(ctx, shape.KMS, shape.Storage(benchPrefix))
			if err != nil {
				b.Fatal(err)
			}
			defer store.Close()
			mine := func() error {
				key, err := store.GetOrCreate(ctx, benchVolume, 32)
				return errors.Join(err, key.Close())
			}
			if err := mine(); err != nil {
				b.Fatal(err)
			}
			theirs := bare(b, parameters(b, shape.KMS), parameters(b, shape.Storage(benchPrefix)), wrappedIn(b, shape.Storage(benchPrefix)))
			kmstest.Compare(b, mine, func() error { return theirs(ctx) })
		})
	}
}

func parameters(b *testing.B, uri string) url.Values {
	b.Helper()
	u, err := url.Parse(uri)
	if err != nil {
		b.Fatal(err)
	}
	return u.Query()
}

// wrappedIn reads what is stored of the volume's key.
func wrappedIn(b *testing.B, uri string) kms.Wrapped {
	b.Helper()
	s, err := setup.Storage(context.Background(), uri)
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	data, _, err := s.Get(context.Background(), "deks/"+benchVolume)
	if err != nil {
		b.Fatal(err)
	}
	_, body, _ := bytes.Cut(data, []byte("\n"))
	var stored struct{ Wrapped kms.Wrapped }
	if err := json.Unmarshal(body, &stored); err != nil {
		b.Fatal(err)
	}
	return stored.Wrapped
}

var benchBinding = kms.Binding{VolumeID: benchVolume, Purpose: kms.VolumeDEK, Version: 1, Length: 32}

func secretFile(b *testing.B, path string) string {
	b.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		b.Fatal(err)
	}
	return strings.TrimSpace(string(text))
}

func bareAWS(b *testing.B, keys, bucket url.Values, w kms.Wrapped) func(context.Context) error {
	creds := func(v url.Values) aws.CredentialsProvider {
		return awscredentials.NewStaticCredentialsProvider(secretFile(b, v.Get("accessKeyIDFile")), secretFile(b, v.Get("accessKeyFile")), "")
	}
	k := awskms.New(awskms.Options{Region: keys.Get("region"), BaseEndpoint: aws.String(keys.Get("endpoint")), Credentials: creds(keys)})
	s := s3.New(s3.Options{Region: bucket.Get("region"), BaseEndpoint: aws.String(bucket.Get("endpoint")), Credentials: creds(bucket), UsePathStyle: true})
	return func(ctx context.Context) error {
		object, err := s.GetObject(ctx, &s3.GetObjectInput{Bucket: aws.String(bucket.Get("bucket")), Key: aws.String(benchPrefix + "/deks/" + benchVolume)})
		if err != nil {
			return err
		}
		_, err = io.Copy(io.Discard, object.Body)
		if err := errors.Join(err, object.Body.Close()); err != nil {
			return err
		}
		_, err = k.Decrypt(ctx, &awskms.DecryptInput{CiphertextBlob: w.Blob, KeyId: aws.String(strings.TrimPrefix(w.KEK, "aws:")), EncryptionContext: map[string]string{
			"domain": "keyagent aws kms v1", "volume": benchVolume, "purpose": string(kms.VolumeDEK), "version": "1", "length": "32",
		}})
		return err
	}
}

func bareGoogle(b *testing.B, keys, bucket url.Values, w kms.Wrapped) func(context.Context) error {
	ctx := context.Background()
	conn, err := grpc.NewClient(strings.TrimPrefix(keys.Get("endpoint"), "http://"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		b.Fatal(err)
	}
	k, err := gcpservice.NewKeyManagementClient(ctx, option.WithGRPCConn(conn))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { k.Close() })
	s, err := gcs.NewService(ctx, option.WithoutAuthentication(), option.WithEndpoint(bucket.Get("endpoint")+"/storage/v1/"))
	if err != nil {
		b.Fatal(err)
	}
	name := fmt.Sprintf("projects/%s/locations/%s/keyRings/%s/cryptoKeys/%s", keys.Get("projectID"), keys.Get("location"), keys.Get("keyRing"), keys.Get("keyName"))
	aad := benchBinding.Encode("keyagent gcp kms v1")
	return func(ctx context.Context) error {
		object, err := s.Objects.Get(bucket.Get("bucket"), benchPrefix+"/deks/"+benchVolume).Context(ctx).Download()
		if err != nil {
			return err
		}
		_, err = io.Copy(io.Discard, object.Body)
		if err := errors.Join(err, object.Body.Close()); err != nil {
			return err
		}
		// Behind the number of the blob's format and the key's version.
		_, err = k.Decrypt(ctx, &kmspb.DecryptRequest{Name: name, Ciphertext: w.Blob[9:], AdditionalAuthenticatedData: aad})
		return err
	}
}

func bareAzure(b *testing.B, keys, bucket url.Values, w kms.Wrapped) func(context.Context) error {
	ca, err := os.ReadFile(keys.Get("caFile"))
	if err != nil {
		b.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}}
	where := cloud.AzurePublic
	where.ActiveDirectoryAuthorityHost = keys.Get("authorityHost")
	opts := policy.ClientOptions{Cloud: where, Transport: client}
	credential, err := azidentity.NewClientSecretCredential(keys.Get("tenantID"), keys.Get("clientID"), secretFile(b, keys.Get("clientSecretFile")),
		&azidentity.ClientSecretCredentialOptions{ClientOptions: opts, DisableInstanceDiscovery: true})
	if err != nil {
		b.Fatal(err)
	}
	k, err := azkeys.NewClient(keys.Get("endpoint"), credential, &azkeys.ClientOptions{ClientOptions: opts, DisableChallengeResourceVerification: true})
	if err != nil {
		b.Fatal(err)
	}
	// The wrapped content key stands behind the format and the algorithm.
	rest := w.Blob[1:]
	field := func() []byte {
		n := int(rest[0])<<8 | int(rest[1])
		f := rest[2 : 2+n]
		rest = rest[2+n:]
		return f
	}
	algorithm, wrapped := azkeys.EncryptionAlgorithm(field()), field()
	object := bucket.Get("endpoint") + "/" + bucket.Get("container") + "/" + benchPrefix + "/deks/" + benchVolume
	token, err := credential.GetToken(context.Background(), policy.TokenRequestOptions{Scopes: []string{"https://storage.azure.com/.default"}})
	if err != nil {
		b.Fatal(err)
	}
	return func(ctx context.Context) error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, object, nil)
		if err != nil {
			return err
		}
		req.Header.Set("Authorization", "Bearer "+token.Token)
		req.Header.Set("x-ms-version", "2024-11-04")
		resp, err := client.Do(req)
		if err != nil {
			return err
		}
		_, err = io.Copy(io.Discard, resp.Body)
		if err := errors.Join(err, resp.Body.Close()); err != nil {
			return err
		}
		if resp.StatusCode != http.StatusOK {
			return errors.New(resp.Status)
		}
		_, err = k.UnwrapKey(ctx, keys.Get("keyName"), path.Base(w.KEK), azkeys.KeyOperationParameters{Algorithm: &algorithm, Value: wrapped}, nil)
		return err
	}
}
