package keyservice

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/keyagent/keyagent/internal/macstore"
	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/internal/volume"
	"github.com/keyagent/keyagent/kms"
	kmsbackend "github.com/keyagent/keyagent/kms/backend"
	"github.com/keyagent/keyagent/kms/cluster"
	"github.com/keyagent/keyagent/kms/dek"
	"github.com/keyagent/keyagent/storage"
	"github.com/keyagent/keyagent/storage/memfs"
)

func clusterKMS(t testing.TB, master string) *cluster.KMS {
	t.Helper()
	m, err := secret.From([]byte(master))
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	k, err := cluster.New(cluster.Options{MasterSecret: m})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.Close() })
	return k
}

const (
	oldMaster = "the old master secret, 32 bytes."
	newMaster = "the new master secret, 32 bytes."
)

// fill makes volumes in every state and a key of the library, and returns the
// keys by the names of their objects.
func fill(t *testing.T, k kms.KMS, s storage.Storage) map[string]*secret.Bytes {
	t.Helper()
	r := openVolumes(t, k, s)
	for i := range 5 {
		id := fmt.Sprintf("data-%d", i)
		if _, err := r.Obtain(t.Context(), id, "grant", 0); err != nil {
			t.Fatal(err)
		}
		if i > 0 {
			activate(t, r, id)
		}
	}
	d, err := dek.Open(t.Context(), notClosed{k}, s)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	key, err := d.GetOrCreate(t.Context(), "pvc-1", 64)
	if err != nil {
		t.Fatal(err)
	}
	key.Close()
	return keysOf(t, k, s)
}

// notClosed keeps a KMS open that somebody else closes.
type notClosed struct{ kms.KMS }

func keysOf(t *testing.T, k kms.KMS, s storage.Storage) map[string]*secret.Bytes {
	t.Helper()
	book, err := macstore.OpenExisting(t.Context(), k, s)
	if err != nil {
		t.Fatal(err)
	}
	defer book.Close()
	keys := map[string]*secret.Bytes{}
	for _, kind := range macstore.Collections {
		ids, err := book.List(t.Context(), kind, "", 100)
		if err != nil {
			t.Fatal(err)
		}
		for _, id := range ids {
			body, _, err := book.Get(t.Context(), kind, id)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := visits(time.Now)[kind](id, body, func(b kms.Binding, w kms.Wrapped) (kms.Wrapped, error) {
				keys[kind.Prefix+id], err = k.Unwrap(t.Context(), b, w)
				return w, err
			}); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { keys[kind.Prefix+id].Close() })
		}
	}
	return keys
}

func sameKeys(t *testing.T, got, want map[string]*secret.Bytes) {
	t.Helper()
	if len(got) != len(want) {
		t.Errorf("there are %d keys, want %d", len(got), len(want))
	}
	for name, key := range want {
		if got[name] == nil || !got[name].Equal(key) {
			t.Errorf("%s has another key", name)
		}
	}
}

func admin(t *testing.T, k kms.KMS, s storage.Storage) *Admin {
	t.Helper()
	a, err := OpenAdmin(t.Context(), k, s, "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close() })
	return a
}

func TestEveryKeyMovesToAnotherKEKAndStaysTheSame(t *testing.T) {
	s := memfs.New()
	was := fill(t, clusterKMS(t, oldMaster), s)
	from, to := clusterKMS(t, oldMaster), clusterKMS(t, newMaster)
	a := admin(t, kms.WithOld(to, from), s)
	before, err := a.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if before.Current != to.KEK() || before.MACKey != from.KEK() || before.Keys[from.KEK()] != 6 || before.Volumes[volume.Active] != 4 ||
		before.Volumes[volume.Pending] != 1 || before.DEKs != 1 || before.Outdated != 7 || len(before.RecordKey) != 32 {
		t.Errorf("%+v", before)
	}
	var reports []macstore.Progress
	p, err := a.Rewrap(t.Context(), func(p macstore.Progress) { reports = append(reports, p) })
	if err != nil || p != (macstore.Progress{Total: 6, Done: 6, Changed: 6}) || len(reports) != 6 {
		t.Fatalf("%+v, %v, %d reports", p, err, len(reports))
	}
	if p, err := a.Rewrap(t.Context(), nil); err != nil || p.Changed != 0 {
		t.Errorf("again: %+v, %v", p, err)
	}
	after := admin(t, to, s) // without the old one
	status, err := after.Status(t.Context())
	if err != nil || status.Outdated != 0 || status.RecordKey != before.RecordKey {
		t.Errorf("%+v, %v", status, err)
	}
	sameKeys(t, keysOf(t, to, s), was)
	_, err = OpenAdmin(t.Context(), from, s, "")
	wantErr(t, err, kms.ErrWrongKey)
}

// failing refuses one key after some calls.
type failing struct {
	kms.KMS
	left atomic.Int32
	err  error
}

func (f *failing) Wrap(ctx context.Context, b kms.Binding, key *kms.Secret) (kms.Wrapped, error) {
	if f.left.Add(-1) < 0 {
		return kms.Wrapped{}, f.err
	}
	return f.KMS.Wrap(ctx, b, key)
}

func (f *failing) Current(ctx context.Context) (string, error) { return kms.Current(ctx, f.KMS) }

// Case 43: a key service that goes away leaves every key under one KEK or the
// other, and the next run goes on.
func TestARewrapThatFailsGoesOnLater(t *testing.T) {
	for _, cause := range []error{kms.ErrThrottled, kms.ErrCredentials, kms.ErrDenied, kms.ErrKEK, context.Canceled} {
		for n := range 7 {
			s := memfs.New()
			was := fill(t, clusterKMS(t, oldMaster), s)
			from, to := clusterKMS(t, oldMaster), clusterKMS(t, newMaster)
			broken := &failing{KMS: to, err: cause}
			broken.left.Store(int32(n))
			p, err := admin(t, kms.WithOld(broken, from), s).Rewrap(t.Context(), nil)
			if !errors.Is(err, cause) || p.Changed > n {
				t.Fatalf("%v after %d keys: %+v, %v", cause, n, p, err)
			}
			sameKeys(t, keysOf(t, kms.WithOld(to, from), s), was)
			if p, err := admin(t, kms.WithOld(to, from), s).Rewrap(t.Context(), nil); err != nil || p.Failed != 0 {
				t.Fatalf("%v after %d keys: %+v, %v", cause, n, p, err)
			}
			sameKeys(t, keysOf(t, to, s), was)
		}
	}
}

func TestARecordThatIsRefusedDoesNotHoldUpTheOthers(t *testing.T) {
	s := memfs.New()
	fill(t, clusterKMS(t, oldMaster), s)
	data, v, err := s.Get(t.Context(), "volumes/data-2")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Put(t.Context(), "volumes/data-2", append(data, ' '), v); err != nil {
		t.Fatal(err)
	}
	a := admin(t, kms.WithOld(clusterKMS(t, newMaster), clusterKMS(t, oldMaster)), s)
	status, err := a.Status(t.Context())
	if err != nil || len(status.Refused) != 1 || !strings.Contains(status.Refused[0], "volumes/data-2") {
		t.Errorf("%+v, %v", status, err)
	}
	p, err := a.Rewrap(t.Context(), nil)
	wantErr(t, err, volume.ErrRecord)
	if p.Failed != 1 || p.Changed < 4 {
		t.Errorf("%+v", p)
	}
	if p.Refused != 1 {
		t.Errorf("%+v", p)
	}
	// What is no record of ours opens under no KEK.
	if status, err = a.Status(t.Context()); err != nil || status.Outdated != 0 {
		t.Errorf("an object of a stranger holds up the MAC key: %+v, %v", status, err)
	}
}

// public is a KEK with a public half.
type public struct{ kms.KMS }

func (public) Public() bool                                  { return true }
func (p public) Current(ctx context.Context) (string, error) { return kms.Current(ctx, p.KMS) }

// Case 41: under a public KEK, anyone who writes the storage exchanges the MAC key
// and every record with it.
func TestAPlantedMACKeyIsRefused(t *testing.T) {
	k, s := public{clusterKMS(t, oldMaster)}, memfs.New()
	r, err := macstore.Open(t.Context(), k, s, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.CheckKey(k, ""); err != nil {
		t.Errorf("its own MAC key: %v", err)
	}
	known, err := r.KeyID()
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	_, err = OpenAdmin(t.Context(), k, s, "")
	wantErr(t, err, macstore.ErrMACKey)
	if err == nil || !strings.Contains(err.Error(), known) {
		t.Errorf("the error does not name the key that was found: %v", err)
	}
	_, err = OpenAdmin(t.Context(), k, s, strings.Repeat("0", 32))
	wantErr(t, err, macstore.ErrMACKey)
	a, err := OpenAdmin(t.Context(), k, s, known)
	if err != nil {
		t.Fatal(err)
	}
	a.Close()
	_, err = OpenAdmin(t.Context(), kms.WithOld(clusterKMS(t, newMaster), k), s, "")
	wantErr(t, err, macstore.ErrMACKey)
}

func export(t *testing.T, a *Admin, recipient []byte) ([]byte, string) {
	t.Helper()
	var out bytes.Buffer
	digest, p, err := a.Export(t.Context(), &out, recipient, nil)
	if err != nil || p.Done != 6 {
		t.Fatalf("%+v, %v", p, err)
	}
	return out.Bytes(), digest
}

func identity(t *testing.T) (*secret.Bytes, []byte) {
	t.Helper()
	id, recipient, err := NewTransferIdentity()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { id.Close() })
	return id, recipient
}

func imports(t *testing.T, a *Admin, file []byte, id *secret.Bytes, digest string) (Imported, error) {
	t.Helper()
	e, err := OpenExport(bytes.NewReader(file), id, digest)
	if err != nil {
		return Imported{}, err
	}
	defer e.Close()
	return a.Import(t.Context(), e)
}

func TestAnExportIsImportedElsewhere(t *testing.T) {
	from, to := memfs.New(), memfs.New()
	was := fill(t, clusterKMS(t, oldMaster), from)
	id, recipient := identity(t)
	file, digest := export(t, admin(t, clusterKMS(t, oldMaster), from), recipient)
	for name, key := range was {
		_ = key.Use(func(b []byte) error {
			if bytes.Contains(file, b) || bytes.Contains(file, []byte(hex.EncodeToString(b))) {
				t.Errorf("the key of %s is in the file", name)
			}
			return nil
		})
	}
	k := clusterKMS(t, newMaster)
	open := func() *Admin {
		a, err := OpenNewAdmin(t.Context(), k, to, "", nil)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { a.Close() })
		return a
	}
	done, err := imports(t, open(), file, id, digest)
	if err != nil || done != (Imported{Created: 6}) {
		t.Fatalf("%+v, %v", done, err)
	}
	sameKeys(t, keysOf(t, k, to), was)
	if done, err := imports(t, open(), file, id, digest); err != nil || done != (Imported{Present: 6}) {
		t.Errorf("again: %+v, %v", done, err)
	}
	// A volume of the same name that is another one.
	other := memfs.New()
	a, err := OpenNewAdmin(t.Context(), k, other, "", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	fill(t, k, other)
	_, err = imports(t, a, file, id, digest)
	wantErr(t, err, ErrExists)
}

func TestAnExportThatIsNotTheOneIsRefusedAndNothingIsWritten(t *testing.T) {
	from := memfs.New()
	fill(t, clusterKMS(t, oldMaster), from)
	id, recipient := identity(t)
	file, _ := export(t, admin(t, clusterKMS(t, oldMaster), from), recipient)
	lines := strings.SplitAfter(string(file), "\n")
	swap := func(i, j int) string {
		l := slices.Clone(lines)
		l[i], l[j] = l[j], l[i]
		return strings.Join(l, "")
	}
	stranger, _ := identity(t)
	for name, tt := range map[string]struct {
		text string
		id   *secret.Bytes
	}{
		"empty": {"", id}, "another file": {"hello\n", id}, "of version 2": {strings.Replace(string(file), "export 1", "export 2", 1), id},
		"without its end": {strings.Join(lines[:len(lines)-2], ""), id}, "cut": {string(file[:len(file)/2]), id},
		"a record left out": {strings.Join(slices.Delete(slices.Clone(lines), 3, 4), ""), id}, "two records in another order": {swap(2, 3), id},
		"a record twice": {strings.Join(slices.Insert(slices.Clone(lines), 3, lines[2]), ""), id}, "more behind it": {string(file) + lines[2], id},
		"an endless line": {lines[0] + strings.Repeat("A", maxExportLine+1), id}, "a changed line": {strings.Replace(string(file), lines[3][:8], "AAAAAAAA", 1), id},
		"for somebody else": {string(file), stranger},
	} {
		t.Run(name, func(t *testing.T) {
			to := memfs.New()
			a, err := OpenNewAdmin(t.Context(), clusterKMS(t, newMaster), to, "", nil)
			if err != nil {
				t.Fatal(err)
			}
			defer a.Close()
			_, err = imports(t, a, []byte(tt.text), tt.id, digestOf(tt.text))
			wantErr(t, err, ErrExport)
			if names, _ := to.List(t.Context(), "volumes/", "", 10); len(names) != 0 {
				t.Errorf("%q were written", names)
			}
		})
	}
	// Anybody can seal to a recipient: only the digest tells whose export it is.
	forged := memfs.New()
	fill(t, clusterKMS(t, "a master secret of somebody else"), forged)
	planted, _ := export(t, admin(t, clusterKMS(t, "a master secret of somebody else"), forged), recipient)
	a, err := OpenNewAdmin(t.Context(), clusterKMS(t, newMaster), memfs.New(), "", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	_, err = imports(t, a, planted, id, digestOf(string(file)))
	wantErr(t, err, ErrDigest)
}

// FuzzTransferred: a record of an export is read to its last byte or refused.
func FuzzTransferred(f *testing.F) {
	good := appendPart(appendPart(appendPart(nil, []byte("deks/")), []byte("a")), []byte("{}"))
	f.Add(append(append(good, 0, 0, 0, 1), appendPart(nil, make([]byte, 32))...))
	f.Add([]byte{0, 0, 0, 5, 'd'})
	f.Fuzz(func(t *testing.T, plain []byte) {
		r, err := parseTransferred(bytes.Clone(plain))
		if err != nil {
			wantErr(t, err, ErrExport)
			return
		}
		defer r.close()
		again := appendPart(appendPart(appendPart(nil, []byte(r.kind.Prefix)), []byte(r.id)), r.body)
		again = append(again, byte(len(r.keys)>>24), byte(len(r.keys)>>16), byte(len(r.keys)>>8), byte(len(r.keys)))
		for _, k := range r.keys {
			_ = k.Use(func(b []byte) error { again = appendPart(again, b); return nil })
		}
		if !bytes.Equal(again, plain) {
			t.Fatalf("%x became %x", plain, again)
		}
	})
}

func digestOf(text string) string { return fmt.Sprintf("%x", sha256.Sum256([]byte(text))) }

// Case 41: two servers may give their KEKs one name. What is imported is under the
// one of this side all the same.
func TestAnImportIsUnderTheKEKOfThisSideAlsoIfItsNameIsTheSame(t *testing.T) {
	from, to := memfs.New(), memfs.New()
	there, here := named{clusterKMS(t, oldMaster)}, named{clusterKMS(t, newMaster)}
	was := fill(t, there, from)
	id, recipient := identity(t)
	file, digest := export(t, admin(t, there, from), recipient)
	a, err := OpenNewAdmin(t.Context(), here, to, "", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	if _, err := imports(t, a, file, id, digest); err != nil {
		t.Fatal(err)
	}
	sameKeys(t, keysOf(t, here, to), was)
}

// named is a KMS whose KEK has the same name everywhere.
type named struct{ k *cluster.KMS }

func (n named) Generate(ctx context.Context, b kms.Binding) (*kms.Secret, kms.Wrapped, error) {
	return kmsbackend.Generate(ctx, b, n.Wrap)
}

func (n named) Wrap(ctx context.Context, b kms.Binding, key *kms.Secret) (kms.Wrapped, error) {
	w, err := n.k.Wrap(ctx, b, key)
	w.KEK = "disks"
	return w, err
}

func (n named) Unwrap(ctx context.Context, b kms.Binding, w kms.Wrapped) (*kms.Secret, error) {
	w.KEK = n.k.KEK()
	return n.k.Unwrap(ctx, b, w)
}

func (named) Current(ctx context.Context) (string, error) { return "disks", ctx.Err() }

// An import that was cut short goes on behind a volume that has lived since.
func TestAnImportGoesOnBehindAVolumeThatWasConfirmedSince(t *testing.T) {
	from, to := memfs.New(), memfs.New()
	fill(t, clusterKMS(t, oldMaster), from)
	id, recipient := identity(t)
	file, digest := export(t, admin(t, clusterKMS(t, oldMaster), from), recipient)
	k := clusterKMS(t, newMaster)
	a, err := OpenNewAdmin(t.Context(), k, to, "", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	if _, err := imports(t, a, file, id, digest); err != nil {
		t.Fatal(err)
	}
	activate(t, openVolumes(t, k, to), "data-0")
	if done, err := imports(t, a, file, id, digest); err != nil || done.Present != 6 {
		t.Errorf("%+v, %v", done, err)
	}
}

// An export that was interrupted does not look whole, nor does a status.
func TestWhatWasInterruptedSaysSo(t *testing.T) {
	s := memfs.New()
	fill(t, clusterKMS(t, oldMaster), s)
	a := admin(t, clusterKMS(t, oldMaster), s)
	_, recipient := identity(t)
	for range 20 {
		ctx, cancel := context.WithCancel(t.Context())
		go cancel()
		if digest, p, err := a.Export(ctx, io.Discard, recipient, nil); err == nil && p.Done != 6 {
			t.Fatalf("%+v, digest %s", p, digest)
		}
		ctx, cancel = context.WithCancel(t.Context())
		go cancel()
		if s, err := a.Status(ctx); err == nil && s.Volumes[volume.Active] != 4 {
			t.Fatalf("%+v", s)
		}
	}
}

// unlisted has records that it does not list.
type unlisted struct{ storage.Storage }

func (unlisted) List(context.Context, string, string, int) ([]string, error) {
	return nil, storage.ErrDenied
}

// Without a list nothing is known of the records: the MAC key stays where they are,
// and no status says that nothing is outdated.
func TestRecordsThatCannotBeListedAreNotTakenForNone(t *testing.T) {
	s := memfs.New()
	fill(t, clusterKMS(t, oldMaster), s)
	both := kms.WithOld(clusterKMS(t, newMaster), clusterKMS(t, oldMaster))
	a := admin(t, both, unlisted{s})
	_, err := a.Rewrap(t.Context(), nil)
	wantErr(t, err, storage.ErrDenied)
	if status, err := a.Status(t.Context()); !errors.Is(err, storage.ErrDenied) {
		t.Errorf("%+v, %v", status, err)
	}
	status, err := admin(t, both, s).Status(t.Context())
	if err != nil || status.MACKey == status.Current || status.Outdated != 7 {
		t.Errorf("the MAC key moved: %+v, %v", status, err)
	}
}
