// Package record keeps authenticated records in storage: whoever can write the
// storage can lose or repeat a record, but not change one, make one, or move one
// to another name.
//
// Each record is one object of one line, the kind's magic and a MAC, and a body
// that belongs to the kind. The MAC covers the object's name. It is made with one
// key, the record MAC key, that lies wrapped in the same storage. The formats are
// specified in docs/spec/volume-record.md.
package record

import (
	"bytes"
	"context"
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
	ErrMACKey = errors.New("record MAC key is not the one that records were made with")
	// ErrNotStored: storage acknowledged a record and does not have it.
	ErrNotStored = errors.New("storage acknowledged a record that it does not hold")
)

// Kind is one sort of record.
type Kind struct {
	Prefix string // of the objects' names, for example "volumes/"
	Magic  string // begins each object, with its version, for example "keyagent volume record 1 "
	Domain string // of the MAC
}

// The kinds.
var (
	Volume = Kind{"volumes/", "keyagent volume record 1 ", "keyagent volume record mac v1"}
	DEK    = Kind{"deks/", "keyagent wrapped dek 1 ", "keyagent wrapped dek mac v1"}
)

// Kinds are all of them.
var Kinds = []Kind{Volume, DEK}

// MaxSize bounds a record in bytes.
const MaxSize = 32 << 10

const (
	macKeyName = "keyservice/record-mac-key"
	idDomain   = "keyagent record mac key id v1"
)

var macBinding = kms.Binding{VolumeID: "keyservice", Purpose: kms.RecordMAC, Version: 1, Length: 32}

// Book reads and writes records. It is safe for concurrent use.
type Book struct {
	storage storage.Storage
	macKey  *secret.Bytes
	made    bool // the MAC key, by this Open
}

// OpenExisting unwraps the MAC key of a storage that has one, else
// [storage.ErrNotFound].
func OpenExisting(ctx context.Context, k kms.KMS, s storage.Storage) (*Book, error) {
	w, _, err := readMACKey(ctx, s)
	if err != nil {
		return nil, fmt.Errorf("record MAC key: %w", err)
	}
	b, err := unwrap(ctx, k, s, w)
	if err != nil {
		return nil, fmt.Errorf("record MAC key: %w", err)
	}
	return b, nil
}

// Open unwraps the MAC key, or makes it if the storage is empty. announce, if not
// nil, is told the ID of a new key before that is stored: who writes it down knows
// the key whenever the storage has it. Another replica may be faster, and then the
// key is another one.
func Open(ctx context.Context, k kms.KMS, s storage.Storage, announce func(id string) error) (*Book, error) {
	var err error
	for range maxConflicts {
		var b *Book
		if b, err = open(ctx, k, s, announce); err == nil {
			return b, nil
		}
		if !errors.Is(err, storage.ErrConflict) {
			break
		}
	}
	return nil, fmt.Errorf("record MAC key: %w", err)
}

func open(ctx context.Context, k kms.KMS, s storage.Storage, announce func(string) error) (*Book, error) {
	w, _, err := readMACKey(ctx, s)
	made := errors.Is(err, storage.ErrNotFound)
	if made {
		if err = create(ctx, k, s, announce); err == nil {
			// Only the stored form counts: a key that does not come back from it
			// must not authenticate anything.
			w, _, err = readMACKey(ctx, s)
		}
	}
	if err != nil {
		return nil, err
	}
	b, err := unwrap(ctx, k, s, w)
	if err != nil {
		return nil, err
	}
	b.made = made
	return b, nil
}

func unwrap(ctx context.Context, k kms.KMS, s storage.Storage, w kms.Wrapped) (*Book, error) {
	key, err := k.Unwrap(ctx, macBinding, w)
	if errors.Is(err, kms.ErrWrongKey) {
		err = fmt.Errorf("%w (hint: these records were made under another KEK)", err)
	}
	if err != nil {
		return nil, err
	}
	return &Book{storage: s, macKey: key}, nil
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
	for _, kind := range Kinds {
		names, err := s.List(ctx, kind.Prefix, "", 1)
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
func (b *Book) Close() error { return b.macKey.Close() }

// Made reports whether this Open made the MAC key.
func (b *Book) Made() bool { return b.made }

// KeyID names the MAC key without revealing it. Who keeps it elsewhere notices a
// storage whose MAC key was exchanged together with all of its records.
func (b *Book) KeyID() (string, error) { return keyID(b.macKey) }

func keyID(key *secret.Bytes) (id string, err error) {
	err = key.Use(func(k []byte) error {
		h := hmac.New(sha256.New, k)
		h.Write([]byte(idDomain))
		id = hex.EncodeToString(h.Sum(nil)[:16])
		return nil
	})
	return id, err
}

// Trust compares the MAC key with the one that is known: the ID that was kept
// elsewhere, or "". Under a KEK with a public half (see [kms.PublicWrapper])
// whoever writes the storage can exchange the MAC key with all records, so there a
// key of which nothing is known is refused, unless this Open made it.
func (b *Book) Trust(k kms.KMS, known string) error {
	id, err := b.KeyID()
	switch {
	case err != nil:
		return err
	case known == "" && kms.Public(k) && !b.made:
		return fmt.Errorf("%w, as far as is known: anybody can wrap under this KEK, and the ID %s was not kept anywhere (hint: compare it with the one of a key service that you trust, and set record_key)", ErrMACKey, id)
	case known != "" && known != id:
		return fmt.Errorf("%w: storage has the one with the ID %s, it was %.32q", ErrMACKey, id, known)
	}
	return nil
}

// MACKey returns the wrapped form of the MAC key that is in storage.
func (b *Book) MACKey(ctx context.Context) (kms.Wrapped, error) {
	w, _, err := readMACKey(ctx, b.storage)
	return w, err
}

// RewrapMACKey wraps the MAC key of this Book again under the KEK that k has in
// force. What storage has must be the same key: it stands under no MAC, and
// wrapping whatever lies there would make an exchanged one ours. It is wrapped
// again even if its name is that of the KEK in force, because the name stands
// under no MAC either.
func (b *Book) RewrapMACKey(ctx context.Context, k kms.KMS) error {
	err := storage.ErrConflict
	for range maxConflicts {
		if err = b.rewrapMACKey(ctx, k); !errors.Is(err, storage.ErrConflict) {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("record MAC key: %w", err)
	}
	return nil
}

func (b *Book) rewrapMACKey(ctx context.Context, k kms.KMS) error {
	w, version, err := readMACKey(ctx, b.storage)
	if err != nil {
		return err
	}
	stored, err := k.Unwrap(ctx, macBinding, w)
	if err != nil {
		return err
	}
	defer stored.Close()
	if !stored.Equal(b.macKey) {
		return fmt.Errorf("%w: it was exchanged since these records were opened", ErrMACKey)
	}
	current, err := kms.Current(ctx, k)
	if err != nil || (w.KEK == current && len(w.Blob) == 0) { // derived from the KEK
		return err
	}
	next, err := WrapAndOpen(ctx, k, macBinding, b.macKey)
	if err != nil {
		return err
	}
	return putMACKey(ctx, b.storage, next, version)
}

// Get returns the body of a record, which the MAC vouches for, and the version
// of its object. The errors are those of storage, and [ErrRefused].
func (b *Book) Get(ctx context.Context, kind Kind, id string) ([]byte, storage.Version, error) {
	data, version, err := b.storage.Get(ctx, kind.Prefix+id)
	if err != nil {
		return nil, "", err
	}
	body, err := b.Decode(kind, id, data)
	return body, version, err
}

// Put writes a record and reads it back, so that what storage acknowledged
// and does not hold is noticed before anybody acts on it: [ErrNotStored].
func (b *Book) Put(ctx context.Context, kind Kind, id string, body []byte, expect storage.Version) error {
	data, err := b.Encode(kind, id, body)
	if err != nil {
		return err
	}
	return put(ctx, b.storage, kind.Prefix+id, data, expect)
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

// List returns, in byte order, at most limit IDs of a kind that come after one.
func (b *Book) List(ctx context.Context, kind Kind, after string, limit int) ([]string, error) {
	if after != "" {
		after = kind.Prefix + after
	}
	names, err := b.storage.List(ctx, kind.Prefix, after, limit)
	for i := range names {
		names[i] = strings.TrimPrefix(names[i], kind.Prefix)
	}
	return names, err
}

// Encode makes the object of a record.
func (b *Book) Encode(kind Kind, id string, body []byte) ([]byte, error) {
	mac, err := b.mac(kind, id, body)
	if err != nil {
		return nil, err
	}
	out := append([]byte(kind.Magic+hex.EncodeToString(mac)+"\n"), body...)
	if len(out) > MaxSize {
		return nil, fmt.Errorf("%w: %d bytes", ErrRefused, len(out))
	}
	return out, nil
}

// Decode authenticates an object and returns its body. Parsing comes after.
func (b *Book) Decode(kind Kind, id string, data []byte) ([]byte, error) {
	if len(data) > MaxSize {
		return nil, fmt.Errorf("%w: %d bytes", ErrRefused, len(data))
	}
	line, body, ok := bytes.Cut(data, []byte("\n"))
	text, isKind := strings.CutPrefix(string(line), kind.Magic)
	got, err := hex.DecodeString(text)
	if !ok || !isKind || err != nil {
		return nil, fmt.Errorf("%w: it does not begin with %q and a MAC", ErrRefused, kind.Magic)
	}
	want, err := b.mac(kind, id, body)
	if err != nil {
		return nil, err
	}
	if !hmac.Equal(got, want) {
		return nil, fmt.Errorf("%w: its MAC does not verify (hint: was the master secret changed, or the storage written by somebody else?)", ErrRefused)
	}
	return body, nil
}

func (b *Book) mac(kind Kind, id string, body []byte) (mac []byte, err error) {
	err = b.macKey.Use(func(k []byte) error {
		h := hmac.New(sha256.New, k)
		for _, part := range [][]byte{[]byte(kind.Domain), []byte(kind.Prefix + id), body} {
			h.Write(binary.BigEndian.AppendUint32(nil, uint32(len(part))))
			h.Write(part)
		}
		mac = h.Sum(nil)
		return nil
	})
	return mac, err
}
