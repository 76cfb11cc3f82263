package emulator

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"
)

// command is how one server is started.
type command struct {
	path    string
	args    []string
	env     []string // beside environment()
	folders []string // to be made before
	health  string   // a path that answers 200 when the server is ready; default any answer
}

const (
	startTime = 60 * time.Second // node on a loaded machine takes its time
	attempts  = 3
)

// start starts a server and waits until it answers. make gets a folder and two
// free ports; the server answers at the first. Another process may take a port
// before the server does, therefore it is tried again with others.
func start(t testing.TB, scheme string, make func(dir string, ports []int) command) (url string) {
	t.Helper()
	var err error
	for range attempts {
		dir := t.TempDir()
		var ports []int
		if ports, err = freePorts(2); err != nil {
			break
		}
		c := make(dir, ports)
		url = scheme + "://" + address(ports[0])
		if err = run(t, c, dir, url); err == nil {
			return url
		}
	}
	t.Fatal(err)
	return ""
}

// freePorts finds ports of the loopback address that nobody listens on.
func freePorts(n int) ([]int, error) {
	var ports []int
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer l.Close() // all are held until all are found
		ports = append(ports, l.Addr().(*net.TCPAddr).Port)
	}
	return ports, nil
}

// Member is one server of several, which can be killed and started again with what it has
// stored.
type Member struct {
	URL     string
	dir     string
	command command

	mu   sync.Mutex
	stop func() // nil while it does not run
}

// Start starts the server, and returns when it is ready.
func (m *Member) Start() error {
	stop, err := launch(m.command, m.dir, m.URL)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.stop = stop
	return err
}

// Kill ends the server at once.
func (m *Member) Kill() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.stop != nil {
		m.stop()
		m.stop = nil
	}
}

// run starts a server that ends with the test, and returns when it is ready.
func run(t testing.TB, c command, dir, url string) error {
	stop, err := launch(c, dir, url)
	if err == nil {
		t.Cleanup(stop)
	}
	return err
}

// launch starts a server, and returns when it is ready. stop kills it; it is nil after an error.
func launch(c command, dir, url string) (stop func(), err error) {
	for _, folder := range c.folders {
		if err := os.MkdirAll(folder, 0o700); err != nil {
			return nil, err
		}
	}
	path := filepath.Join(dir, "log")
	log, err := os.Create(path)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.Command(c.path, c.args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr, cmd.Env = dir, log, log, append(environment(), c.env...)
	// A test that the go tool's own timeout kills runs no clean-up.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started, exited := make(chan error), make(chan struct{})
	go func() {
		// The kernel ends the server with the thread that started it, not with
		// the process, so this thread has to stay for as long as the server does.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait()
			close(exited)
		}
	}()
	if err := <-started; err != nil {
		return nil, err
	}
	stop = func() { _ = cmd.Process.Kill(); <-exited }
	if err := ready(url+c.health, c.health != "", exited); err != nil {
		stop()
		text, _ := os.ReadFile(path)
		return nil, fmt.Errorf("%s: %w; its output: %s", filepath.Base(c.path), err, text)
	}
	return stop, nil
}

// ready waits until a server answers, with 200 if that is wanted.
func ready(url string, healthy bool, exited <-chan struct{}) error {
	transport := &http.Transport{
		// It is asked whether it is there, and nothing else.
		TLSClientConfig:   &tls.Config{InsecureSkipVerify: true},
		DisableKeepAlives: true,
	}
	client := &http.Client{Transport: transport, Timeout: 5 * time.Second}
	for deadline := time.Now().Add(startTime); time.Now().Before(deadline); {
		if r, err := client.Get(url); err == nil {
			r.Body.Close()
			if !healthy || r.StatusCode == http.StatusOK {
				return nil
			}
		}
		select {
		case <-exited:
			return errors.New("the server ended at its start")
		case <-time.After(10 * time.Millisecond):
		}
	}
	return fmt.Errorf("the server did not answer within %s", startTime)
}
