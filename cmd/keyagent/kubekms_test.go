package main

//lint:file-ignore SA1019 v1beta1 is deprecated as a whole, and clusters of 2018 speak it.

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"go.yaml.in/yaml/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"k8s.io/kms/apis/v1beta1"
	"k8s.io/kms/apis/v2"

	"github.com/keyagent/keyagent/internal/unixsocket"
)

// kmsCall encrypts TEXT to a file, or decrypts that file and compares:
//
//	kmscall SOCKET encrypt|decrypt v2|v1beta1 TEXT FILE
func kmsCall(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 5 {
		ts.Fatalf("usage: kmscall SOCKET encrypt|decrypt v2|v1beta1 TEXT FILE")
	}
	// A program of its own reaches abstract sockets too, as kube-apiserver does.
	conn, err := grpc.NewClient("passthrough:///kms", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.WaitForReady(true)),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", args[0])
		}))
	ts.Check(err)
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	text, path := args[3], ts.MkAbs(args[4])
	switch args[1] + " " + args[2] {
	case "encrypt v2":
		resp, err := v2.NewKeyManagementServiceClient(conn).Encrypt(ctx, &v2.EncryptRequest{Plaintext: []byte(text), Uid: "script"})
		ts.Check(err)
		ts.Check(os.WriteFile(path, append([]byte(resp.GetKeyId()+"\n"), resp.GetCiphertext()...), 0o600))
	case "decrypt v2":
		id, cipher, _ := strings.Cut(ts.ReadFile(args[4]), "\n")
		resp, err := v2.NewKeyManagementServiceClient(conn).Decrypt(ctx, &v2.DecryptRequest{Ciphertext: []byte(cipher), KeyId: id, Uid: "script"})
		ts.Check(err)
		if string(resp.GetPlaintext()) != text {
			ts.Fatalf("it decrypts to %q", resp.GetPlaintext())
		}
	case "encrypt v1beta1":
		resp, err := v1beta1.NewKeyManagementServiceClient(conn).Encrypt(ctx, &v1beta1.EncryptRequest{Version: "v1beta1", Plain: []byte(text)})
		ts.Check(err)
		ts.Check(os.WriteFile(path, resp.GetCipher(), 0o600))
	case "decrypt v1beta1":
		resp, err := v1beta1.NewKeyManagementServiceClient(conn).Decrypt(ctx, &v1beta1.DecryptRequest{Version: "v1beta1", Cipher: []byte(ts.ReadFile(args[4]))})
		ts.Check(err)
		if string(resp.GetPlain()) != text {
			ts.Fatalf("it decrypts to %q", resp.GetPlain())
		}
	default:
		ts.Fatalf("%v cannot be called", args)
	}
}

// mkmaster makes a master secret in the file "master".
func mkMaster(ts *testscript.TestScript, _ bool, _ []string) {
	ts.Check(os.WriteFile(ts.MkAbs("master"), []byte("0123456789abcdef0123456789abcdef"), 0o600))
}

func TestEndpointsAreThoseOfKubeAPIServer(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	for endpoint, want := range map[string]string{
		"unix://" + path:                    path,
		"unix:" + path:                      path,
		"unix:@keyagent-test":               "@keyagent-test",
		"unix:///@keyagent-test":            "@keyagent-test",
		"unix://@keyagent-test":             "@keyagent-test",
		"unix:":                             "",
		"unix://":                           "",
		"unix:relative":                     "",
		"unix:@":                            "",
		"tcp:///tmp/x":                      "",
		path:                                "",
		"@keyagent-test":                    "",
		"unix:@" + strings.Repeat("a", 200): "",
	} {
		l, err := listenKubeKMS(endpoint, unixsocket.Options{UID: -1, GID: -1})
		if (err == nil) != (want != "") {
			t.Errorf("%s: %v", endpoint, err)
		}
		if err == nil {
			if got := l.Addr().String(); got != want {
				t.Errorf("%s listens on %s", endpoint, got)
			}
			l.Close()
		}
	}
}

func TestV1beta1GetsASemanticVersion(t *testing.T) {
	for in, want := range map[string]string{"devel": "0.0.0+devel", "1.2.3": "1.2.3", "3f45a85-dirty": "0.0.0+3f45a85-dirty", "a_b/c": "0.0.0+a-b-c"} {
		if got := semantic(in); got != want {
			t.Errorf("%s: %s", in, got)
		}
	}
}

// TestTheStaticPodStartsWhatThereIs holds deploy/kubernetes and the flags together.
func TestTheStaticPodStartsWhatThereIs(t *testing.T) {
	data, err := os.ReadFile("../../deploy/kubernetes/keyagent-kubekms.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var pod struct {
		Spec struct {
			Containers []struct{ Command []string }
		}
	}
	if err := yaml.Unmarshal(data, &pod); err != nil || len(pod.Spec.Containers) != 1 {
		t.Fatalf("%+v, %v", pod, err)
	}
	command := pod.Spec.Containers[0].Command
	found, args, err := newRoot().Find(command[1:])
	if err != nil || found.Name() != "kubekms" {
		t.Fatalf("%v, %v", found, err)
	}
	if err := found.ParseFlags(args); err != nil {
		t.Error(err)
	}
}
