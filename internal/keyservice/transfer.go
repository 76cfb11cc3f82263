package keyservice

import (
	"bufio"
	"bytes"
	"context"
	"crypto/hpke"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"strings"
	"sync"

	"github.com/keyagent/keyagent/internal/macstore"
	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/internal/volume"
	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/storage"
)

// An export is text: a line of magic, a line with the encapsulated key, and a
// line for each record, sealed one after the other in one HPKE context, so that
// none can be left out, repeated or moved. The last one says how many there were.
// docs/spec/export.md specifies it.
const (
	exportMagic = "keyagent export 1"
	exportInfo  = "keyagent export v1"
	aadRecord   = "record"
	aadEnd      = "end"
	// maxExportLine bounds a line in bytes: a record with its keys, in base64.
	maxExportLine = 128 << 10
)

var (
	// ErrExport: a file is not an export for this identity, or was cut or
	// changed.
	ErrExport = errors.New("export is refused")
	// ErrRecipient: what should say whom to export to does not.
	ErrRecipient = errors.New("recipient cannot be read")
	// ErrDigest: a file is not the export that was meant.
	ErrDigest = errors.New("export has another digest")
	// ErrExists: a volume that is to be imported exists, and differs.
	ErrExists = errors.New("record exists and differs")
)

// NewTransferIdentity makes a key pair for one transfer. The private half stays
// where records are imported.
func NewTransferIdentity() (identity *secret.Bytes, recipient []byte, err error) {
	secret.Do(func() {
		var k hpke.PrivateKey
		if k, err = hpke.MLKEM768X25519().GenerateKey(); err != nil {
			return
		}
		var raw []byte
		if raw, err = k.Bytes(); err != nil {
			return
		}
		if identity, err = secret.From(raw); err == nil {
			recipient = k.PublicKey().Bytes()
		}
	})
	return identity, recipient, err
}

// RecipientDigest names a recipient, by its SHA-256: anyone who exchanges it on its way
// gets every key.
func RecipientDigest(recipient []byte) string {
	sum := sha256.Sum256(recipient)
	return hex.EncodeToString(sum[:])
}

// Export writes every record with its keys, sealed to recipient. It returns the
// SHA-256 of what it wrote: anybody can seal to a recipient, so it is by this
// digest that an import knows the export. An error beside a digest names objects that
// were left out because they are no records: the rest is whole.
func (a *Admin) Export(ctx context.Context, w io.Writer, recipient []byte, report func(macstore.Progress)) (digest string, p macstore.Progress, err error) {
	key, err := hpke.MLKEM768X25519().NewPublicKey(recipient)
	if err != nil {
		return "", p, forOperator(fmt.Errorf("%w: %w", ErrRecipient, err))
	}
	enc, sender, err := hpke.NewSender(key, hpke.HKDFSHA256(), hpke.AES256GCM(), []byte(exportInfo))
	if err != nil {
		return "", p, err
	}
	e := &exporter{sender: sender, sum: sha256.New()}
	e.w = io.MultiWriter(w, e.sum)
	if _, err := fmt.Fprintf(e.w, "%s\n%s\n", exportMagic, base64.StdEncoding.EncodeToString(enc)); err != nil {
		return "", p, err
	}
	var refused error
	for _, kind := range macstore.Collections {
		before := p
		visit := visits(a.now)[kind]
		q, err := a.records.Walk(ctx, kind, func(id string, body []byte, _ func(kms.Binding, kms.Wrapped) (kms.Wrapped, error)) ([]byte, error) {
			return body, a.exportRecord(ctx, e, kind, visit, id, body)
		}, nil, func(q macstore.Progress) {
			if report != nil {
				report(before.Plus(q))
			}
		})
		p = p.Plus(q)
		if errors.Is(err, macstore.ErrIncomplete) {
			return "", p, forOperator(err)
		}
		// What is no record of ours, or none any more, holds nothing up.
		refused = errors.Join(refused, err)
	}
	if err := e.seal(aadEnd, binary.BigEndian.AppendUint64(nil, e.records)); err != nil {
		return "", p, err
	}
	return hex.EncodeToString(e.sum.Sum(nil)), p, forOperator(refused)
}

// exporter writes lines in turn, for records that are read at the same time.
type exporter struct {
	mu     sync.Mutex
	w      io.Writer
	sum    hash.Hash
	sender *hpke.Sender
	// records were sealed; one that was deleted meanwhile was not.
	records uint64
}

func (e *exporter) seal(aad string, plain []byte) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	var sealed []byte
	var err error
	secret.Do(func() { sealed, err = e.sender.Seal([]byte(aad), plain) })
	if err == nil {
		_, err = fmt.Fprintln(e.w, base64.StdEncoding.EncodeToString(sealed))
	}
	if err == nil && aad == aadRecord {
		e.records++
	}
	return err
}

func (a *Admin) exportRecord(ctx context.Context, e *exporter, kind macstore.Collection, visit macstore.Visit, id string, body []byte) error {
	var keys []*secret.Bytes
	defer func() {
		for _, k := range keys {
			k.Close()
		}
	}()
	size := 64 + len(kind.Prefix) + len(id) + len(body)
	_, err := visit(id, body, func(b kms.Binding, w kms.Wrapped) (kms.Wrapped, error) {
		key, err := a.kms.Unwrap(ctx, b, w)
		if err == nil {
			keys = append(keys, key)
			size += 8 + key.Len()
		}
		return w, err
	})
	if err != nil {
		return err
	}
	plain := make([]byte, 0, size) // never grows: it is wiped as a whole
	defer func() { secret.Wipe(plain[:cap(plain)]) }()
	for _, part := range [][]byte{[]byte(kind.Prefix), []byte(id), body} {
		plain = appendPart(plain, part)
	}
	plain = binary.BigEndian.AppendUint32(plain, uint32(len(keys)))
	for _, k := range keys {
		if err := k.Use(func(b []byte) error { plain = appendPart(plain, b); return nil }); err != nil {
			return err
		}
	}
	return e.seal(aadRecord, plain)
}

func appendPart(to, part []byte) []byte {
	return append(binary.BigEndian.AppendUint32(to, uint32(len(part))), part...)
}

// Imported is what an import did.
type Imported struct {
	Created int `json:"created"`
	Present int `json:"present"` // were there already, with the same keys
}

// Export is an export that was verified: a copy that nobody else can write, which
// an import acts on.
type Export struct {
	file     *os.File
	identity *secret.Bytes
}

// OpenExport copies an export that was sealed to identity, and verifies all of it:
// that it has the digest that its exporter was told, and that every line opens. It
// borrows identity until Close.
func OpenExport(r io.Reader, identity *secret.Bytes, digest string) (*Export, error) {
	file, err := os.CreateTemp("", "keyagent-import-*")
	if err != nil {
		return nil, err
	}
	e := &Export{file, identity}
	// Without a name from now on. What is in it is sealed.
	err = os.Remove(file.Name())
	if err == nil {
		err = e.take(r, digest)
	}
	if err == nil {
		err = e.each(func(*transferred) error { return nil })
	}
	if err != nil {
		return nil, forOperator(errors.Join(err, file.Close()))
	}
	return e, nil
}

// Close gives the copy back.
func (e *Export) Close() error { return e.file.Close() }

func (e *Export) take(r io.Reader, digest string) error {
	sum := sha256.New()
	if _, err := io.Copy(io.MultiWriter(e.file, sum), r); err != nil {
		return err
	}
	if subtle.ConstantTimeCompare([]byte(hex.EncodeToString(sum.Sum(nil))), []byte(strings.ToLower(digest))) != 1 {
		return fmt.Errorf("%w: it is %x", ErrDigest, sum.Sum(nil))
	}
	return nil
}

func (e *Export) each(act func(*transferred) error) error {
	if _, err := e.file.Seek(0, io.SeekStart); err != nil {
		return err
	}
	return readExport(e.file, e.identity, act)
}

// Import makes the records of an export here, their keys wrapped under the KEK of
// this side. A record that is here already with the same keys is left alone, so
// that an import may be ended at any point and run again; one that differs ends it.
func (a *Admin) Import(ctx context.Context, e *Export) (done Imported, err error) {
	err = e.each(func(t *transferred) error { return a.importRecord(ctx, t, &done) })
	return done, forOperator(err)
}

// transferred is one record of an export.
type transferred struct {
	kind macstore.Collection
	id   string
	body []byte
	keys []*secret.Bytes
}

func (t *transferred) close() {
	for _, k := range t.keys {
		k.Close()
	}
}

// readExport hands each record to act.
func readExport(r io.Reader, identity *secret.Bytes, act func(*transferred) error) error {
	lines := bufio.NewScanner(r)
	lines.Buffer(make([]byte, 0, 64<<10), maxExportLine)
	next := func() ([]byte, error) {
		if !lines.Scan() {
			if err := lines.Err(); err != nil {
				return nil, fmt.Errorf("%w: %w", ErrExport, err)
			}
			return nil, fmt.Errorf("%w: it breaks off", ErrExport)
		}
		raw, err := base64.StdEncoding.Strict().AppendDecode(nil, lines.Bytes())
		if err != nil {
			return nil, fmt.Errorf("%w: not base64", ErrExport)
		}
		return raw, nil
	}
	if !lines.Scan() || lines.Text() != exportMagic {
		return fmt.Errorf("%w: it does not begin with %q", ErrExport, exportMagic)
	}
	enc, err := next()
	if err != nil {
		return err
	}
	recipient, err := openTransfer(enc, identity)
	if err != nil {
		return err
	}
	for n := uint64(0); ; n++ {
		sealed, err := next()
		if err != nil {
			return err
		}
		end, err := oneLine(recipient, sealed, n, act)
		if err != nil {
			return err
		}
		if end {
			break
		}
	}
	if lines.Scan() || lines.Err() != nil {
		return fmt.Errorf("%w: something stands behind its end", ErrExport)
	}
	return nil
}

func openTransfer(enc []byte, identity *secret.Bytes) (out *hpke.Recipient, err error) {
	err = identity.Use(func(raw []byte) error {
		secret.Do(func() {
			var key hpke.PrivateKey
			if key, err = hpke.MLKEM768X25519().NewPrivateKey(raw); err == nil {
				out, err = hpke.NewRecipient(enc, key, hpke.HKDFSHA256(), hpke.AES256GCM(), []byte(exportInfo))
			}
		})
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrExport, err)
	}
	return out, nil
}

// oneLine opens a line. It is a record, or else the end, which counts them.
func oneLine(recipient *hpke.Recipient, sealed []byte, n uint64, act func(*transferred) error) (end bool, err error) {
	var plain []byte
	secret.Do(func() { plain, err = recipient.Open([]byte(aadRecord), sealed) })
	defer func() { secret.Wipe(plain) }()
	if err == nil {
		t, err := parseTransferred(plain)
		if err != nil {
			return false, err
		}
		defer t.close()
		return false, act(t)
	}
	plain, err = recipient.Open([]byte(aadEnd), sealed)
	if err != nil {
		return false, fmt.Errorf("%w: a line does not open (hint: is it for another identity?)", ErrExport)
	}
	if len(plain) != 8 || binary.BigEndian.Uint64(plain) != n {
		return false, fmt.Errorf("%w: it has %d records, its end says otherwise", ErrExport, n)
	}
	return true, nil
}

func parseTransferred(plain []byte) (*transferred, error) {
	bad := fmt.Errorf("%w: a record cannot be read", ErrExport)
	part := func() []byte {
		if len(plain) < 4 {
			return nil
		}
		n := binary.BigEndian.Uint32(plain)
		if uint64(n) > uint64(len(plain)-4) {
			return nil
		}
		p := plain[4 : 4+n]
		plain = plain[4+n:]
		return p
	}
	t := &transferred{}
	prefix, id, body := part(), part(), part()
	for _, kind := range macstore.Collections {
		if kind.Prefix == string(prefix) {
			t.kind = kind
		}
	}
	if t.kind.Prefix == "" || id == nil || body == nil || len(plain) < 4 {
		return nil, bad
	}
	t.id, t.body = string(id), bytes.Clone(body)
	count := binary.BigEndian.Uint32(plain)
	plain = plain[4:]
	for range min(count, 1024) {
		raw := part()
		if len(raw) < kms.MinLength || len(raw) > kms.MaxLength {
			t.close()
			return nil, bad
		}
		key, err := secret.From(bytes.Clone(raw))
		if err != nil {
			t.close()
			return nil, err
		}
		t.keys = append(t.keys, key)
	}
	if len(plain) != 0 || int(count) != len(t.keys) {
		t.close()
		return nil, bad
	}
	return t, nil
}

func (a *Admin) importRecord(ctx context.Context, t *transferred, done *Imported) error {
	i := 0
	body, err := visits(a.now)[t.kind](t.id, t.body, func(b kms.Binding, _ kms.Wrapped) (kms.Wrapped, error) {
		if i == len(t.keys) {
			return kms.Wrapped{}, fmt.Errorf("%w: a key is missing", ErrExport)
		}
		i++
		return macstore.WrapAndOpen(ctx, a.kms, b, t.keys[i-1])
	})
	if err == nil && i != len(t.keys) {
		err = fmt.Errorf("%w: there are more keys than the record has", ErrExport)
	}
	if err == nil {
		err = a.records.Put(ctx, t.kind, t.id, body, storage.Absent)
	}
	switch {
	case err == nil:
		done.Created++
		return nil
	case errors.Is(err, storage.ErrConflict):
		if err = a.same(ctx, t); err == nil {
			done.Present++
			return nil
		}
	}
	return fmt.Errorf("%s%s: %w", t.kind.Prefix, t.id, err)
}

// keyChangedSince reports whether a record that is here is what was imported, and a node has
// changed its key since, or is about to.
func keyChangedSince(t *transferred, body []byte) (bool, error) {
	here, err := volume.Parse(t.id, body)
	if err != nil {
		return false, err
	}
	there, err := volume.Parse(t.id, t.body)
	if err != nil {
		return false, err
	}
	return here.LUKSUUID == there.LUKSUUID && here.Generation == there.Generation && here.Owner == there.Owner &&
		here.State.HoldsData() && here.LastVersion > max(there.LastVersion, there.KeyVersion), nil
}

// same demands that a record that is here has the keys of t, and is otherwise
// what t was, later changes of its life aside.
func (a *Admin) same(ctx context.Context, t *transferred) error {
	body, _, err := a.records.Get(ctx, t.kind, t.id)
	if err != nil {
		return err
	}
	if t.kind == macstore.Volume {
		if changed, err := keyChangedSince(t, body); err != nil || changed {
			return err
		}
	}
	i := 0
	_, err = visits(a.now)[t.kind](t.id, body, func(b kms.Binding, w kms.Wrapped) (kms.Wrapped, error) {
		i++
		if i > len(t.keys) {
			return w, ErrExists
		}
		key, err := a.kms.Unwrap(ctx, b, w)
		if err != nil {
			return w, err
		}
		defer key.Close()
		if !key.Equal(t.keys[i-1]) {
			return w, ErrExists
		}
		return w, nil
	})
	if err == nil && i != len(t.keys) {
		err = ErrExists
	}
	if err != nil || t.kind != macstore.Volume {
		return err
	}
	here, err := volume.Parse(t.id, body)
	if err != nil {
		return err
	}
	there, err := volume.Parse(t.id, t.body)
	if err != nil {
		return err
	}
	// It may have gone on living since an earlier import was cut short.
	if here.LUKSUUID != there.LUKSUUID || here.Generation != there.Generation || here.Owner != there.Owner || here.KeyVersion != there.KeyVersion ||
		here.State.Before(there.State) || (there.HeaderMAC != "" && here.HeaderMAC != there.HeaderMAC) {
		return ErrExists
	}
	return nil
}
