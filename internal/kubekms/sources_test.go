package kubekms

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/keyclient"
	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/kms/backend"
)

// local is a KMS with one KEK.
type local struct {
	kek  *secret.Bytes
	down error
}

func (l *local) Generate(ctx context.Context, b kms.Binding) (*kms.Secret, kms.Wrapped, error) {
	return backend.Generate(ctx, b, l.Wrap)
}

func (l *local) Wrap(_ context.Context, b kms.Binding, key *kms.Secret) (w kms.Wrapped, err error) {
	w = kms.Wrapped{Scheme: "test", KEK: "test:1"}
	w.Blob, err = backend.Seal(l.kek, b, key)
	return w, errors.Join(err, l.down)
}

func (l *local) Unwrap(ctx context.Context, b kms.Binding, w kms.Wrapped) (*kms.Secret, error) {
	if err := errors.Join(l.down, backend.CheckUnwrap(ctx, b, w, "test")); err != nil {
		return nil, err
	}
	return backend.Open(l.kek, b, w.Blob)
}

func classify(err error) error {
	if errors.Is(err, kms.ErrWrongKey) {
		return failure.New(failure.WrongKey, err, "")
	}
	return failure.New(failure.Unreachable, err, "")
}

func ids(t *testing.T, k *Keys, err error) []string {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	var out []string
	for _, s := range append([]*secret.Bytes{k.Current}, k.Old...) {
		id, err := KeyID(s)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, id)
	}
	return out
}

func TestAFileOfWrappedKEKsIsMadeRotatedAndShortened(t *testing.T) {
	k := &local{kek: secretOf(t, kekA)}
	t.Cleanup(func() { k.kek.Close() })
	w := &WrappedFile{Path: filepath.Join(t.TempDir(), "kek"), KMS: k, Classify: classify}
	if _, err := w.Fetch(t.Context()); failure.Of(err).Class != failure.NotFound {
		t.Errorf("no file: %v", err)
	}
	if err := w.Init(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := w.Init(t.Context()); !errors.Is(err, fs.ErrExist) {
		t.Errorf("a second time: %v", err)
	}
	keys, err := w.Fetch(t.Context())
	first := ids(t, keys, err)
	for want := uint32(2); want <= 3; want++ {
		if version, err := w.Rotate(t.Context()); err != nil || version != want {
			t.Fatalf("version %d, %v", version, err)
		}
	}
	keys, err = w.Fetch(t.Context())
	all := ids(t, keys, err)
	if len(all) != 3 || all[2] != first[0] || all[0] == all[1] {
		t.Errorf("%v after %v", all, first)
	}
	if n, err := w.Forget(3); err != nil || n != 2 {
		t.Errorf("%d, %v", n, err)
	}
	if _, err := w.Forget(4); failure.Of(err).Class != failure.Usage {
		t.Errorf("the last one: %v", err)
	}
	keys, err = w.Fetch(t.Context())
	if left := ids(t, keys, err); len(left) != 1 || left[0] != all[0] {
		t.Errorf("%v of %v", left, all)
	}
	if data, err := os.ReadFile(w.Path); err != nil || bytes.Contains(data, []byte(kekA)) {
		t.Errorf("%s, %v", data, err)
	}
	k.down = kms.ErrUnavailable
	if _, err := w.Fetch(t.Context()); failure.Of(err).Class != failure.Unreachable {
		t.Errorf("without the KMS: %v", err)
	}
}

// TestAWrappedKEKOpensForItsVersionAlone: anyone who writes the file cannot make an old
// KEK the new one by another number.
func TestAWrappedKEKOpensForItsVersionAlone(t *testing.T) {
	k := &local{kek: secretOf(t, kekA)}
	t.Cleanup(func() { k.kek.Close() })
	w := &WrappedFile{Path: filepath.Join(t.TempDir(), "kek"), KMS: k, Classify: classify}
	if err := w.Init(t.Context()); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(w.Path)
	if err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		text  string
		class failure.Class
	}{
		"another version":  {strings.Replace(string(data), `"version": 1,`+"\n      \"created\"", `"version": 2,`+"\n      \"created\"", 1), failure.WrongKey},
		"another format":   {strings.Replace(string(data), `"version": 1`, `"version": 9`, 1), failure.Tampered},
		"an unknown field": {strings.Replace(string(data), `"keys"`, `"extra": 1, "keys"`, 1), failure.Tampered},
		"no keys":          {`{"version": 1, "keys": []}`, failure.Tampered},
		"something behind": {string(data) + "x", failure.Tampered},
		"nothing":          {"", failure.Tampered},
	} {
		if err := os.WriteFile(w.Path, []byte(tt.text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Fetch(t.Context()); failure.Of(err).Class != tt.class {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// released is a key service with one record.
type released struct {
	state keyclient.State // zero: none
	mac   [32]byte
	dek   string
}

func (r *released) GetKey(_ context.Context, q keyclient.Request) (*keyclient.Key, error) {
	if !q.Diskless {
		return nil, failure.Newf(failure.Held, "", "a lease was asked for")
	}
	if r.state == 0 && !q.Format {
		return nil, failure.Newf(failure.NotFound, "", "no record")
	}
	if r.state == 0 {
		r.state = keyclient.Pending
	}
	s, err := secret.From([]byte(r.dek))
	return &keyclient.Key{DEK: s, State: r.state, MACs: keyclient.MACs{Header: r.mac}, Volume: q.Volume, Expires: time.Now().Add(time.Hour)}, err
}

func (r *released) CreateDiskless(_ context.Context, _ *keyclient.Key, mac [32]byte) error {
	r.state, r.mac = keyclient.Active, mac
	return nil
}

func TestAnAttestedKEKIsThatOfItsRecord(t *testing.T) {
	service := &released{dek: kekA}
	a := &Attested{Keys: service, Volume: "etcd-kek"}
	if _, err := a.Fetch(t.Context()); failure.Of(err).Class != failure.NotFound {
		t.Errorf("before it is made: %v", err)
	}
	for range 2 { // the second time it is there
		if err := a.Init(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	keys, err := a.Fetch(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if time.Until(keys.Expires) < time.Minute {
		t.Errorf("the lease ends at %s", keys.Expires)
	}
	if got := ids(t, keys, nil); got[0] == idOf(t, kekA) {
		t.Error("the DEK itself is the KEK")
	}
	service.dek = kekB
	if _, err := a.Fetch(t.Context()); failure.Of(err).Class != failure.WrongKey {
		t.Errorf("another key: %v", err)
	}
	service.dek, service.mac = kekA, [32]byte{1}
	if err := a.Init(t.Context()); failure.Of(err).Class != failure.WrongKey {
		t.Errorf("the record of a disk: %v", err)
	}
	service.state, service.mac = keyclient.Pending, [32]byte{}
	if _, err := a.Fetch(t.Context()); failure.Of(err).Class != failure.WrongKey {
		t.Errorf("a record that was never confirmed: %v", err)
	}
}

type fetched string

func (f fetched) Fetch(context.Context) (*secret.Bytes, error) {
	if f == down {
		return nil, kms.ErrUnavailable
	}
	return secret.From([]byte(f))
}

func TestOneOldKEKThatFailsFailsTheFetch(t *testing.T) {
	keys, err := FromFetchers(fetched(kekA), fetched(kekB), fetched(kekA)).Fetch(t.Context())
	if got := ids(t, keys, err); len(got) != 3 || got[0] != idOf(t, kekA) || got[1] != idOf(t, kekB) {
		t.Errorf("%v", got)
	}
	if _, err := FromFetchers(fetched(kekA), fetched(down)).Fetch(t.Context()); failure.Of(err).Class != failure.Unreachable {
		t.Errorf("%v", err)
	}
}

func FuzzWrappedFile(f *testing.F) {
	f.Add([]byte(`{"version": 1, "keys": [{"version": 1, "created": "2026-01-01T00:00:00Z", "wrapped": {"scheme": "x", "kek": "y", "blob": "AAAA"}}]}`))
	f.Add([]byte(`{"version": 1, "keys": []}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		file, err := parseWrapped(data)
		if err == nil && (len(file.Keys) == 0 || len(file.Keys) > maxWrappedKeys || file.Keys[0].Version == 0) {
			t.Errorf("%q", data)
		}
	})
}
