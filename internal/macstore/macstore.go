// Package macstore keeps authenticated records in storage: anyone who can write the
// storage can lose or repeat a record, but not change one, make one, or move one
// to another name.
//
// Each record is one object of one line, the collection's magic and a MAC, and a body
// that belongs to the collection. The MAC covers the object's name. It is created with one
// key, the record MAC key, that lies wrapped in the same storage. The formats are
// specified in docs/spec/volume-record.md.
package macstore

import (
	"bytes"
	"context"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/storage"
)

var (
	// ErrRefused: an object is not a record that was written under this name
	// with this MAC key.
	ErrRefused = errors.New("record is refused")
	// ErrMACKey: the MAC key is gone although there are records, or is another
	// one than it was.
	ErrMACKey = errors.New("record MAC key is not the one that records were created with")
	// ErrNotStored: storage acknowledged a record and does not have it.
	ErrNotStored = errors.New("storage acknowledged a record that it does not hold")
)

// Collection is one sort of record.
type Collection struct {
	Prefix string // of the objects' names, for example "volumes/"
	Magic  string // begins each object, with its version, for example "keyagent volume record 1 "
	Domain string // of the MAC
}

// The kinds.
var (
	Volume = Collection{"volumes/", "keyagent volume record 1 ", "keyagent volume record mac v1"}
	DEK    = Collection{"deks/", "keyagent wrapped dek 1 ", "keyagent wrapped dek mac v1"}
	// Revocation holds no keys.
	Revocation = Collection{"revocations/", "keyagent revocation 1 ", "keyagent revocation mac v1"}
)

// Collections are those that hold keys.
var Collections = []Collection{Volume, DEK}

// MaxSize bounds a record in bytes.
const MaxSize = 32 << 10

const (
	macKeyName = "keyservice/record-mac-key"
	idDomain   = "keyagent record mac key id v1"
)

var macBinding = kms.Binding{VolumeID: "keyservice", Purpose: kms.RecordMAC, Version: 1, Length: 32}

// Store reads and writes records. It is safe for concurrent use.
type Store struct {
	storage storage.Storage
	macKey  *secret.Bytes
	created bool // the MAC key, by this Open
}

// OpenExisting unwraps the MAC key of a storage that has one, else
// [storage.ErrNotFound].
func OpenExisting(ctx context.Context, k kms.KMS, s storage.Storage) (*Store, error) {
	w, _, err := readMACKey(ctx, s)
	if err != nil {
		return nil, fmt.Errorf("record MAC key: %w", err)
	}
	m, err := unwrap(ctx, k, s, w)
	if err != nil {
		return nil, fmt.Errorf("record MAC key: %w", err)
	}
	return m, nil
}

// Open unwraps the MAC key, or makes it if the storage is empty. announce, if not
// nil, is told the ID of a new key before that is stored: who writes it down knows
// the key whenever the storage has it. Another replica may be faster, and then the
// key is another one.
func Open(ctx context.Context, k kms.KMS, s storage.Storage, announce func(id string) error) (*Store, error) {
	var err error
	for range maxConflicts {
		var m *Store
		if m, err = open(ctx, k, s, announce); err == nil {
			return m, nil
		}
		if !errors.Is(err, storage.ErrConflict) {
			break
		}
	}
	return nil, fmt.Errorf("record MAC key: %w", err)
}

func open(ctx context.Context, k kms.KMS, s storage.Storage, announce func(string) error) (*Store, error) {
	w, _, err := readMACKey(ctx, s)
	created := errors.Is(err, storage.ErrNotFound)
	if created {
		if err = create(ctx, k, s, announce); err == nil {
			// Only the stored form counts: a key that does not come back from it
			// must not authenticate anything.
			w, _, err = readMACKey(ctx, s)
		}
	}
	if err != nil {
		return nil, err
	}
	m, err := unwrap(ctx, k, s, w)
	if err != nil {
		return nil, err
	}
	m.created = created
	return m, nil
}

func unwrap(ctx context.Context, k kms.KMS, s storage.Storage, w kms.Wrapped) (*Store, error) {
	key, err := k.Unwrap(ctx, macBinding, w)
	if errors.Is(err, kms.ErrWrongKey) {
		err = fmt.Errorf("%w (hint: these records were created under another KEK)", err)
	}
	if err != nil {
		return nil, err
	}
	return &Store{storage: s, macKey: key}, nil
}

func readMACKey(ctx context.Context, s storage.Storage) (w kms.Wrapped, v storage.Version, err error) {
	data, v, err := s.Get(ctx, macKeyName)
	if err != nil {
		return w, v, err
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	err = d.Decode(&w)
	if _, end := d.Token(); err != nil || !errors.Is(end, io.EOF) {
		return w, v, fmt.Errorf("%w: the wrapped MAC key cannot be read", ErrRefused)
	}
	return w, v, nil
}

// create is for an empty storage only: records without their MAC key mean that
// something was removed.
func create(ctx context.Context, k kms.KMS, s storage.Storage, announce func(string) error) error {
	for _, c := range Collections {
		names, err := s.List(ctx, c.Prefix, "", 1)
		if err != nil {
			return err
		}
		if len(names) > 0 {
			return fmt.Errorf("%w: it is gone, and there are records", ErrMACKey)
		}
	}
	key, w, err := k.Generate(ctx, macBinding)
	if err != nil {
		return err
	}
	defer key.Close()
	if announce != nil {
		id, err := keyID(key)
		if err == nil {
			err = announce(id)
		}
		if err != nil {
			return err
		}
	}
	return putMACKey(ctx, s, w, storage.Absent)
}

func putMACKey(ctx context.Context, s storage.Storage, w kms.Wrapped, expect storage.Version) error {
	data, err := json.Marshal(w)
	if err != nil {
		return err
	}
	return put(ctx, s, macKeyName, data, expect)
}

// Close wipes the MAC key.
func (m *Store) Close() error { return m.macKey.Close() }

// Created reports whether this Open created the MAC key.
func (m *Store) Created() bool { return m.created }

// KeyID names the MAC key without revealing it. Who keeps it elsewhere notices a
// storage whose MAC key was exchanged together with all of its records.
func (m *Store) KeyID() (string, error) { return keyID(m.macKey) }

func keyID(key *secret.Bytes) (id string, err error) {
	var sum [sha256.Size]byte
	err = key.Use(func(k []byte) error {
		secret.Do(func() {
			h := hmac.New(sha256.New, k)
			h.Write([]byte(idDomain))
			h.Sum(sum[:0])
		})
		return nil
	})
	id = hex.EncodeToString(sum[:16])
	return id, err
}

// Derive returns a secret that is the same for all who have these records, by what it is for.
// The caller closes it.
func (m *Store) Derive(domain string, n int) (*secret.Bytes, error) {
	var key []byte
	err := m.macKey.Use(func(k []byte) (err error) {
		secret.Do(func() { key, err = hkdf.Key(sha256.New, k, nil, domain, n) })
		return err
	})
	if err != nil {
		return nil, err
	}
	return secret.From(key)
}

// CheckKey compares the MAC key with the one that is known: the ID that was kept
// elsewhere, or "". Under a KEK with a public half (see [kms.PublicWrapper])
// anyone who writes the storage can exchange the MAC key with all records, so there a
// key of which nothing is known is refused, unless this Open created it.
func (m *Store) CheckKey(k kms.KMS, known string) error {
	id, err := m.KeyID()
	switch {
	case err != nil:
		return err
	case known == "" && kms.Public(k) && !m.created:
		return fmt.Errorf("%w, as far as is known: anybody can wrap under this KEK, and the ID %s was not kept anywhere (hint: compare it with the one of a key service that you trust, and set record_key)", ErrMACKey, id)
	case known != "" && known != id:
		return fmt.Errorf("%w: storage has the one with the ID %s, it was %.32q", ErrMACKey, id, known)
	}
	return nil
}

// MACKey returns the wrapped form of the MAC key that is in storage.
func (m *Store) MACKey(ctx context.Context) (kms.Wrapped, error) {
	w, _, err := readMACKey(ctx, m.storage)
	return w, err
}

// RewrapMACKey wraps the MAC key of this Store again under the KEK that k has in
// force. What storage has must be the same key: it stands under no MAC, and
// wrapping whatever lies there would make an exchanged one ours. It is wrapped
// again even if its name is that of the KEK in force, because the name stands
// under no MAC either.
func (m *Store) RewrapMACKey(ctx context.Context, k kms.KMS) error {
	err := storage.ErrConflict
	for range maxConflicts {
		if err = m.rewrapMACKey(ctx, k); !errors.Is(err, storage.ErrConflict) {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("record MAC key: %w", err)
	}
	return nil
}

func (m *Store) rewrapMACKey(ctx context.Context, k kms.KMS) error {
	w, version, err := readMACKey(ctx, m.storage)
	if err != nil {
		return err
	}
	stored, err := k.Unwrap(ctx, macBinding, w)
	if err != nil {
		return err
	}
	defer stored.Close()
	if !stored.Equal(m.macKey) {
		return fmt.Errorf("%w: it was exchanged since these records were opened", ErrMACKey)
	}
	current, err := kms.Current(ctx, k)
	if err != nil || (w.KEK == current && len(w.Blob) == 0) { // derived from the KEK
		return err
	}
	next, err := WrapAndOpen(ctx, k, macBinding, m.macKey)
	if err != nil {
		return err
	}
	return putMACKey(ctx, m.storage, next, version)
}

// Get returns the body of a record, which the MAC vouches for, and the version
// of its object. The errors are those of storage, and [ErrRefused].
func (m *Store) Get(ctx context.Context, c Collection, id string) ([]byte, storage.Version, error) {
	data, version, err := m.storage.Get(ctx, c.Prefix+id)
	if err != nil {
		return nil, "", err
	}
	body, err := m.Decode(c, id, data)
	return body, version, err
}

// Put writes a record and reads it back, so that what storage acknowledged
// and does not hold is noticed before anybody acts on it: [ErrNotStored].
func (m *Store) Put(ctx context.Context, c Collection, id string, body []byte, expect storage.Version) error {
	data, err := m.Encode(c, id, body)
	if err != nil {
		return err
	}
	return put(ctx, m.storage, c.Prefix+id, data, expect)
}

func put(ctx context.Context, s storage.Storage, name string, data []byte, expect storage.Version) error {
	version, err := s.Put(ctx, name, data, expect)
	if err != nil {
		return err
	}
	got, have, err := s.Get(ctx, name)
	switch {
	case errors.Is(err, storage.ErrNotFound):
		return fmt.Errorf("%w: %s is absent", ErrNotStored, name)
	case err != nil:
		return fmt.Errorf("read back: %w", err)
	case have != version:
		// Either nothing was stored, or somebody changed it in the meantime.
		return fmt.Errorf("%w: %s is in another version", storage.ErrConflict, name)
	case !bytes.Equal(got, data):
		return fmt.Errorf("%w: %s has another content", ErrNotStored, name)
	}
	return nil
}

// List returns, in byte order, at most limit IDs of a collection that come after one.
func (m *Store) List(ctx context.Context, c Collection, after string, limit int) ([]string, error) {
	if after != "" {
		after = c.Prefix + after
	}
	names, err := m.storage.List(ctx, c.Prefix, after, limit)
	for i := range names {
		names[i] = strings.TrimPrefix(names[i], c.Prefix)
	}
	return names, err
}

// Purge destroys what storage keeps of a record's earlier states, see [storage.Purger].
func (m *Store) Purge(ctx context.Context, c Collection, id string) (int, error) {
	return storage.Purge(ctx, m.storage, c.Prefix+id)
}

// Encode makes the object of a record.
func (m *Store) Encode(c Collection, id string, body []byte) ([]byte, error) {
	mac, err := m.mac(c, id, body)
	if err != nil {
		return nil, err
	}
	out := append([]byte(c.Magic+hex.EncodeToString(mac)+"\n"), body...)
	if len(out) > MaxSize {
		return nil, fmt.Errorf("%w: %d bytes", ErrRefused, len(out))
	}
	return out, nil
}

// Decode authenticates an object and returns its body. Parsing comes after.
func (m *Store) Decode(c Collection, id string, data []byte) ([]byte, error) {
	if len(data) > MaxSize {
		return nil, fmt.Errorf("%w: %d bytes", ErrRefused, len(data))
	}
	line, body, ok := bytes.Cut(data, []byte("\n"))
	text, belongs := strings.CutPrefix(string(line), c.Magic)
	got, err := hex.DecodeString(text)
	if !ok || !belongs || err != nil {
		return nil, fmt.Errorf("%w: it does not begin with %q and a MAC", ErrRefused, c.Magic)
	}
	want, err := m.mac(c, id, body)
	if err != nil {
		return nil, err
	}
	if !hmac.Equal(got, want) {
		return nil, fmt.Errorf("%w: its MAC does not verify (hint: was the master secret changed, or the storage written by somebody else?)", ErrRefused)
	}
	return body, nil
}

func (m *Store) mac(c Collection, id string, body []byte) (mac []byte, err error) {
	// Its own allocations are made before: what is allocated inside waits, erased, for
	// the next garbage collection.
	mac = make([]byte, sha256.Size)
	var message []byte
	for _, part := range [][]byte{[]byte(c.Domain), []byte(c.Prefix + id), body} {
		message = append(binary.BigEndian.AppendUint32(message, uint32(len(part))), part...)
	}
	err = m.macKey.Use(func(k []byte) error {
		secret.Do(func() {
			h := hmac.New(sha256.New, k) // the key's pads are as good as the key
			h.Write(message)
			h.Sum(mac[:0])
		})
		return nil
	})
	return mac, err
}
