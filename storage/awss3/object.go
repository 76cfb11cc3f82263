package awss3

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strings"

	"github.com/keyagent/keyagent/storage"
)

// magic begins each object: "keyagent object 1 TOKEN SHA256\n", then the data.
const magic = "keyagent object 1 "

// maxHeader bounds that line.
const maxHeader = 256

// encode makes an object with a token that no other has.
func encode(data []byte) (body []byte, token string) {
	token = rand.Text()
	digest := sha256.Sum256(data)
	return append(fmt.Appendf(nil, "%s%s %x\n", magic, token, digest), data...), token
}

func decode(body []byte) (data []byte, token string, err error) {
	line, data, ok := bytes.Cut(body, []byte("\n"))
	rest, ok2 := strings.CutPrefix(string(line), magic)
	token, sum, ok3 := strings.Cut(rest, " ")
	digest := sha256.Sum256(data)
	if !ok || !ok2 || !ok3 || token == "" || sum != hex.EncodeToString(digest[:]) {
		return nil, "", storage.ErrCorrupt
	}
	return data, token, nil
}

// version is what the service compares, and what makes it unique.
func version(token, etag string) storage.Version { return storage.Version(token + " " + etag) }

// splitVersion undoes version. A version that is not from here is nobody's.
func splitVersion(v storage.Version) (token, etag string, ok bool) {
	token, etag, ok = strings.Cut(string(v), " ")
	return token, etag, ok && token != "" && etag != ""
}
