package etcd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/goleak"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/keyagent/keyagent/internal/lab/pki"
	"github.com/keyagent/keyagent/storage"
	"github.com/keyagent/keyagent/storage/framed"
	"github.com/keyagent/keyagent/storage/storagetest"
	"github.com/keyagent/keyagent/test/sim/emulator"
	"github.com/keyagent/keyagent/test/sim/faultproxy"
)

func open(t *testing.T, opts Options) *Storage {
	t.Helper()
	s, err := New(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// operator is a client of the cluster as its operator has it.
func operator(t *testing.T, config clientv3.Config) *clientv3.Client {
	t.Helper()
	config.Logger = zap.NewNop()
	c, err := clientv3.New(config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func must[T any](t *testing.T) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func isWrite(r *http.Request) bool { return strings.HasSuffix(r.URL.Path, "/Txn") }

func TestTheSuiteOfStorageHolds(t *testing.T) {
	cluster := emulator.Etcd(t)
	client := operator(t, clientv3.Config{Endpoints: []string{cluster}})
	var beds atomic.Int32
	storagetest.Run(t, func(t *testing.T) storagetest.Bed {
		proxy := faultproxy.New(t, cluster)
		opts := Options{Endpoints: []string{proxy.URL}, Prefix: fmt.Sprintf("some/where/%d", beds.Add(1))}
		return storagetest.Bed{
			Open:       func() storage.Storage { return open(t, opts) },
			Stall:      proxy.Stall,
			LoseAnswer: func() { proxy.LoseAnswer(isWrite) },
			Plant: func(name string, data []byte) {
				must[*clientv3.PutResponse](t)(client.Put(t.Context(), opts.Prefix+"/"+name, string(data)))
			},
		}
	})
}

func TestTheSuiteOfStorageHoldsWithoutAPrefix(t *testing.T) {
	cluster := emulator.Etcd(t)
	client := operator(t, clientv3.Config{Endpoints: []string{cluster}})
	storagetest.Run(t, func(t *testing.T) storagetest.Bed {
		must[*clientv3.DeleteResponse](t)(client.Delete(t.Context(), "\x00", clientv3.WithFromKey()))
		must[*clientv3.PutResponse](t)(client.Put(t.Context(), "\x00not ours", ""))
		return storagetest.Bed{Open: func() storage.Storage { return open(t, Options{Endpoints: []string{cluster}}) }}
	})
}

// kv is a cluster that answers each request with an error, or finds nothing.
type kv struct {
	etcdserverpb.UnimplementedKVServer
	err atomic.Pointer[error]
}

func (k *kv) fails(err error) { k.err.Store(&err) }

func (k *kv) answer() error {
	if err := k.err.Load(); err != nil {
		return *err
	}
	return nil
}

func (k *kv) Range(context.Context, *etcdserverpb.RangeRequest) (*etcdserverpb.RangeResponse, error) {
	return &etcdserverpb.RangeResponse{Header: &etcdserverpb.ResponseHeader{}}, k.answer()
}

func (k *kv) Txn(context.Context, *etcdserverpb.TxnRequest) (*etcdserverpb.TxnResponse, error) {
	return &etcdserverpb.TxnResponse{Header: &etcdserverpb.ResponseHeader{}}, k.answer()
}

func serve(t *testing.T, creds credentials.TransportCredentials) (*kv, *faultproxy.Proxy) {
	t.Helper()
	k := &kv{}
	server := grpc.NewServer(grpc.Creds(creds))
	etcdserverpb.RegisterKVServer(server, k)
	return k, faultproxy.Handle(t, server)
}

func TestWhatTheClusterAnswersIsClassed(t *testing.T) {
	calls := map[string]func(context.Context, *Storage) error{
		"put": func(ctx context.Context, s *Storage) error {
			_, err := s.Put(ctx, "x", []byte("new"), storage.Absent)
			return err
		},
		"get":    func(ctx context.Context, s *Storage) error { _, _, err := s.Get(ctx, "x"); return err },
		"list":   func(ctx context.Context, s *Storage) error { _, err := s.List(ctx, "", "", 10); return err },
		"delete": func(ctx context.Context, s *Storage) error { return s.Delete(ctx, "x", "T 1") },
	}
	k, proxy := serve(t, insecure.NewCredentials())
	s := open(t, Options{Endpoints: []string{proxy.URL}, Prefix: "a/b"})
	s.opts.Timeout = 500 * time.Millisecond // unavailable clusters are asked again until then
	for name, c := range map[string]struct {
		answer, want error
		text         string
	}{
		"a forbidden call names the permission":       {rpctypes.ErrGRPCPermissionDenied, storage.ErrDenied, "readwrite on the prefix a/b/"},
		"a user who is not known":                     {rpctypes.ErrGRPCUserNotFound, storage.ErrCredentials, ""},
		"no user, where one is needed":                {rpctypes.ErrGRPCUserEmpty, storage.ErrCredentials, "user name is empty"},
		"a password that is wrong":                    {rpctypes.ErrGRPCAuthFailed, storage.ErrCredentials, ""},
		"throttling that lasts":                       {rpctypes.ErrGRPCRequestTooManyRequests, storage.ErrThrottled, ""},
		"a cluster that is full":                      {rpctypes.ErrGRPCNoSpace, storage.ErrUnavailable, "space exceeded"},
		"a cluster without a leader":                  {rpctypes.ErrGRPCNoLeader, storage.ErrUnavailable, "no leader"},
		"a cluster that is corrupt":                   {rpctypes.ErrGRPCCorrupt, storage.ErrUnavailable, ""},
		"a proxy that is in the way":                  {status.Error(codes.Unauthenticated, "who"), storage.ErrCredentials, ""},
		"a request that the cluster does not like":    {rpctypes.ErrGRPCRequestTooLarge, nil, "too large"},
		"a call that the cluster itself has given up": {rpctypes.ErrGRPCTimeout, storage.ErrUnavailable, "timed out"},
	} {
		for what, call := range calls {
			t.Run(name+"/"+what, func(t *testing.T) {
				k.fails(c.answer)
				err := call(t.Context(), s)
				if err == nil || (c.want != nil && !errors.Is(err, c.want)) || !strings.Contains(err.Error(), c.text) {
					t.Fatalf("%v, want %v with %q", err, c.want, c.text)
				}
				for _, never := range []error{storage.ErrNotFound, storage.ErrConflict, storage.ErrNoBucket, storage.ErrDenied, storage.ErrCredentials, storage.ErrThrottled} {
					if c.want != never && errors.Is(err, never) {
						t.Errorf("%v must not be %v", err, never)
					}
				}
			})
		}
	}
}

func TestARevisionThatCameTwiceIsNoVersion(t *testing.T) {
	cluster := emulator.Etcd(t)
	s := open(t, Options{Endpoints: []string{cluster}})
	v := must[storage.Version](t)(s.Put(t.Context(), "x", []byte("one"), storage.Absent))
	token, revision, _ := framed.SplitVersion(v)
	// After a restore, another object has the revision that this one had.
	for _, other := range []string{"0" + token[1:], token[:len(token)-1], token + "A"} {
		stale := framed.JoinVersion(other, revision)
		if _, err := s.Put(t.Context(), "x", []byte("lost"), stale); !errors.Is(err, storage.ErrConflict) {
			t.Errorf("put, expecting %q: %v", stale, err)
		}
		if err := s.Delete(t.Context(), "x", stale); !errors.Is(err, storage.ErrConflict) {
			t.Errorf("delete, expecting %q: %v", stale, err)
		}
	}
	must[storage.Version](t)(s.Put(t.Context(), "x", []byte("two"), v))
}

func TestAWriteWhoseAnswerWasLostIsKnownAsOurs(t *testing.T) {
	proxy := faultproxy.New(t, emulator.Etcd(t))
	s := open(t, Options{Endpoints: []string{proxy.URL}})
	proxy.LoseAnswer(isWrite)
	v, err := s.Put(t.Context(), "x", []byte("one"), storage.Absent)
	if err != nil {
		t.Fatal(err)
	}
	if _, got, err := s.Get(t.Context(), "x"); err != nil || got != v {
		t.Errorf("%q, %v, want %q", got, err, v)
	}
}

func TestAUserNeedsAPasswordAndARoleAndMayChangeThePassword(t *testing.T) {
	cluster := emulator.Etcd(t)
	root := operator(t, clientv3.Config{Endpoints: []string{cluster}})
	ctx := t.Context()
	must[*clientv3.AuthUserAddResponse](t)(root.UserAdd(ctx, "root", "root"))
	must[*clientv3.AuthUserGrantRoleResponse](t)(root.UserGrantRole(ctx, "root", "root"))
	must[*clientv3.AuthRoleAddResponse](t)(root.RoleAdd(ctx, "keys"))
	must[*clientv3.AuthRoleGrantPermissionResponse](t)(root.RoleGrantPermission(ctx, "keys", "ours/", "ours0", clientv3.PermissionType(clientv3.PermReadWrite)))
	must[*clientv3.AuthUserAddResponse](t)(root.UserAdd(ctx, "keyagent", "hunter2"))
	must[*clientv3.AuthUserGrantRoleResponse](t)(root.UserGrantRole(ctx, "keyagent", "keys"))
	must[*clientv3.AuthEnableResponse](t)(root.AuthEnable(ctx))
	root = operator(t, clientv3.Config{Endpoints: []string{cluster}, Username: "root", Password: "root"})

	var mu sync.Mutex
	password := "hunter2"
	set := func(p string) { mu.Lock(); defer mu.Unlock(); password = p }
	opts := Options{Endpoints: []string{cluster}, Prefix: "ours", Username: "keyagent", Password: func() (string, error) {
		mu.Lock()
		defer mu.Unlock()
		return password, nil
	}}
	s := open(t, opts)
	v := must[storage.Version](t)(s.Put(ctx, "x", []byte("one"), storage.Absent))

	refused := map[string]func(*Options){
		"another prefix":   func(o *Options) { o.Prefix = "theirs" },
		"nobody":           func(o *Options) { o.Username, o.Password = "", nil },
		"a wrong password": func(o *Options) { o.Password = func() (string, error) { return "hunter3", nil } },
		"no password":      func(o *Options) { o.Password = func() (string, error) { return "", errors.New("no such file") } },
	}
	for name, change := range refused {
		other, want := opts, storage.ErrCredentials
		if name == "another prefix" {
			want = storage.ErrDenied
		}
		change(&other)
		if _, err := New(ctx, other); !errors.Is(err, want) || strings.Contains(err.Error(), "hunter") {
			t.Errorf("%s: %v, want %v", name, err, want)
		}
	}

	must[*clientv3.AuthUserChangePasswordResponse](t)(root.UserChangePassword(ctx, "keyagent", "hunter4"))
	if _, err := s.Put(ctx, "x", []byte("two"), v); !errors.Is(err, storage.ErrCredentials) || strings.Contains(err.Error(), "hunter") {
		t.Errorf("the old password: %v", err)
	}
	set("hunter4")
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if _, _, err := s.Get(ctx, "x"); err != nil {
				t.Errorf("the new password: %v", err)
			}
		})
	}
	wg.Wait()
	must[storage.Version](t)(s.Put(ctx, "x", []byte("two"), v))
}

func TestAClusterThatDoesNotAnswerIsGivenUp(t *testing.T) {
	_, proxy := serve(t, insecure.NewCredentials())
	opts := Options{Endpoints: []string{proxy.URL}}
	s := open(t, opts)
	s.opts.Timeout = 50 * time.Millisecond
	release := proxy.Stall()
	if _, _, err := s.Get(t.Context(), "x"); !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, storage.ErrUnavailable) {
		t.Errorf("get: %v", err)
	}
	opts.Timeout = 50 * time.Millisecond
	if _, err := New(t.Context(), opts); !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, storage.ErrUnavailable) {
		t.Errorf("new: %v", err)
	}
	opts.Username, opts.Password = "u", func() (string, error) { return "p", nil }
	if _, err := New(t.Context(), opts); !errors.Is(err, storage.ErrUnavailable) {
		t.Errorf("new, with a password: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(20*time.Millisecond, cancel)
	opts.Timeout = time.Minute
	if _, err := New(ctx, opts); !errors.Is(err, context.Canceled) {
		t.Errorf("new, with a password, cancelled: %v", err)
	}
	release()
	opts = Options{Endpoints: []string{"http://127.0.0.1:1"}, Timeout: 500 * time.Millisecond}
	if _, err := New(t.Context(), opts); !errors.Is(err, storage.ErrUnavailable) || !strings.Contains(err.Error(), "refused") {
		t.Errorf("nobody listens: %v", err)
	}
}

func TestAClusterIsOnlyTrustedByItsCertificate(t *testing.T) {
	ours, theirs := pki.New(t), pki.New(t)
	certificate := must[tls.Certificate](t)(ours.Server("127.0.0.1"))
	listener := must[net.Listener](t)(net.Listen("tcp", "127.0.0.1:0"))
	server := grpc.NewServer(grpc.Creds(credentials.NewServerTLSFromCert(&certificate)))
	etcdserverpb.RegisterKVServer(server, &kv{})
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	t.Cleanup(func() { server.Stop(); <-served })
	opts := Options{Endpoints: []string{"https://" + listener.Addr().String() + "/"}, TLS: &tls.Config{RootCAs: ours.Pool()}, Timeout: 5 * time.Second}
	open(t, opts)
	opts.TLS, opts.Timeout = &tls.Config{RootCAs: theirs.Pool()}, 500*time.Millisecond
	if _, err := New(t.Context(), opts); !errors.Is(err, storage.ErrUnavailable) || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("%v", err)
	}
}

func TestCloseEndsWhatWasStarted(t *testing.T) {
	_, proxy := serve(t, insecure.NewCredentials())
	before := goleak.IgnoreCurrent()
	s, err := New(t.Context(), Options{Endpoints: []string{proxy.URL}})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if _, _, err := s.Get(t.Context(), "x"); err == nil || errors.Is(err, storage.ErrNotFound) {
		t.Errorf("after Close: %v", err)
	}
	if _, err := New(t.Context(), Options{Endpoints: []string{"http://127.0.0.1:1"}, Timeout: 100 * time.Millisecond}); err == nil {
		t.Error("somebody listens")
	}
	// The server's own side of the connection ends a moment later.
	if err := goleak.Find(before); err != nil {
		t.Error(err)
	}
}

func TestOptionsThatMakeNoSenseAreRefused(t *testing.T) {
	for name, change := range map[string]func(*Options){
		"no endpoint":                   func(o *Options) { o.Endpoints = nil },
		"https without a configuration": func(o *Options) { o.TLS = nil },
		"http to another machine":       func(o *Options) { o.Endpoints = []string{"http://192.0.2.1:2379"} },
		"http to a name":                func(o *Options) { o.Endpoints = []string{"http://localhost:2379"} },
		"http with a configuration":     func(o *Options) { o.Endpoints = []string{"http://127.0.0.1:2379"} },
		"http beside https":             func(o *Options) { o.Endpoints = append(o.Endpoints, "http://127.0.0.1:2379") },
		"an address without a scheme":   func(o *Options) { o.Endpoints = []string{"example.com:2379"} },
		"an endpoint with a path":       func(o *Options) { o.Endpoints = []string{"https://example.com/x"} },
		"an endpoint with a user":       func(o *Options) { o.Endpoints = []string{"https://u:hunter2@example.com"} },
		"a prefix with dots":            func(o *Options) { o.Prefix = "../x" },
		"a user without a password":     func(o *Options) { o.Username = "u" },
		"a password without a user":     func(o *Options) { o.Password = func() (string, error) { return "hunter2", nil } },
	} {
		t.Run(name, func(t *testing.T) {
			opts := Options{Endpoints: []string{"https://example.com:2379"}, TLS: &tls.Config{}}
			change(&opts)
			if _, err := New(t.Context(), opts); err == nil || strings.Contains(err.Error(), "hunter2") || errors.Is(err, storage.ErrUnavailable) {
				t.Fatal(err)
			}
		})
	}
}
