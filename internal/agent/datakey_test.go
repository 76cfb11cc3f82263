package agent

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	constellation "github.com/keyagent/keyagent/api/constellation/kms"
	nodev1 "github.com/keyagent/keyagent/api/keyagent/node/v1"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/keyclient"
	"github.com/keyagent/keyagent/internal/node"
	"github.com/keyagent/keyagent/internal/secret"
)

// givenKeys is a key service that gives each name a key.
type givenKeys struct {
	noKeys
	mu    sync.Mutex
	macs  map[string][32]byte
	asked []keyclient.Request
}

func keyOf(name string, length int) []byte {
	var out []byte
	for i := 0; len(out) < length; i++ {
		sum := sha256.Sum256(fmt.Append(nil, name, i))
		out = append(out, sum[:]...)
	}
	return out[:length]
}

func (g *givenKeys) GetKey(_ context.Context, r keyclient.Request) (*keyclient.Key, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.asked = append(g.asked, r)
	mac, made := g.macs[r.Volume]
	if !made && !r.Format {
		return nil, failure.Newf(failure.NotFound, "", "no record")
	}
	k := &keyclient.Key{Volume: r.Volume, State: keyclient.Pending, CorrelationID: "CORRELATION"}
	if made {
		k.State, k.MACs.Header = keyclient.Active, mac
	}
	var err error
	k.DEK, err = secret.From(keyOf(r.Volume, r.Length))
	return k, err
}

func (g *givenKeys) CreateDiskless(_ context.Context, k *keyclient.Key, mac [32]byte) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.macs[k.Volume] = mac
	return nil
}

// logged is a log that a test reads.
type logged struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// serveKeys serves both APIs of a node that opens the volume own-1.
func serveKeys(t *testing.T, callers ...node.Caller) (nodeAPI nodev1.NodeClient, other constellation.APIClient, sockets [2]string, keys *givenKeys, log *logged) {
	t.Helper()
	dir := shortDir(t)
	cfg := &node.Config{Callers: callers, Volumes: []node.Volume{{ID: "own-1", Name: "ka-test-own", Device: "/dev/null"}}}
	keys, log = &givenKeys{macs: map[string][32]byte{}}, &logged{}
	l := slog.New(slog.NewTextHandler(log, nil))
	v := NewVolumes(Options{Keys: keys, Log: l, StateDir: filepath.Join(dir, "state")})
	v.Know(node.Volume{ID: "own-2"}) // as one that a caller described
	for i, s := range []*grpc.Server{newNodeServer(t.Context(), v, cfg, l), newConstellationServer(v, cfg, l)} {
		sockets[i] = filepath.Join(dir, fmt.Sprint("s", i))
		listener, err := listenUnix(sockets[i])
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() { done <- s.Serve(listener) }()
		t.Cleanup(func() { s.Stop(); <-done })
	}
	c, err := grpc.NewClient("unix:"+sockets[1], grpc.WithTransportCredentials(LocalCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return dial(t, sockets[0]), constellation.NewAPIClient(c), sockets, keys, log
}

func mayAsk(volumes ...string) node.Caller {
	return node.Caller{UID: uid(uint32(os.Getuid())), Operations: []string{node.GetDataKey}, Volumes: volumes}
}

func TestAKeyLeavesTheAgentOnlyWhereItIsGranted(t *testing.T) {
	self := uint32(os.Getuid())
	everything := slices.DeleteFunc(slices.Clone(node.Operations), func(op string) bool { return op == node.GetDataKey })
	n, c, _, keys, log := serveKeys(t, mayAsk("pvc-*", "own-*"),
		node.Caller{UID: uid(self), Operations: everything, Volumes: []string{"*"}},
		node.Caller{UID: uid(self + 1), Operations: []string{node.GetDataKey}, Volumes: []string{"*"}})
	ask := map[string]func(id string, length uint32) ([]byte, error){
		"the node API": func(id string, length uint32) ([]byte, error) {
			r, err := n.GetDataKey(t.Context(), &nodev1.GetDataKeyRequest{VolumeId: id, Length: length})
			return r.GetDataKey(), err
		},
		"Constellation's": func(id string, length uint32) ([]byte, error) {
			r, err := c.GetDataKey(t.Context(), &constellation.GetDataKeyRequest{DataKeyId: id, Length: length})
			return r.GetDataKey(), err
		},
	}
	for name, get := range ask {
		for _, length := range []uint32{16, 32, 64} {
			id := fmt.Sprint("pvc-", length)
			if got, err := get(id, length); err != nil || string(got) != string(keyOf(id, int(length))) {
				t.Errorf("%s, %d bytes: %x, %v", name, length, got, err)
			}
		}
		before := len(keys.asked)
		for _, tt := range []struct {
			why, id string
			length  uint32
			code    codes.Code
		}{
			{"another tenant's (case 31)", "other-1", 32, codes.PermissionDenied},
			{"a configured volume's", "own-1", 32, codes.PermissionDenied},
			{"an opened volume's", "own-2", 32, codes.PermissionDenied},
			{"nothing's", "", 32, codes.InvalidArgument},
			{"a path's", "pvc-../own-1", 32, codes.InvalidArgument},
			{"a path's", "pvc-/1", 32, codes.InvalidArgument},
			{"a name's with a zero", "pvc-1\x00", 32, codes.InvalidArgument},
			{"a name's with a line's end", "pvc-1\n", 32, codes.InvalidArgument},
			{"a look-alike's", "pvc-\u0430", 32, codes.InvalidArgument},
			{"a long name's", "pvc-" + strings.Repeat("a", 125), 32, codes.InvalidArgument},
			{"no byte of a key", "pvc-1", 0, codes.InvalidArgument},
			{"too little of a key (case 16)", "pvc-1", 15, codes.InvalidArgument},
			{"too much of a key", "pvc-1", 65, codes.InvalidArgument},
			{"4 GiB of a key", "pvc-1", 1<<32 - 1, codes.InvalidArgument},
		} {
			if got, err := get(tt.id, tt.length); status.Code(err) != tt.code || len(got) != 0 {
				t.Errorf("%s: %s: %x, %v", name, tt.why, got, err)
			}
		}
		if _, err := get("pvc-"+strings.Repeat("a", 1<<20), 32); status.Code(err) != codes.ResourceExhausted {
			t.Errorf("%s: a name of 1 MiB: %v", name, err)
		}
		if len(keys.asked) != before {
			t.Errorf("%s: the key service was asked for %v", name, keys.asked[before:])
		}
	}
	for _, r := range keys.asked {
		if !r.Diskless {
			t.Errorf("a disk's key was asked for: %+v", r)
		}
	}
	text := log.String()
	for _, want := range []string{
		fmt.Sprintf(`msg="local call allowed" uid=%d gid=%d pid=%d cgroup=`, self, os.Getgid(), os.Getpid()),
		`operation=get-data-key volume=pvc-16`,
		`msg="data key given" volume=pvc-16 length=16 correlation_id=CORRELATION`,
		`msg="local call refused"`, `volume=other-1`, `volume="\"pvc-1\\n\""`,
	} {
		if !strings.Contains(text, want) {
			t.Errorf("the log has no %s", want)
		}
	}
	for id, length := range map[string]int{"pvc-16": 16, "pvc-32": 32, "pvc-64": 64} {
		for _, form := range []string{"%s", "%x", "%q", "%d"} {
			if strings.Contains(text, fmt.Sprintf(form, keyOf(id, length))) {
				t.Errorf("the key of %s is in the log", id)
			}
		}
	}
}

func TestNobodyIsGivenAKeyByDefault(t *testing.T) {
	everything := slices.DeleteFunc(slices.Clone(node.Operations), func(op string) bool { return op == node.GetDataKey })
	n, c, _, keys, _ := serveKeys(t, node.Caller{UID: uid(uint32(os.Getuid())), Operations: everything, Volumes: []string{"*"}})
	_, err := n.GetDataKey(t.Context(), &nodev1.GetDataKeyRequest{VolumeId: "pvc-1", Length: 32})
	if classOf(err) != failure.PolicyDenied {
		t.Errorf("%v", err)
	}
	_, err = c.GetDataKey(t.Context(), &constellation.GetDataKeyRequest{DataKeyId: "pvc-1", Length: 32})
	if classOf(err) != failure.PolicyDenied || len(keys.asked) != 0 {
		t.Errorf("%v, the key service was asked for %v", err, keys.asked)
	}
}

func TestRetiringIsForWhoMay(t *testing.T) {
	self := uid(uint32(os.Getuid()))
	n, _, _, _, _ := serveKeys(t, node.Caller{UID: self, Operations: []string{"retire"}, Volumes: []string{"pvc-*"}})
	if _, err := n.Retire(t.Context(), &nodev1.RetireRequest{Id: "pvc-1"}); classOf(err) != failure.NotFound {
		t.Errorf("one that this node does not know: %v", err)
	}
	if _, err := n.Retire(t.Context(), &nodev1.RetireRequest{Id: "other-1"}); classOf(err) != failure.PolicyDenied {
		t.Errorf("another's: %v", err)
	}
}

// asks runs this test's program elsewhere, as another user or in another control group,
// and returns the gRPC code that it gets.
func asks(t *testing.T, sockets [2]string, start func(*exec.Cmd)) string {
	t.Helper()
	program := filepath.Join(filepath.Dir(sockets[0]), "program")
	if _, err := os.Stat(program); err != nil {
		data, err := os.ReadFile("/proc/self/exe")
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(program, data, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command(program, "-test.run=^TestHelperAsksForAKey$")
	cmd.Env, cmd.Dir = []string{"KEY_SOCKETS=" + sockets[0] + ":" + sockets[1]}, "/"
	start(cmd)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	text, _, _ := strings.Cut(string(out), "\n")
	return text
}

// TestHelperAsksForAKey is the other program.
func TestHelperAsksForAKey(t *testing.T) {
	first, second, ok := strings.Cut(os.Getenv("KEY_SOCKETS"), ":")
	if !ok {
		return
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	_, err := dial(t, first).GetDataKey(ctx, &nodev1.GetDataKeyRequest{VolumeId: "pvc-1", Length: 32})
	conn, dialErr := grpc.NewClient("unix:"+second, grpc.WithTransportCredentials(LocalCredentials()))
	if dialErr != nil {
		t.Fatal(dialErr)
	}
	defer conn.Close()
	_, err2 := constellation.NewAPIClient(conn).GetDataKey(ctx, &constellation.GetDataKeyRequest{DataKeyId: "pvc-1", Length: 32})
	_, _ = io.WriteString(os.Stdout, status.Code(err).String()+" "+status.Code(err2).String()+"\n")
}

// TestTheKernelSaysWhoAsksForAKey (case 30): the user, on both sockets.
func TestTheKernelSaysWhoAsksForAKey(t *testing.T) {
	const nobody = 65534
	as := func(cmd *exec.Cmd) {
		cmd.SysProcAttr = &unix.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	}
	_, _, sockets, keys, log := serveKeys(t, mayAsk("*"))
	if got := asks(t, sockets, as); got != "Unavailable Unavailable" || len(keys.asked) != 0 {
		t.Errorf("a user that no rule names: %s, %v", got, keys.asked)
	}
	if !strings.Contains(log.String(), `no rule names it" uid=65534`) {
		t.Errorf("it is not in the log: %s", log)
	}
	_, _, sockets, _, _ = serveKeys(t, node.Caller{UID: uid(nobody), Operations: []string{node.GetDataKey}, Volumes: []string{"pvc-*"}})
	if got := asks(t, sockets, as); got != "OK OK" {
		t.Errorf("a user that a rule names: %s", got)
	}
}

// TestTheKernelSaysInWhichPodACallerIs (case 30): two control groups, of which a rule
// names one.
func TestTheKernelSaysInWhichPodACallerIs(t *testing.T) {
	root := t.TempDir()
	if err := unix.Mount("none", root, "cgroup2", 0, ""); err != nil {
		t.Fatalf("%v (hint: the tests run as root, on a kernel with cgroup2)", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(root, unix.MNT_DETACH) })
	name := fmt.Sprint("ka-test-", os.Getpid())
	in := func(group string) func(*exec.Cmd) {
		dir := filepath.Join(root, name+group)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			unix.Close(fd)
			for d := dir; d != root; d = filepath.Dir(d) {
				_ = os.Remove(d)
			}
		})
		return func(cmd *exec.Cmd) { cmd.SysProcAttr = &unix.SysProcAttr{UseCgroupFD: true, CgroupFD: fd} }
	}
	rule := mayAsk("pvc-*")
	rule.Cgroup = []string{"/" + name + "/pod-a"}
	_, _, sockets, keys, log := serveKeys(t, rule)
	if got := asks(t, sockets, in("/pod-a/container")); got != "OK OK" {
		t.Errorf("the pod: %s\n%s", got, log)
	}
	before := len(keys.asked)
	if got := asks(t, sockets, in("/pod-b/container")); got != "Unavailable Unavailable" || len(keys.asked) != before {
		t.Errorf("another pod: %s", got)
	}
	if !strings.Contains(log.String(), "cgroup=/"+name+"/pod-b/container") {
		t.Errorf("it is not in the log: %s", log)
	}
}
