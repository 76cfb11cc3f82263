package localweb

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/keyagent/keyagent/internal/failure"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestMetricsAreForThisMachine(t *testing.T) {
	for _, address := range []string{"0.0.0.0:0", ":0", "192.0.2.1:0", "localhost:0", "[::]:0", "127.0.0.1"} {
		if l, err := Listen(address, false); failure.Of(err).Class != failure.Usage {
			t.Errorf("%s: %v", address, err)
			if err == nil {
				l.Close()
			}
		}
	}
	for address, remote := range map[string]bool{"127.0.0.1:0": false, "[::1]:0": false, "0.0.0.0:0": true} {
		l, err := Listen(address, remote)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Listen(l.Addr().String(), remote); failure.Of(err).Class != failure.Configuration {
			t.Errorf("a port that is taken: %v", err)
		}
		l.Close()
	}
}

// Callers that say nothing are bounded in number, and do not hold up the end.
func TestSilentCallersAreBounded(t *testing.T) {
	l, err := Listen("127.0.0.1:0", false)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- Serve(ctx, l, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "ok") }))
	}()
	dial := func() net.Conn {
		t.Helper()
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	first := dial()
	if _, err := io.WriteString(first, "GET / HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	if n, err := first.Read(make([]byte, 1<<10)); err != nil || n == 0 {
		t.Fatal(err)
	}
	for range maxConns - 1 {
		dial()
	}
	late := dial()
	_ = late.SetReadDeadline(time.Now().Add(20 * time.Second))
	if _, err := late.Read(make([]byte, 1)); err == nil {
		t.Error("one too many was answered")
	} else if e, ok := err.(net.Error); ok && e.Timeout() {
		t.Error("one too many was let in")
	}
	started := time.Now()
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if took := time.Since(started); took > 2*stopTimeout {
		t.Errorf("the end took %s", took)
	}
}
