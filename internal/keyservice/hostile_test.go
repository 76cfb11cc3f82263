package keyservice

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/keyagent/keyagent/attestation/atls"
	"github.com/keyagent/keyagent/attestation/tpm"
	"github.com/keyagent/keyagent/internal/failure"
)

// rssLimit is far above what the service needs and far below what any of these
// floods would take if it were kept: 10 000 TLS states, or one frame of 2^31.
const rssLimit = 512 << 20

func resident(t testing.TB) uint64 {
	t.Helper()
	text, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		t.Fatal(err)
	}
	var size, pages uint64
	if _, err := fmt.Sscan(string(text), &size, &pages); err != nil {
		t.Fatal(err)
	}
	return pages * uint64(os.Getpagesize())
}

// moreFiles raises the limit of open files as far as this process may, and
// returns it.
func moreFiles(t testing.TB) int {
	t.Helper()
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		t.Fatal(err)
	}
	l.Cur = l.Max
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		t.Fatal(err)
	}
	return int(min(l.Cur, 1<<20))
}

// honest delivers keys to new machines, one after another, and returns how long
// each took. All of them must succeed, at their second try at the latest, which
// every agent has.
func (w *world) honest(n int) []time.Duration {
	w.t.Helper()
	var took []time.Duration
	for range n {
		started := time.Now()
		if _, _, err := w.get(w.machine(), "data-1", formatOp); err != nil {
			w.t.Logf("an honest machine tries again: %v", err)
			if _, _, err := w.get(w.machine(), "data-1", formatOp); err != nil {
				w.t.Errorf("an honest machine: %v", err)
			}
		}
		took = append(took, time.Since(started))
	}
	return took
}

// report compares, for people: time on a shared machine decides nothing here.
func report(t testing.TB, before, during []time.Duration) {
	t.Helper()
	slices.Sort(before)
	slices.Sort(during)
	mid := func(d []time.Duration) time.Duration { return d[len(d)/2] }
	t.Logf("a delivery on a new connection: median %s alone, %s in the flood (×%.2f); slowest %s and %s",
		mid(before), mid(during), float64(mid(during))/float64(mid(before)), before[len(before)-1], during[len(during)-1])
}

// wave opens n connections, gets each as far as f does, and keeps them open.
func (w *world) wave(n int, f func(net.Conn)) (closeAll func()) {
	w.t.Helper()
	conns := make([]net.Conn, 0, n)
	for range n {
		c, err := net.DialTimeout("tcp", w.at(), 10*time.Second)
		if err != nil {
			w.t.Fatal(err)
		}
		f(c)
		conns = append(conns, c)
	}
	return func() {
		for _, c := range conns {
			c.Close()
		}
	}
}

// Cases 32 and 36: 10 000 connections that never get to the point, of every
// kind, while honest machines ask for keys.
func TestHalfOpenConnectionsHinderNobody(t *testing.T) {
	w := newWorld(t)
	w.cfg.MaxUnattested = defaultMaxUnattested
	w.restart()
	before := w.honest(20)
	const total = 10_000
	batch := min(2_000, moreFiles(t)/4)
	// The first bytes of a TLS record that announces more than ever comes.
	record := []byte{0x16, 3, 1, 0x40, 0x00, 1}
	kinds := []func(net.Conn){
		func(net.Conn) {},                        // says nothing
		func(c net.Conn) { c.Write([]byte{22}) }, // one byte, and idles
		func(c net.Conn) { c.Write(record) },     // half a record
		func(c net.Conn) { c.(*net.TCPConn).CloseWrite() },
		func(c net.Conn) { c.Write([]byte("GET / HTTP/1.1\r\n\r\n")) },
	}
	var arriving, standing []time.Duration
	n, goroutines := 0, 0
	for n < total {
		var mu sync.Mutex
		started := make(chan struct{})
		var wg sync.WaitGroup
		var closeAll func()
		wg.Go(func() {
			i := 0
			end := w.wave(batch, func(c net.Conn) {
				if i == batch/2 {
					close(started)
				}
				kinds[i%len(kinds)](c)
				i++
			})
			mu.Lock()
			defer mu.Unlock()
			closeAll = end
		})
		<-started
		arriving = append(arriving, w.honest(2)...)
		wg.Wait()
		standing = append(standing, w.honest(10)...) // all of the batch is there
		goroutines = max(goroutines, runtime.NumGoroutine())
		if rss := resident(t); rss > rssLimit {
			t.Fatalf("%d MiB after %d connections", rss>>20, n+batch)
		}
		closeAll()
		n += batch
	}
	now, evicted := w.server.gate.Waiting()
	t.Logf("%d connections, %d were pushed out, %d wait, %d MiB, at most %d goroutines", n, evicted, now, resident(t)>>20, goroutines)
	if now > w.cfg.MaxUnattested || evicted == 0 {
		t.Errorf("%d wait, %d were pushed out", now, evicted)
	}
	if goroutines > 20*w.cfg.MaxUnattested {
		t.Errorf("%d goroutines for at most %d connections", goroutines, w.cfg.MaxUnattested)
	}
	t.Log("while connections arrive, made by this very process:")
	report(t, before, arriving)
	t.Log("while they stand there half-open:")
	report(t, before, standing)
}

// encrypted is a TLS session without evidence: as far as a stranger gets.
func (w *world) encrypted() (*tls.Conn, error) {
	id, err := tls.LoadX509KeyPair(filepath.Join(w.dir, "server.pem"), filepath.Join(w.dir, "server.key"))
	if err != nil {
		return nil, err
	}
	c, err := tls.Dial("tcp", w.at(), &tls.Config{
		ServerName: "127.0.0.1", RootCAs: w.pki.Pool(), MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{id},
	})
	if err != nil {
		return nil, err
	}
	return c, c.SetDeadline(time.Now().Add(time.Minute))
}

// Case 32: strangers who pay for TLS sessions, more of them than the service
// lets in.
func TestStrangersWithTLSPushOutEachOther(t *testing.T) {
	w := newWorld(t)
	m := w.machine()
	if _, _, err := w.get(m, "data-1", formatOp); err != nil {
		t.Fatal(err)
	}
	before := w.honest(3)
	var held []*tls.Conn
	for range 4 * w.cfg.MaxUnattested {
		c, err := w.encrypted()
		if err != nil {
			t.Fatal(err)
		}
		_, _ = c.Write([]byte{0, 0}) // half of a frame's length
		held = append(held, c)
	}
	during := w.honest(3)
	if _, _, err := w.get(m, "data-1", formatOp); err != nil {
		t.Errorf("a machine that was there before: %v", err)
	}
	for _, c := range held {
		c.Close()
	}
	report(t, before, during)
}

// Case 16: frames that announce what no memory holds.
func TestAnnouncedGigabytesTakeNoMemory(t *testing.T) {
	w := newWorld(t)
	before := resident(t)
	for i := range 100 {
		c, err := w.encrypted()
		if err != nil {
			t.Fatal(err)
		}
		size := []uint32{1 << 31, 1<<32 - 1, atls.MaxFrame + 1, 0}[i%4]
		if _, err := c.Write(binary.BigEndian.AppendUint32(nil, size)); err != nil {
			t.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, c) // until the service hangs up
		c.Close()
	}
	if rss := resident(t); rss > before+(128<<20) {
		t.Errorf("%d MiB, %d MiB before", rss>>20, before>>20)
	}
	if n := strings.Count(w.logged.String(), "bad attestation frame"); n < 100 {
		t.Errorf("the log names %d of 100", n)
	}
	w.honest(1)
}

// Case 27: an event log of 10 MB is more than a frame; one of a frame's size is
// more than a log.
func TestAnEventLogThatIsTooLargeIsRefusedCheaply(t *testing.T) {
	w := newWorld(t)
	path := filepath.Join(w.dir, "eventlog")
	honest := w.issuer
	for _, size := range []int{10 << 20, tpm.MaxEventLog + 1} {
		if err := os.WriteFile(path, make([]byte, size), 0o600); err != nil {
			t.Fatal(err)
		}
		var err error
		if w.issuer, err = tpm.NewIssuer(tpm.IssuerOptions{Device: w.tpm.Device, EventLog: path}); err != nil {
			t.Fatal(err)
		}
		if _, _, err := w.get(w.machine(), "data-1", formatOp); err == nil {
			t.Errorf("%d bytes are accepted", size)
		}
	}
	// The issuer above is the honest one, which sends no such log. Anyone who sends
	// the bytes anyway is cut off at the frame.
	c, err := w.encrypted()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	frame := append(binary.BigEndian.AppendUint32(nil, 10<<20), bytes.Repeat([]byte{0x0a}, 10<<20)...)
	_, _ = c.Write(frame)
	_, _ = io.Copy(io.Discard, c)
	w.issuer = honest
	w.honest(1)
}

// Case 36: many machines at once, more than requests are worked on at a time.
func TestManyMachinesAtOnceAreAllServed(t *testing.T) {
	w := newWorld(t)
	m := w.machine()
	if _, _, err := w.get(m, "data-1", formatOp); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for i := range 25 {
				if _, _, err := w.get(m, fmt.Sprint("data-", i), formatOp); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	_, _, err := w.get(m, "other", formatOp)
	wantClass(t, err, failure.PolicyDenied)
}

// Case 34: whatever became of its clients, a service that has stopped has
// nothing running.
func TestAServiceThatStoppedLeavesNothingRunning(t *testing.T) {
	before := goleak.IgnoreCurrent()
	t.Run("service", func(t *testing.T) {
		w := newWorld(t)
		w.honest(1)
		closeAll := w.wave(200, func(c net.Conn) { c.Write([]byte{22, 3}) })
		t.Cleanup(closeAll) // they outlive the service
		c, err := w.encrypted()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		started := time.Now()
		w.stop()
		if took := time.Since(started); took >= stopTimeout {
			t.Errorf("strangers kept it from stopping for %s", took)
		}
	})
	goleak.VerifyNone(t, before)
}
