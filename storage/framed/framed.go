// Package framed is the form of an object in storages that compare too little to tell two
// writes apart: a line with a random token and a digest goes before the data.
package framed

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/keyagent/keyagent/storage"
)

// frameMagic begins each framed object: "keyagent object 1 TOKEN SHA256\n", then
// the data. docs/spec/storage-object.md specifies it.
const frameMagic = "keyagent object 1 "

// maxFrame bounds the line in front of the data of a framed object in bytes.
const maxFrame = 256

// Frame puts a line before data with a digest of it and a token that no other
// object has. By its token a writer recognises its own object when the answer to
// a write was lost, and the same content has another body each time.
func Frame(data []byte) (body []byte, token string) {
	token = rand.Text()
	digest := sha256.Sum256(data)
	return append(fmt.Appendf(nil, "%s%s %x\n", frameMagic, token, digest), data...), token
}

// Unframe undoes Frame. What Frame did not make, or was changed since, gives
// [storage.ErrCorrupt].
func Unframe(body []byte) (data []byte, token string, err error) {
	line, data, ok := bytes.Cut(body, []byte("\n"))
	rest, isFrame := strings.CutPrefix(string(line), frameMagic)
	token, sum, ok2 := strings.Cut(rest, " ")
	digest := sha256.Sum256(data)
	if !ok || !isFrame || !ok2 || token == "" || len(line) >= maxFrame || sum != hex.EncodeToString(digest[:]) {
		return nil, "", storage.ErrCorrupt
	}
	return data, token, nil
}

// Read reads one framed object to its end, and no further than the largest
// that there may be: [storage.ErrTooLarge].
func Read(r io.Reader) (data []byte, token string, err error) {
	body, err := io.ReadAll(io.LimitReader(r, storage.MaxObject+maxFrame+1))
	switch {
	case err != nil:
		return nil, "", err
	case len(body) > storage.MaxObject+maxFrame:
		return nil, "", storage.ErrTooLarge
	}
	return Unframe(body)
}

// Start is what each framed object with that token begins with. A backend
// that can compare contents recognises an object by it.
func Start(token string) string { return frameMagic + token + " " }

// JoinVersion makes the version of a framed object of its token, by which it is
// unique, and of what the service compares.
func JoinVersion(token, compared string) storage.Version {
	return storage.Version(token + " " + compared)
}

// SplitVersion undoes JoinVersion. A version that is not from there is nobody's.
func SplitVersion(v storage.Version) (token, compared string, ok bool) {
	token, compared, ok = strings.Cut(string(v), " ")
	return token, compared, ok && token != "" && compared != ""
}

// Settle says what became of a write that put an object with this token, where the
// answer was lost or says that somebody else had written: the SDKs try again, and
// the second try conflicts with a first one that was carried out. get reads the
// object; otherwise is what the write was answered with.
func Settle(get func() (token, compared string, err error), token string, otherwise error) (storage.Version, error) {
	have, compared, err := get()
	switch {
	case err == nil && have == token:
		return JoinVersion(token, compared), nil
	case err == nil, errors.Is(err, storage.ErrNotFound), errors.Is(err, storage.ErrCorrupt), errors.Is(err, storage.ErrTooLarge):
		return "", otherwise // somebody else's
	}
	return "", fmt.Errorf("whether it was written is not known: %w", err)
}
