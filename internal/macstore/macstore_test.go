package macstore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/kms/backend"
	"github.com/keyagent/keyagent/kms/cluster"
	"github.com/keyagent/keyagent/storage"
	"github.com/keyagent/keyagent/storage/memfs"
)

func wantErr(t testing.TB, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("got %v, want %v", err, want)
	}
}

func newKMS(t testing.TB, master string) *cluster.KMS {
	t.Helper()
	m, err := secret.From([]byte(master))
	if err != nil {
		t.Fatal(err)
	}
	k, err := cluster.New(cluster.Options{MasterSecret: m})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.Close() })
	return k
}

func newStore(t testing.TB, master string, s storage.Storage) *Store {
	t.Helper()
	b, err := Open(context.Background(), newKMS(t, master), s, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	return b
}

const master = "0123456789abcdef"

func TestARecordComesBackAsItWasStored(t *testing.T) {
	s := memfs.New()
	b := newStore(t, master, s)
	if err := b.Put(t.Context(), Volume, "data-1", []byte("{}\n"), storage.Absent); err != nil {
		t.Fatal(err)
	}
	body, version, err := newStore(t, master, s).Get(t.Context(), Volume, "data-1")
	if err != nil || string(body) != "{}\n" {
		t.Fatalf("%q, %v", body, err)
	}
	wantErr(t, b.Put(t.Context(), Volume, "data-1", nil, storage.Absent), storage.ErrConflict)
	if err := b.Put(t.Context(), Volume, "data-1", nil, version); err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"data-2", "data-3"} {
		if err := b.Put(t.Context(), Volume, id, nil, storage.Absent); err != nil {
			t.Fatal(err)
		}
	}
	ids, err := b.List(t.Context(), Volume, "data-1", 10)
	if err != nil || strings.Join(ids, " ") != "data-2 data-3" {
		t.Errorf("%q, %v", ids, err)
	}
	if ids, err := b.List(t.Context(), DEK, "", 10); err != nil || len(ids) != 0 {
		t.Errorf("%q, %v", ids, err)
	}
}

// Case 41: who writes the storage and has no MAC key changes nothing.
func TestARecordThatWasTamperedWithIsRefused(t *testing.T) {
	b := newStore(t, master, memfs.New())
	stored, err := b.Encode(Volume, "data-1", []byte(`{"some":"record"}`))
	if err != nil {
		t.Fatal(err)
	}
	magic := len(Volume.Magic)
	for i := range stored {
		for _, flip := range []byte{1, 0x20, 0x80} {
			changed := bytes.Clone(stored)
			changed[i] ^= flip
			// The MAC itself may be spelled in capitals: that says the same.
			if i >= magic && i < magic+64 && strings.EqualFold(string(changed), string(stored)) {
				continue
			}
			_, err := b.Decode(Volume, "data-1", changed)
			wantErr(t, err, ErrRefused)
		}
	}
	for name, data := range map[string][]byte{
		"empty": nil, "its first line": stored[:bytes.IndexByte(stored, '\n')+1], "cut": stored[:len(stored)-1],
		"longer": append(bytes.Clone(stored), '\n'), "twice": append(bytes.Clone(stored), stored...),
		"without a MAC":       append([]byte(Volume.Magic+"\n"), stored[bytes.IndexByte(stored, '\n')+1:]...),
		"of version 2":        bytes.Replace(stored, []byte("record 1 "), []byte("record 2 "), 1),
		"the JSON by itself":  stored[bytes.IndexByte(stored, '\n')+1:],
		"larger than allowed": append(bytes.Clone(stored), make([]byte, MaxSize)...),
	} {
		if _, err := b.Decode(Volume, "data-1", data); !errors.Is(err, ErrRefused) {
			t.Errorf("%s: %v", name, err)
		}
	}
	_, err = b.Decode(Volume, "data-2", stored)
	wantErr(t, err, ErrRefused)
	_, err = b.Decode(DEK, "data-1", bytes.Replace(stored, []byte(Volume.Magic), []byte(DEK.Magic), 1))
	wantErr(t, err, ErrRefused)
	_, err = newStore(t, "another master secret", memfs.New()).Decode(Volume, "data-1", stored)
	wantErr(t, err, ErrRefused)
	_, err = b.Encode(Volume, "data-1", make([]byte, MaxSize))
	wantErr(t, err, ErrRefused)
}

// Case 41: the MAC key is one of the things that storage may lose.
func TestTheMACKeyIsMadeOnce(t *testing.T) {
	s := memfs.New()
	var wg sync.WaitGroup
	ids := make([]string, 8)
	for i := range ids {
		wg.Go(func() {
			k := newKMS(t, master)
			b, err := Open(t.Context(), wrapping{k}, s, nil)
			if err != nil {
				t.Error(err)
				return
			}
			defer b.Close()
			ids[i], _ = b.KeyID()
		})
	}
	wg.Wait()
	for _, id := range ids {
		if id != ids[0] || len(id) != 32 {
			t.Fatalf("eight replicas have the MAC keys %q", ids)
		}
	}
	b, err := Open(t.Context(), wrapping{newKMS(t, master)}, s, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if err := b.Put(t.Context(), DEK, "a", nil, storage.Absent); err != nil {
		t.Fatal(err)
	}
	data, version, err := s.Get(t.Context(), macKeyName)
	if err != nil {
		t.Fatal(err)
	}
	for name, planted := range map[string][]byte{
		"nothing": {}, "no JSON": []byte("x"), "an unknown field": []byte(`{"scheme":"a","kek":"b","more":1}`), "more behind it": append(bytes.Clone(data), "{}"...),
	} {
		if version, err = s.Put(t.Context(), macKeyName, planted, version); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(t.Context(), newKMS(t, master), s, nil); !errors.Is(err, ErrRefused) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := s.Delete(t.Context(), macKeyName, version); err != nil {
		t.Fatal(err)
	}
	_, err = Open(t.Context(), newKMS(t, master), s, nil)
	wantErr(t, err, ErrMACKey)
}

// wrapping is a KMS that cannot derive: each key that it makes is another one.
type wrapping struct{ kms.KMS }

func (w wrapping) Generate(ctx context.Context, b kms.Binding) (*kms.Secret, kms.Wrapped, error) {
	return backend.Generate(ctx, b, w.Wrap)
}

// liar acknowledges writes and does something else.
type liar struct {
	storage.Storage
	put func(name string, data []byte, expect storage.Version) (storage.Version, error)
}

func (l *liar) Put(ctx context.Context, name string, data []byte, expect storage.Version) (storage.Version, error) {
	if l.put != nil {
		return l.put(name, data, expect)
	}
	return l.Storage.Put(ctx, name, data, expect)
}

// Case 42.
func TestAWriteThatIsAcknowledgedAndNotStoredIsAnError(t *testing.T) {
	s := &liar{Storage: memfs.New()}
	b := newStore(t, master, s)
	s.put = func(string, []byte, storage.Version) (storage.Version, error) { return "v", nil }
	wantErr(t, b.Put(t.Context(), DEK, "a", nil, storage.Absent), ErrNotStored)
	s.put = func(name string, data []byte, expect storage.Version) (storage.Version, error) {
		return s.Storage.Put(t.Context(), name, data[:len(data)/2], expect)
	}
	wantErr(t, b.Put(t.Context(), DEK, "b", []byte("body"), storage.Absent), ErrNotStored)
	s.put = nil
	if err := b.Put(t.Context(), DEK, "c", []byte("old"), storage.Absent); err != nil {
		t.Fatal(err)
	}
	_, version, err := b.Get(t.Context(), DEK, "c")
	if err != nil {
		t.Fatal(err)
	}
	s.put = func(string, []byte, storage.Version) (storage.Version, error) { return "v", nil }
	wantErr(t, b.Put(t.Context(), DEK, "c", []byte("new"), version), storage.ErrConflict)
}

func TestTheMACKeyGetsAnotherWrappedFormAndStaysTheSame(t *testing.T) {
	s := memfs.New()
	b := newStore(t, master, s)
	if err := b.Put(t.Context(), DEK, "a", []byte("body"), storage.Absent); err != nil {
		t.Fatal(err)
	}
	next := newKMS(t, "another master secret")
	if err := b.RewrapMACKey(t.Context(), kms.WithOld(next, newKMS(t, master))); err != nil {
		t.Fatal(err)
	}
	after := newStore(t, "another master secret", s)
	if body, _, err := after.Get(t.Context(), DEK, "a"); err != nil || string(body) != "body" {
		t.Errorf("%q, %v", body, err)
	}
	if w, err := after.MACKey(t.Context()); err != nil || w.KEK != next.KEK() {
		t.Errorf("%q, %v", w.KEK, err)
	}
	_, err := Open(t.Context(), newKMS(t, master), s, nil)
	wantErr(t, err, kms.ErrWrongKey)
}

// FuzzDecode: nothing is read that has no MAC.
func FuzzDecode(f *testing.F) {
	b := newStore(f, master, memfs.New())
	stored, err := b.Encode(Volume, "data-1", []byte("{}"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(stored[:len(stored)-1])
	f.Add([]byte(Volume.Magic + "\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if body, err := b.Decode(Volume, "data-1", data); !errors.Is(err, ErrRefused) && string(body) != "{}" {
			t.Fatalf("%q was read: %v", body, err)
		}
	})
}

// Case 41: who exchanges the MAC key while a re-wrap runs does not get his own
// wrapped under the KEK to which the records move.
func TestARewrapDoesNotTakeAMACKeyThatWasExchanged(t *testing.T) {
	s := memfs.New()
	b := newStore(t, master, s)
	old, next := newKMS(t, master), newKMS(t, "another master secret")
	planted, w, err := wrapping{old}.Generate(t.Context(), macBinding)
	if err != nil {
		t.Fatal(err)
	}
	planted.Close()
	_, version, err := s.Get(t.Context(), macKeyName)
	if err != nil {
		t.Fatal(err)
	}
	if err := putMACKey(t.Context(), s, w, version); err != nil {
		t.Fatal(err)
	}
	wantErr(t, b.RewrapMACKey(t.Context(), kms.WithOld(next, old)), ErrMACKey)
	_, err = OpenExisting(t.Context(), next, s)
	wantErr(t, err, kms.ErrWrongKey)
}

// damaging wraps keys that never come back.
type damaging struct{ wrapping }

func (d damaging) Generate(ctx context.Context, b kms.Binding) (*kms.Secret, kms.Wrapped, error) {
	key, w, err := d.wrapping.Generate(ctx, b)
	if err == nil {
		w.Blob[len(w.Blob)-1] ^= 1
	}
	return key, w, err
}

// Case 42: a MAC key that does not come back from its stored form authenticates
// nothing, not even until the next start.
func TestAMACKeyThatDoesNotComeBackIsNotUsed(t *testing.T) {
	b, err := Open(t.Context(), damaging{wrapping{newKMS(t, master)}}, memfs.New(), nil)
	if !errors.Is(err, kms.ErrWrongKey) || b != nil {
		t.Errorf("%v, %v", b, err)
	}
}

// flapping says in turn that there is nothing and that there is something.
type flapping struct{ storage.Storage }

func (flapping) Get(context.Context, string) ([]byte, storage.Version, error) {
	return nil, "", storage.ErrNotFound
}

func (flapping) Put(context.Context, string, []byte, storage.Version) (storage.Version, error) {
	return "", storage.ErrConflict
}

func TestStorageThatContradictsItselfIsGivenUp(t *testing.T) {
	_, err := Open(t.Context(), newKMS(t, master), flapping{memfs.New()}, nil)
	wantErr(t, err, storage.ErrConflict)
}

// A walk that is cancelled between two records says so.
func TestAWalkThatWasCancelledSaysSo(t *testing.T) {
	b := newStore(t, master, memfs.New())
	for i := range 20 {
		if err := b.Put(t.Context(), DEK, fmt.Sprintf("v%d", i), nil, storage.Absent); err != nil {
			t.Fatal(err)
		}
	}
	for range 50 {
		ctx, cancel := context.WithCancel(t.Context())
		go cancel()
		p, err := b.Walk(ctx, DEK, func(_ string, body []byte, _ func(kms.Binding, kms.Wrapped) (kms.Wrapped, error)) ([]byte, error) {
			return body, nil
		}, nil, nil)
		if err == nil && p.Done != p.Total {
			t.Fatalf("%+v without an error", p)
		}
	}
}

// The vectors of docs/spec/audit.md, which another program computed: what is derived of a
// record MAC key of 32 bytes 0x01.
func TestWhatIsDerivedHasItsVectors(t *testing.T) {
	key, err := secret.From(bytes.Repeat([]byte{1}, 32))
	if err != nil {
		t.Fatal(err)
	}
	m := &Store{macKey: key}
	defer m.Close()
	for domain, want := range map[string]string{
		"keyagent audit checkpoint key v1": "b56695c2b5220f939672b2cb3b72e0f082ac3b8fb6023b8050f4b0cffa81a0b8",
		"keyagent epoch key v1":            "a98fd913c302fbb2e121e01ba0c74b3799bddf62d406283bdf3d0f35427a1525",
	} {
		out, err := m.Derive(domain, 32)
		if err != nil {
			t.Fatal(err)
		}
		if err := out.Use(func(b []byte) error {
			if got := fmt.Sprintf("%x", b); got != want {
				t.Errorf("%s: %s", domain, got)
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		out.Close()
	}
}
