package endorsement

import (
	"bytes"
	"crypto/x509"
	"math/big"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"
)

func TestMemoryKeepsWhatWasSeen(t *testing.T) {
	dir := t.TempDir()
	open := func() *Memory {
		t.Helper()
		m, err := OpenMemory(dir)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = m.Close() })
		return m
	}
	one, other := &x509.Certificate{RawSubject: []byte("one")}, &x509.Certificate{RawSubject: []byte("other")}
	when := time.Unix(1_700_000_000, 0).UTC()
	list := func(serials ...int64) *x509.RevocationList {
		l := &x509.RevocationList{}
		for _, s := range serials {
			l.RevokedCertificateEntries = append(l.RevokedCertificateEntries, x509.RevocationListEntry{SerialNumber: big.NewInt(s), RevocationTime: when})
		}
		return l
	}
	m := open()
	m.Remember(one, list(1, 2))
	m.Remember(one, list(3)) // a list of the other kind of keys
	m.Remember(one, list())
	for name, m := range map[string]*Memory{"this process": m, "the next": open()} {
		for serial, want := range map[int64]bool{1: true, 2: true, 3: true, 4: false} {
			if since, ok := m.Revoked(one, big.NewInt(serial)); ok != want || ok && !since.Equal(when) {
				t.Errorf("%s: %d is %v, %s", name, serial, ok, since)
			}
			if _, ok := m.Revoked(other, big.NewInt(serial)); ok {
				t.Errorf("%s: %d of another authority is revoked", name, serial)
			}
		}
	}

	newest := func(m *Memory, number uint64, body string) (string, bool) {
		t.Helper()
		d, same := m.Newest("tcb-00", number, Document{Body: []byte(body), Chain: []byte("chain")})
		if string(d.Chain) != "chain" {
			t.Errorf("the chain is %q", d.Chain)
		}
		return string(d.Body), same
	}
	for _, step := range []struct {
		number uint64
		body   string
		want   string
	}{{5, "five", "five"}, {4, "four", "five"}, {5, "five again", "five again"}, {7, "seven", "seven"}, {5, "five", "seven"}} {
		if got, same := newest(m, step.number, step.body); got != step.want || same != (got == step.body) {
			t.Errorf("%d gives %q, %v", step.number, got, same)
		}
	}
	if got, _ := newest(open(), 6, "six"); got != "seven" {
		t.Errorf("the next process gives %q", got)
	}
	// The zero value keeps what it saw as long as it lives.
	var short Memory
	short.Remember(one, list(9))
	if _, ok := short.Revoked(one, big.NewInt(9)); !ok || short.Close() != nil {
		t.Error("the zero value forgets at once")
	}
}

// Two processes have one folder, as an agent and a key service on one machine: neither
// writes over what the other one saw.
func TestTwoProcessesShareAMemory(t *testing.T) {
	dir := t.TempDir()
	ca := &x509.Certificate{RawSubject: []byte("one")}
	open := func() *Memory {
		m, err := OpenMemory(dir)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = m.Close() })
		return m
	}
	a, b := open(), open()
	for n, m := range []*Memory{a, b, a, b} {
		m.Remember(ca, &x509.RevocationList{RevokedCertificateEntries: []x509.RevocationListEntry{{SerialNumber: big.NewInt(int64(n)), RevocationTime: time.Now()}}})
	}
	a.Newest("tcb", 5, Document{Body: []byte("five")})
	b.Newest("tcb", 9, Document{Body: []byte("nine")})
	if d, same := a.Newest("tcb", 7, Document{Body: []byte("seven")}); same || string(d.Body) != "nine" {
		t.Errorf("beside a process that saw number 9, number 7 gives %q", d.Body)
	}
	later := open()
	for n := range int64(4) {
		if _, ok := later.Revoked(ca, big.NewInt(n)); !ok {
			t.Errorf("%d is forgotten", n)
		}
	}
	if d, _ := later.Newest("tcb", 1, Document{Body: []byte("one")}); string(d.Body) != "nine" {
		t.Errorf("afterwards it is %q", d.Body)
	}
}

// What somebody damaged on the disk is as if it had not been seen, and no more.
func TestADamagedMemoryIsAnEmptyOne(t *testing.T) {
	dir := t.TempDir()
	ca := &x509.Certificate{RawSubject: []byte("one")}
	m, err := OpenMemory(dir)
	if err != nil {
		t.Fatal(err)
	}
	m.Remember(ca, &x509.RevocationList{RevokedCertificateEntries: []x509.RevocationListEntry{{SerialNumber: big.NewInt(1), RevocationTime: time.Now()}}})
	m.Newest("tcb", 5, Document{Body: []byte("five")})
	_ = m.Close()
	files, err := filepath.Glob(filepath.Join(dir, "seen", "*"))
	if err != nil || len(files) != 2 {
		t.Fatal(files, err)
	}
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(f, bytes.ToUpper(data[:len(data)-3]), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if m, err = OpenMemory(dir); err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if _, ok := m.Revoked(ca, big.NewInt(1)); ok {
		t.Error("a damaged file speaks")
	}
	if d, same := m.Newest("tcb", 1, Document{Body: []byte("one")}); !same || string(d.Body) != "one" {
		t.Errorf("%q", d.Body)
	}
}

func TestMemoryIsForManyVerifiers(t *testing.T) {
	m, err := OpenMemory(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	ca := &x509.Certificate{RawSubject: []byte("one")}
	var wg sync.WaitGroup
	for n := range int64(16) {
		wg.Go(func() {
			m.Remember(ca, &x509.RevocationList{RevokedCertificateEntries: []x509.RevocationListEntry{{SerialNumber: big.NewInt(n), RevocationTime: time.Now()}}})
			m.Revoked(ca, big.NewInt(n))
			m.Newest("tcb", uint64(n), Document{Body: []byte{byte(n)}})
		})
	}
	wg.Wait()
	for n := range int64(16) {
		if _, ok := m.Revoked(ca, big.NewInt(n)); !ok {
			t.Errorf("%d is forgotten", n)
		}
	}
	if d, _ := m.Newest("tcb", 0, Document{}); len(d.Body) != 1 || d.Body[0] != 15 {
		t.Errorf("%v", d.Body)
	}
}
