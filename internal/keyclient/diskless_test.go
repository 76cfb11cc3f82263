package keyclient

import (
	"context"
	"encoding/hex"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/secret"
)

// oneRecord is a key service with one record.
type oneRecord struct {
	mu      sync.Mutex
	state   State // zero: none
	mac     [32]byte
	dek     string
	held    int // so many attempts fail, because somebody else's is under way
	created int
	asked   []Request
	open    []*Key
}

func (o *oneRecord) GetKey(_ context.Context, r Request) (*Key, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.asked = append(o.asked, r)
	switch {
	case o.state == 0 && !r.Format:
		return nil, failure.Newf(failure.NotFound, "", "no record")
	case o.state == Pending && !r.Format:
		return nil, failure.Newf(failure.State, "", "not active")
	case r.Format && o.held > 0:
		o.held--
		o.state, o.mac = Active, [32]byte{9}
		return nil, failure.Newf(failure.Held, "", "being created")
	case o.state == 0:
		o.state = Pending
	}
	dek, err := secret.From([]byte(o.dek))
	k := &Key{DEK: dek, State: o.state, Volume: r.Volume, MACs: MACs{Header: o.mac}}
	o.open = append(o.open, k)
	return k, err
}

func (o *oneRecord) CreateDiskless(_ context.Context, _ *Key, mac [32]byte) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.created++
	o.state, o.mac = Active, mac
	return nil
}

// wiped reports whether no key is left that was not given.
func (o *oneRecord) wiped(given *Key) bool {
	for _, k := range o.open {
		if k != given && k.DEK.Use(func([]byte) error { return nil }) == nil {
			return false
		}
	}
	return true
}

func diskless(o *oneRecord) *Diskless {
	return &Diskless{Keys: o, Volume: "key-1", Domain: "a test", Length: 16}
}

const dek16 = "0123456789abcdef"

func TestAKeyWithoutADiskIsMadeOnceAndKept(t *testing.T) {
	o := &oneRecord{dek: dek16}
	if _, err := diskless(o).Get(t.Context()); failure.Of(err).Class != failure.NotFound {
		t.Errorf("before it is made: %v", err)
	}
	for range 2 {
		k, err := diskless(o).Obtain(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		_ = k.DEK.Use(func(b []byte) error {
			if string(b) != dek16 {
				t.Errorf("it is %q", b)
			}
			return nil
		})
		k.Close()
	}
	if o.created != 1 {
		t.Errorf("it was made %d times", o.created)
	}
	for _, r := range o.asked {
		if !r.Diskless || r.Length != 16 || r.Volume != "key-1" {
			t.Errorf("asked for %+v", r)
		}
	}
	if !o.wiped(nil) {
		t.Error("a key is left")
	}
}

func TestARecordOfAnotherUseGivesNoKey(t *testing.T) {
	made := func() *oneRecord {
		o := &oneRecord{dek: dek16}
		k, err := diskless(o).Obtain(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		k.Close()
		return o
	}
	for name, change := range map[string]func(*oneRecord, *Diskless){
		"another domain":                   func(_ *oneRecord, d *Diskless) { d.Domain = "another" },
		"another key":                      func(o *oneRecord, _ *Diskless) { o.dek = strings.Repeat("x", 16) },
		"a disk's":                         func(o *oneRecord, _ *Diskless) { o.mac = [32]byte{1} },
		"a disk's that is being created":   func(o *oneRecord, _ *Diskless) { o.state, o.mac = Formatted, [32]byte{1} },
		"a disk's that somebody else made": func(o *oneRecord, _ *Diskless) { o.state, o.held = 0, 1 },
	} {
		o := made()
		d := diskless(o)
		change(o, d)
		k, err := d.Obtain(t.Context())
		if class := failure.Of(err).Class; k != nil || class != failure.WrongKey && class != failure.Held {
			t.Errorf("%s: %v, %v", name, k, err)
		}
		if o.created != 1 || !o.wiped(nil) {
			t.Errorf("%s: it was made %d times, or a key is left", name, o.created)
		}
	}
}

// Of two attempts of one machine the later one ends the earlier.
func TestTwoWhoWantOneKeyMakeItOnce(t *testing.T) {
	o := &oneRecord{dek: dek16}
	var group sync.WaitGroup
	for range 16 {
		group.Go(func() {
			k, err := diskless(o).Obtain(t.Context())
			if err != nil {
				t.Error(err)
				return
			}
			k.Close()
		})
	}
	group.Wait()
	if o.created != 1 {
		t.Errorf("it was made %d times", o.created)
	}
	// Who waits for a turn does not wait for ever.
	making <- struct{}{}
	defer func() { <-making }()
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if _, err := diskless(&oneRecord{dek: dek16}).Obtain(ctx); err == nil || !strings.Contains(err.Error(), "deadline") {
		t.Errorf("%v", err)
	}
}

// TestTheVectorOfDataKeysHolds computes what docs/spec/volume-record.md says.
func TestTheVectorOfDataKeysHolds(t *testing.T) {
	text, err := os.ReadFile("../../docs/spec/volume-record.md")
	if err != nil {
		t.Fatal(err)
	}
	dek := make([]byte, 32)
	for i := range dek {
		dek[i] = byte(i)
	}
	s, err := secret.From(dek)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for _, domain := range []string{"keyagent data key confirmation v1", "keyagent kubekms attested KEK confirmation v1"} {
		mac, err := (&Diskless{Domain: domain}).confirmation(&Key{DEK: s})
		if want := "| `" + domain + "` | `" + hex.EncodeToString(mac[:]) + "` |"; err != nil || !strings.Contains(string(text), want) {
			t.Errorf("docs/spec/volume-record.md has no %s, %v", want, err)
		}
	}
}
