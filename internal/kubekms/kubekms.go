// Package kubekms is the Kubernetes KMS plugin: it encrypts and decrypts the keys
// with which kube-apiserver encrypts objects in etcd.
//
// A [Source] gives the key-encryption key (KEK): what a command prints, a local KEK
// that a key management service wraps, or one that the key service releases to this
// attested machine. A [Refresher] asks it at the start, which must succeed, and again
// and again; it decides by a table of states how long a KEK may be used that the
// source does not confirm any more. A [Ring] holds the KEKs: one encrypts, all of
// them decrypt. A [Server] answers kube-apiserver on a unix socket, in both versions
// of its protocol, from the ring alone: no request waits for a source.
//
// What Encrypt returns is specified in docs/spec/kubekms-envelope.md. The format of
// the daemon of 2018 is always read, and written on request.
//
// What this package never does: log or return a KEK or a plaintext; write a KEK to a
// disk except wrapped; tell one reason from another why a ciphertext does not open.
// Plaintexts pass through gRPC's buffers, which it cannot wipe.
package kubekms

import (
	"errors"
	"fmt"

	"github.com/keyagent/keyagent/internal/failure"
)

// Mode is the format of new ciphertexts. Both are always read.
type Mode string

// The modes.
const (
	AESGCM Mode = "aesgcm" // an envelope with AES-256-GCM
	AESCBC Mode = "aescbc" // that of the daemon of 2018: not authenticated
)

// ParseMode refuses what is not a mode.
func ParseMode(s string) (Mode, error) {
	switch m := Mode(s); m {
	case AESGCM, AESCBC:
		return m, nil
	}
	return "", failure.Newf(failure.Usage, "aesgcm or aescbc", "unknown mode %q", s)
}

// The bounds of kube-apiserver, in bytes.
const (
	// MaxKeyID bounds a key_id.
	MaxKeyID = 1 << 10
	// MaxCiphertextV2 bounds the ciphertext of v2.
	MaxCiphertextV2 = 1 << 10
	// MaxCiphertextV1 bounds that of v1beta1, which keeps its length in 16 bits.
	MaxCiphertextV1 = 1<<16 - 1
)

var (
	// ErrDecrypt: the ciphertext does not open. It never says why.
	ErrDecrypt = errors.New("the ciphertext does not open")
	// ErrUnknownKey: the request names a KEK that is not here.
	ErrUnknownKey = errors.New("the KEK that the request names is not here")
	// ErrNoKey: there is no KEK at the moment. The error that wraps it has the class
	// of what went wrong last.
	ErrNoKey = errors.New("there is no KEK")
	// ErrTooLong: the plaintext is longer than what may be encrypted.
	ErrTooLong = errors.New("the plaintext is too long")
	// ErrSource: a source gave something that is no KEK.
	ErrSource = errors.New("key source")
	// ErrUnsettled: a source gives another KEK each time.
	ErrUnsettled = fmt.Errorf("%w: it gives another KEK each time", ErrSource)
)
