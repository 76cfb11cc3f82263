package kubernetes

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"errors"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"k8s.io/kms/apis/v1beta1"

	"github.com/keyagent/keyagent/internal/kubekms"
)

// daemon2018 does what the daemon of 2018 did with its own ciphertexts, and with all
// others: ":ck:aescbc:v1:", IV, AES-CBC with the padding of PKCS #7.
type daemon2018 struct {
	v1beta1.UnimplementedKeyManagementServiceServer
	kek string
}

const prefix2018 = ":ck:aescbc:v1:"

func (d *daemon2018) block() cipher.Block {
	b, err := aes.NewCipher([]byte(d.kek))
	if err != nil {
		panic(err)
	}
	return b
}

func (d *daemon2018) Version(context.Context, *v1beta1.VersionRequest) (*v1beta1.VersionResponse, error) {
	return &v1beta1.VersionResponse{Version: "v1beta1", RuntimeName: "daemon", RuntimeVersion: "0.0.1"}, nil
}

func (d *daemon2018) Encrypt(_ context.Context, r *v1beta1.EncryptRequest) (*v1beta1.EncryptResponse, error) {
	pad := aes.BlockSize - len(r.Plain)%aes.BlockSize
	body := append(bytes.Clone(r.Plain), bytes.Repeat([]byte{byte(pad)}, pad)...)
	iv := make([]byte, aes.BlockSize)
	rand.Read(iv)
	cipher.NewCBCEncrypter(d.block(), iv).CryptBlocks(body, body)
	return &v1beta1.EncryptResponse{Cipher: append(append([]byte(prefix2018), iv...), body...)}, nil
}

func (d *daemon2018) Decrypt(_ context.Context, r *v1beta1.DecryptRequest) (*v1beta1.DecryptResponse, error) {
	body, ok := bytes.CutPrefix(r.Cipher, []byte(prefix2018))
	if !ok || len(body) < 2*aes.BlockSize {
		return nil, errors.New("invalid encryption mode prefix")
	}
	plain := bytes.Clone(body[aes.BlockSize:])
	cipher.NewCBCDecrypter(d.block(), body[:aes.BlockSize]).CryptBlocks(plain, plain)
	return &v1beta1.DecryptResponse{Plain: plain[:len(plain)-int(plain[len(plain)-1])]}, nil
}

// run serves on a socket until the test is over.
func (d *daemon2018) run(t *testing.T, socket string) (stop func()) {
	t.Helper()
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	v1beta1.RegisterKeyManagementServiceServer(s, d)
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	stop = sync.OnceFunc(func() { s.Stop(); <-done })
	t.Cleanup(stop)
	return stop
}

// TestAControlPlaneMovesNodeByNode follows docs/kubernetes.md on three nodes, with an
// etcd that they share: at each step, each node reads what each wrote.
func TestAControlPlaneMovesNodeByNode(t *testing.T) {
	var sockets, files []string
	var stops []func()
	for i := range 3 {
		sockets = append(sockets, filepath.Join(folder(t), "s"))
		stops = append(stops, (&daemon2018{kek: kekA}).run(t, sockets[i]))
		files = append(files, configuration(t, provider("v1", "kms", sockets[i])))
	}
	nodes := make([]*apiServer, len(sockets))
	reload := func(i int) { nodes[i] = load(t, files[i]) }
	for i := range nodes {
		reload(i)
	}
	etcd := map[string][]byte{}
	// answers waits until an API server has noticed that its plugin is another process:
	// the first call on the old connection fails, and is asked again by its caller.
	answers := func(n *apiServer) {
		t.Helper()
		for end := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
			_, err := n.secrets.TransformToStorage(t.Context(), []byte("?"), place)
			if status.Code(err) != codes.Unavailable || time.Now().After(end) {
				return
			}
		}
	}
	check := func(step string) {
		t.Helper()
		for i, n := range nodes {
			answers(n)
			name := step + ", node " + string(rune('1'+i))
			etcd[name] = n.write(t, name)
		}
		for name, stored := range etcd {
			for i, n := range nodes {
				if got, _, err := n.secrets.TransformFromStorage(t.Context(), stored, place); err != nil || string(got) != name {
					t.Errorf("%s: node %d reads %q: %q, %v", step, i+1, name, got, err)
				}
			}
		}
	}
	check("the daemons")
	for i := range nodes { // step 1
		stops[i]()
		stops[i] = start(t, sockets[i], kubekms.AESCBC, keks{kekA})
		check("step 1, moved " + string(rune('1'+i)))
	}
	// The way back, and again.
	stops[2]()
	stop := (&daemon2018{kek: kekA}).run(t, sockets[2])
	check("back on one node")
	stop()
	stops[2] = start(t, sockets[2], kubekms.AESCBC, keks{kekA})
	for _, providers := range []func(string) string{ // step 2
		func(s string) string { return provider("v1", "kms", s) + provider("v2", "new", s) },
		func(s string) string { return provider("v2", "new", s) + provider("v1", "kms", s) },
	} {
		for i := range nodes {
			files[i] = configuration(t, providers(sockets[i]))
			reload(i)
			check("step 2")
		}
	}
	for i := range nodes { // step 3
		stops[i]()
		stops[i] = start(t, sockets[i], kubekms.AESGCM, keks{kekA})
		reload(i)
		check("step 3")
	}
	for i := range nodes {
		for name, stored := range etcd {
			nodes[i].read(t, stored, name)
			etcd[name] = nodes[i].write(t, name)
			if bytes.Contains(etcd[name], []byte(prefix2018)) {
				t.Fatalf("%q is in the format of 2018 still", name)
			}
		}
	}
	for i := range nodes {
		files[i] = configuration(t, provider("v2", "new", sockets[i]))
		reload(i)
	}
	check("without v1")
}

// What the runbook warns of: one node that writes the new format too early.
func TestTheNewFormatIsNotForTheDaemon(t *testing.T) {
	there, here := filepath.Join(folder(t), "s"), filepath.Join(folder(t), "s")
	(&daemon2018{kek: kekA}).run(t, there)
	start(t, here, kubekms.AESGCM, keks{kekA})
	written := load(t, configuration(t, provider("v1", "early", here))).write(t, "a secret")
	other := load(t, configuration(t, provider("v1", "early", there)))
	if _, _, err := other.secrets.TransformFromStorage(t.Context(), written, place); err == nil {
		t.Error("the daemon reads it: the order of the steps is for nothing")
	}
}
