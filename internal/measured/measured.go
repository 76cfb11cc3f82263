// Package measured writes into a register of the machine which volumes were opened on
// it, so that later evidence shows it.
//
// What is written is a MAC under a key that is derived from the volume's DEK: nobody
// makes it who never had that key. It is no secret once it is written, since evidence
// and logs carry it. docs/spec/measured-volume.md specifies it.
package measured

import (
	"context"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/sha512"
	"errors"
	"fmt"
	"hash"
	"io/fs"
	"strings"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/secret"
)

// domain of the derivation. A change of what is computed changes its version.
const domain = "keyagent measured volume v1"

// Event says that one volume was opened.
type Event struct {
	// Text is "cryptsetup:NAME:UUID", as systemd-cryptsetup has it.
	Text   string
	SHA256 [sha256.Size]byte    // for a TPM
	SHA384 [sha512.Size384]byte // for a TD, and a TPM's other bank
}

// Of is the event of the volume with this DEK, name of its mapping and LUKS UUID.
func Of(dek *secret.Bytes, name, uuid string) (Event, error) {
	e := Event{Text: "cryptsetup:" + name + ":" + uuid}
	err := dek.Use(func(ikm []byte) error {
		return errors.Join(
			mac(e.SHA256[:], sha256.New, ikm, domain+" sha256", e.Text),
			mac(e.SHA384[:], sha512.New384, ikm, domain+" sha384", e.Text),
		)
	})
	if err != nil {
		return Event{}, fmt.Errorf("derive what is measured of the volume: %w", err)
	}
	return e, nil
}

func mac(out []byte, h func() hash.Hash, ikm []byte, info, text string) (err error) {
	secret.Do(func() {
		var key []byte
		if key, err = hkdf.Key(sha256.New, ikm, nil, info, sha256.Size); err != nil {
			return
		}
		defer secret.Wipe(key)
		m := hmac.New(h, key)
		m.Write([]byte(text))
		m.Sum(out[:0])
	})
	return err
}

// Record is what was written, and where.
type Record struct {
	Register string // pcr15 or rtmr3
	Digest   []byte
}

// Register is a place of this machine that evidence covers, and that only a restart of
// the machine empties. It is safe for concurrent use.
type Register interface {
	// Ready says whether the register can be written. Without one the error wraps
	// [ErrNoRegister].
	Ready(ctx context.Context) error
	// Extend writes an event.
	Extend(ctx context.Context, e Event) (Record, error)
}

// ErrNoRegister means that the machine has no register for it.
var ErrNoRegister = errors.New("nothing on this machine can be extended")

const hint = "measure needs a TPM; or, if evidence in the configuration names tdx and no TPM, a TD whose kernel is Linux 6.16 or later"

// None is the register of a machine whose evidence covers none.
type None struct{}

// Ready implements [Register].
func (None) Ready(context.Context) error {
	return failure.New(failure.NoDevice, fmt.Errorf("%w: the evidence covers no register", ErrNoRegister), hint)
}

// Extend implements [Register].
func (n None) Extend(ctx context.Context, _ Event) (Record, error) { return Record{}, n.Ready(ctx) }

// unready gives the error of a register its class. One that is there, and busy or broken,
// is not the same as none: that may come.
func unready(err error) error {
	if !errors.Is(err, fs.ErrNotExist) {
		return failure.New(failure.DeviceBusy, err, "does another program use it?")
	}
	// A hint of its own is for evidence that lacks its device.
	text, _, _ := strings.Cut(err.Error(), " (hint: ")
	text = strings.TrimPrefix(text, attestation.ErrNoDevice.Error()+": ")
	return failure.New(failure.NoDevice, fmt.Errorf("%w: %s", ErrNoRegister, text), hint)
}
