// Package checkpoint is what a key service says of its audit log at one moment: how many
// entries it has, and the root of the Merkle tree over them. Who keeps a checkpoint notices
// later that the log lost entries, or has other ones.
//
// A checkpoint travels as a signed note (https://c2sp.org/tlog-checkpoint), and its proofs are
// those of RFC 6962. The format is specified in docs/spec/audit.md.
package checkpoint

import (
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/keyagent/keyagent/internal/secret"
)

var (
	// ErrFormat: what came is no checkpoint.
	ErrFormat = errors.New("not a checkpoint of a key service's audit log")
	// ErrSignature: it is not signed by the key that it should be.
	ErrSignature = errors.New("the checkpoint is not signed by the log's key")
	// ErrBack: a log shows less than it had, or something else in the same place.
	ErrBack = errors.New("the audit log went back, or was forked")
)

// ID names one audit log. It covers the key that signs the log's checkpoints, and the log's
// first entry.
type ID [16]byte

// Origin begins the text of a checkpoint.
func (i ID) Origin() string { return originPrefix + hex.EncodeToString(i[:]) }

func (i ID) String() string { return hex.EncodeToString(i[:]) }

const (
	originPrefix = "keyagent-audit-"
	idDomain     = "keyagent audit log id v1"
)

// LogID names the log whose checkpoints a key signs, and whose first entry has a hash.
func LogID(key ed25519.PublicKey, first [sha256.Size]byte) ID {
	h := sha256.New()
	h.Write([]byte(idDomain))
	h.Write(key)
	h.Write(first[:])
	return ID(h.Sum(nil)[:16])
}

// Checkpoint is a log at one moment.
type Checkpoint struct {
	Log  ID
	Size int64 // entries, at least 1
	Root tlog.Hash
}

func (c Checkpoint) String() string {
	return fmt.Sprintf("%d entries with the root %s of log %s", c.Size, c.Root, c.Log)
}

// text is what is signed.
func (c Checkpoint) text() string {
	return fmt.Sprintf("%s\n%d\n%s\n", c.Log.Origin(), c.Size, c.Root)
}

// parseText is the inverse of text.
func parseText(text string) (c Checkpoint, err error) {
	lines := strings.Split(text, "\n")
	if len(lines) != 4 || lines[3] != "" {
		return c, fmt.Errorf("%w: %d lines", ErrFormat, len(lines)-1)
	}
	id, ours := strings.CutPrefix(lines[0], originPrefix)
	log, err := hex.DecodeString(id)
	if !ours || err != nil || len(log) != len(c.Log) {
		return c, fmt.Errorf("%w: origin %.60q", ErrFormat, lines[0])
	}
	copy(c.Log[:], log)
	if c.Size, err = strconv.ParseInt(lines[1], 10, 64); err != nil || c.Size < 1 {
		return c, fmt.Errorf("%w: size %.20q", ErrFormat, lines[1])
	}
	root, err := base64.StdEncoding.Strict().DecodeString(lines[2])
	if err != nil || len(root) != len(c.Root) {
		return c, fmt.Errorf("%w: root %.60q", ErrFormat, lines[2])
	}
	copy(c.Root[:], root)
	if c.text() != text {
		return c, fmt.Errorf("%w: it is not written as it should be", ErrFormat)
	}
	return c, nil
}

// Signed is a checkpoint that the log's key has signed: [Signer], [Parse] and [Restore] make no
// other.
type Signed struct {
	Checkpoint
	Signature []byte // 64 bytes, Ed25519 over the text
	Note      []byte // all of it, with this signature alone
}

// MaxNote bounds a note in bytes.
const MaxNote = 512

// Parse reads a note, and verifies the signature by key. Signatures of others are passed over.
func Parse(key ed25519.PublicKey, data []byte) (*Signed, error) {
	if len(data) > MaxNote {
		return nil, fmt.Errorf("%w: %d bytes", ErrFormat, len(data))
	}
	origin, _, _ := strings.Cut(string(data), "\n")
	v, err := verifier(origin, key)
	if err != nil {
		return nil, err
	}
	n, err := note.Open(data, note.VerifierList(v))
	var unverified *note.UnverifiedNoteError
	var invalid *note.InvalidSignatureError
	switch {
	case errors.As(err, &unverified), errors.As(err, &invalid):
		return nil, ErrSignature
	case err != nil:
		return nil, fmt.Errorf("%w: %w", ErrFormat, err)
	}
	c, err := parseText(n.Text)
	if err != nil {
		return nil, err
	}
	raw, err := base64.StdEncoding.DecodeString(n.Sigs[0].Base64)
	if err != nil || len(raw) != 4+ed25519.SignatureSize {
		return nil, fmt.Errorf("%w: a signature of %d bytes", ErrFormat, len(raw))
	}
	return &Signed{c, raw[4:], write(c, v, raw[4:])}, nil
}

// write makes a note.
func write(c Checkpoint, v note.Verifier, signature []byte) []byte {
	raw := append(binary.BigEndian.AppendUint32(nil, v.KeyHash()), signature...)
	return fmt.Appendf(nil, "%s\n— %s %s\n", c.text(), v.Name(), base64.StdEncoding.EncodeToString(raw))
}

// Restore makes the note of a checkpoint and its signature again, and verifies it.
func Restore(key ed25519.PublicKey, c Checkpoint, signature []byte) (*Signed, error) {
	v, err := verifier(c.Log.Origin(), key)
	if err != nil {
		return nil, err
	}
	return Parse(key, write(c, v, signature))
}

// VerifierKey is the public key of a log as tools that read signed notes want it.
func VerifierKey(id ID, key ed25519.PublicKey) (string, error) {
	return note.NewEd25519VerifierKey(id.Origin(), key)
}

func verifier(origin string, key ed25519.PublicKey) (note.Verifier, error) {
	text, err := note.NewEd25519VerifierKey(origin, key)
	if err != nil {
		return nil, fmt.Errorf("%w: a key of %d bytes", ErrFormat, len(key))
	}
	v, err := note.NewVerifier(text)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrFormat, err)
	}
	return v, nil
}

// ParseVerifierKey is the inverse of [VerifierKey].
func ParseVerifierKey(text string) (ID, ed25519.PublicKey, error) {
	var id ID
	text = strings.TrimSpace(text)
	if _, err := note.NewVerifier(text); err != nil {
		return id, nil, fmt.Errorf("%w: %w", ErrFormat, err)
	}
	// NAME+HASH+BASE64 of one byte, the algorithm, and the key
	name, rest, _ := strings.Cut(text, "+")
	_, encoded, _ := strings.Cut(rest, "+")
	raw, err := base64.StdEncoding.DecodeString(encoded)
	log, errName := hex.DecodeString(strings.TrimPrefix(name, originPrefix))
	if err != nil || errName != nil || len(raw) != 1+ed25519.PublicKeySize || len(log) != len(id) || !strings.HasPrefix(name, originPrefix) {
		return id, nil, fmt.Errorf("%w: verifier key of %.60q", ErrFormat, name)
	}
	return ID(log), raw[1:], nil
}

// Signer signs the checkpoints of one log.
type Signer struct {
	log      ID
	key      ed25519.PublicKey
	seed     *secret.Bytes
	verifier note.Verifier
}

// NewSigner returns one for the log whose first entry has a hash. The seed is 32 bytes, and
// stays the caller's.
func NewSigner(seed *secret.Bytes, first [sha256.Size]byte) (*Signer, error) {
	s := &Signer{seed: seed, key: make(ed25519.PublicKey, ed25519.PublicKeySize)}
	err := s.use(func(k ed25519.PrivateKey) { copy(s.key, k[ed25519.SeedSize:]) })
	if err != nil {
		return nil, err
	}
	s.log = LogID(s.key, first)
	s.verifier, err = verifier(s.log.Origin(), s.key)
	return s, err
}

func (s *Signer) use(f func(ed25519.PrivateKey)) error {
	return s.seed.Use(func(seed []byte) error {
		if len(seed) != ed25519.SeedSize {
			return fmt.Errorf("a seed of %d bytes", len(seed))
		}
		secret.Do(func() { f(ed25519.NewKeyFromSeed(seed)) })
		return nil
	})
}

// Log names the log.
func (s *Signer) Log() ID { return s.log }

// Public is the key that verifies what is signed.
func (s *Signer) Public() ed25519.PublicKey { return s.key }

// Sign makes the checkpoint of the log at a size.
func (s *Signer) Sign(size int64, root tlog.Hash) (*Signed, error) {
	c := Checkpoint{s.log, size, root}
	sig, text := make([]byte, ed25519.SignatureSize), []byte(c.text())
	if err := s.use(func(k ed25519.PrivateKey) { copy(sig, ed25519.Sign(k, text)) }); err != nil {
		return nil, err
	}
	return &Signed{c, sig, write(c, s.verifier, sig)}, nil
}

// maxProof bounds a proof: a tree of 2^63 entries needs no more.
const maxProof = 2 * 63

// Follows proves that a log continues what it was at an earlier moment: [ErrBack] if it does
// not. proof is that of RFC 6962, section 2.1.2.
func (c Checkpoint) Follows(old Checkpoint, proof [][]byte) error {
	back := func(why string) error {
		return fmt.Errorf("%w: it had %s, and shows %s: %s", ErrBack, old, c, why)
	}
	switch {
	case c.Log != old.Log:
		return back("they are two logs")
	case c.Size < old.Size:
		return back("entries are missing")
	case c.Size == old.Size && c.Root != old.Root:
		return back("entries were exchanged")
	case c.Size == old.Size:
		return nil
	case len(proof) > maxProof:
		return back(fmt.Sprintf("a proof of %d hashes", len(proof)))
	}
	hashes := make(tlog.TreeProof, len(proof))
	for i, h := range proof {
		if len(h) != len(hashes[i]) {
			return back(fmt.Sprintf("a hash of %d bytes in the proof", len(h)))
		}
		copy(hashes[i][:], h)
	}
	if err := tlog.CheckTree(hashes, c.Size, c.Root, old.Size, old.Root); err != nil {
		return back("the proof does not hold: " + err.Error())
	}
	return nil
}
