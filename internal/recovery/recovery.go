// Package recovery is how a person gets the key of one volume when nothing else opens it: a
// request names the volume, the reason, a window of time and who receives the key; as many
// operators as the key service's configuration says approve it, each by a signature of their SSH key
// over exactly that. docs/spec/recovery.md specifies the formats.
package recovery

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/hiddeco/sshsig"
	"golang.org/x/crypto/ssh"

	"github.com/keyagent/keyagent/attestation/policy"
	"github.com/keyagent/keyagent/internal/shares"
)

// Namespace is what operators sign in: ssh-keygen -Y sign -n keyagent-recovery.
const Namespace = "keyagent-recovery"

// The bounds of a request, and of signatures in bytes.
const (
	MaxRequest   = 8 << 10
	MaxSignature = 16 << 10
	MaxWindow    = 24 * time.Hour
	maxReason    = 1024
	maxOperators = 64
)

var (
	// ErrRequest means that a request is none, or asks for what is never given.
	ErrRequest = errors.New("not a request for a volume's key")
	// ErrOperators means that who may approve is not configured correctly.
	ErrOperators = errors.New("operators of recovery")
	// ErrTooFew means that there are fewer approvals than are needed.
	ErrTooFew = errors.New("not enough approvals")
	// ErrApproval means that a signature does not approve the request: it is of nobody who may, of
	// something else, or damaged.
	ErrApproval = errors.New("not an approval of this request")
	// ErrWindow means that the request's time has not come, or is over.
	ErrWindow = errors.New("outside the request's time")
)

const version = 1

// Request is what is asked for. Its bytes, as Encode gives them, are what is signed.
type Request struct {
	Version    int       `json:"version"`
	Service    string    `json:"service"` // ID of the record MAC key: the key service that it is for
	Volume     string    `json:"volume"`
	Generation uint64    `json:"generation"`
	KeyVersion uint32    `json:"key_version"`
	Reason     string    `json:"reason"`
	Recipient  string    `json:"recipient"` // of age, or an SSH public key without a comment: who can read the answer
	From       time.Time `json:"from"`
	Until      time.Time `json:"until"`
	Nonce      string    `json:"nonce"` // a request is answered once
}

// New completes a request with version and nonce. Errors wrap [ErrRequest].
func New(r Request) (Request, error) {
	r.Version, r.Nonce = version, rand.Text()
	r.From, r.Until = r.From.UTC().Truncate(time.Second), r.Until.UTC().Truncate(time.Second)
	return r, r.validate()
}

func (r Request) validate() error {
	var err error
	switch window := r.Until.Sub(r.From); {
	case r.Version != version:
		err = fmt.Errorf("version %d is not known here", r.Version)
	case !policy.ValidVolume(r.Volume):
		err = errors.New("no volume ID")
	case len(r.Service) == 0 || len(r.Service) > 64 || len(r.Nonce) < 16 || len(r.Nonce) > 64 || !isPlain(r.Service+r.Nonce):
		err = errors.New("service or nonce")
	case strings.TrimSpace(r.Reason) == "" || len(r.Reason) > maxReason || !isPlain(r.Reason):
		err = fmt.Errorf("a reason is wanted, of at most %d bytes on one line", maxReason)
	case window <= 0 || window > MaxWindow:
		err = fmt.Errorf("its time is %s, and at most %s", window, MaxWindow)
	default:
		_, err = shares.ParsePlainRecipient(r.Recipient)
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrRequest, err)
	}
	return nil
}

func isPlain(s string) bool {
	return utf8.ValidString(s) && !strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsGraphic(r) })
}

// Encode gives the bytes that are signed.
func (r Request) Encode() ([]byte, error) {
	data, err := json.MarshalIndent(r, "", "  ")
	return append(data, '\n'), err
}

// Parse reads a request strictly: its bytes are what encoding it gives. [ErrRequest].
func Parse(data []byte) (Request, error) {
	var r Request
	if len(data) > MaxRequest {
		return r, fmt.Errorf("%w: more than %d bytes", ErrRequest, MaxRequest)
	}
	if err := json.Unmarshal(data, &r); err != nil {
		return Request{}, fmt.Errorf("%w: %w", ErrRequest, err)
	}
	again, err := r.Encode()
	if err != nil || !bytes.Equal(again, data) {
		return Request{}, fmt.Errorf("%w: it is not as it was made", ErrRequest)
	}
	if err := r.validate(); err != nil {
		return Request{}, err
	}
	return r, nil
}

// At returns [ErrWindow] unless t is in the request's time.
func (r Request) At(t time.Time) error {
	if t.Before(r.From) || !t.Before(r.Until) {
		return fmt.Errorf("%w: from %s until %s", ErrWindow, r.From.Format(time.RFC3339), r.Until.Format(time.RFC3339))
	}
	return nil
}

// Operator is somebody who may approve.
type Operator struct {
	Name string `yaml:"name"`
	Key  string `yaml:"key"` // SSH public key, as in authorized_keys
}

// Board is who may approve, and how many of them it takes.
type Board struct {
	threshold int
	names     []string
	keys      []ssh.PublicKey
}

// NewBoard checks who may approve. Fewer than two is nobody's word against another's:
// [ErrOperators].
func NewBoard(threshold int, operators []Operator) (*Board, error) {
	b := &Board{threshold: threshold}
	if threshold < 2 || len(operators) < threshold || len(operators) > maxOperators {
		return nil, fmt.Errorf("%w: %d of %d; at least 2 must approve, and there are at most %d", ErrOperators, threshold, len(operators), maxOperators)
	}
	for _, o := range operators {
		key, _, options, rest, err := ssh.ParseAuthorizedKey([]byte(o.Key))
		switch {
		case o.Name == "" || !isPlain(o.Name) || len(o.Name) > 64 || slices.Contains(b.names, o.Name):
			err = errors.New("a name is missing, or given twice")
		case err != nil:
		case len(options) > 0 || len(bytes.TrimSpace(rest)) > 0:
			err = errors.New("the key has options, or something behind it")
		case b.find(key) >= 0:
			err = errors.New("somebody else has that key")
		case key.Type() == "ssh-dss":
			err = errors.New("a DSA key")
		}
		if err != nil {
			return nil, fmt.Errorf("%w: %.64q: %w", ErrOperators, o.Name, err)
		}
		b.names, b.keys = append(b.names, o.Name), append(b.keys, key)
	}
	return b, nil
}

func (b *Board) find(key ssh.PublicKey) int {
	return slices.IndexFunc(b.keys, func(k ssh.PublicKey) bool { return bytes.Equal(k.Marshal(), key.Marshal()) })
}

// Approved returns the names of those who approve a request, in order, if they are enough. Each
// signature that is no approval is an error: [ErrApproval], [ErrTooFew].
func (b *Board) Approved(request []byte, signatures [][]byte) ([]string, error) {
	if len(signatures) > maxOperators {
		return nil, fmt.Errorf("%w: %d signatures", ErrApproval, len(signatures))
	}
	by := map[int]bool{}
	for i, raw := range signatures {
		who, err := b.verify(request, raw)
		if err != nil {
			return nil, fmt.Errorf("signature %d: %w: %w", i+1, ErrApproval, err)
		}
		by[who] = true
	}
	if len(by) < b.threshold {
		return nil, fmt.Errorf("%w: %d of the %d that are needed", ErrTooFew, len(by), b.threshold)
	}
	var names []string
	for i, name := range b.names {
		if by[i] {
			names = append(names, name)
		}
	}
	return names, nil
}

func (b *Board) verify(request, raw []byte) (who int, err error) {
	if len(raw) > MaxSignature {
		return 0, fmt.Errorf("more than %d bytes", MaxSignature)
	}
	sig, err := sshsig.Unarmor(raw)
	if err != nil {
		return 0, err
	}
	if who = b.find(sig.PublicKey); who < 0 {
		return 0, fmt.Errorf("it is by %s, who is no operator here", ssh.FingerprintSHA256(sig.PublicKey))
	}
	// Not by what the signature says of itself.
	if sig.HashAlgorithm != sshsig.HashSHA512 && sig.HashAlgorithm != sshsig.HashSHA256 {
		return 0, fmt.Errorf("hash %.20q", sig.HashAlgorithm)
	}
	return who, sshsig.Verify(bytes.NewReader(request), sig, b.keys[who], sig.HashAlgorithm, Namespace)
}
