package keysocket

import (
	"errors"
	"fmt"
	"strings"

	"github.com/keyagent/keyagent/internal/pattern"
)

// Name is what a caller says of itself by the name of its socket.
type Name struct {
	Mapping    string // what systemd-cryptsetup is to map; else empty
	Unit       string // that loads a credential
	Credential string
}

// ErrName means that a caller's name is not one for which there are keys.
var ErrName = errors.New("the name of the caller's socket asks for no key")

// maxName is the length of sun_path in bytes.
const maxName = 108

var (
	randomPart     = pattern.New(`^[0-9a-f]{1,16}$`)
	mappingPart    = pattern.New(`^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$`)
	unitPart       = pattern.New(`^[A-Za-z0-9:_.\\@-]{1,240}$`)
	credentialPart = pattern.New(`^[A-Za-z0-9_.:-]{1,80}$`)
)

// ParseName reads the bytes of a socket's name: a zero, random digits, and
// /cryptsetup/MAPPING or /unit/UNIT/CREDENTIAL. There is one way to write each name. Names
// under which systemd-cryptsetup asks for something else than a passphrase, such as
// /cryptsetup-tpm2/, are [ErrName] like any other.
func ParseName(raw []byte) (Name, error) {
	if len(raw) == 0 || len(raw) > maxName || raw[0] != 0 {
		return Name{}, fmt.Errorf("%w: it is not an abstract one", ErrName)
	}
	parts := strings.Split(string(raw[1:]), "/")
	if !randomPart.MatchString(parts[0]) {
		return Name{}, fmt.Errorf("%w: %.120q", ErrName, raw)
	}
	switch n := (Name{}); {
	case len(parts) == 3 && parts[1] == "cryptsetup" && mappingPart.MatchString(parts[2]):
		n.Mapping = parts[2]
		return n, nil
	case len(parts) == 4 && parts[1] == "unit" && unitPart.MatchString(parts[2]) && credentialPart.MatchString(parts[3]):
		n.Unit, n.Credential = parts[2], parts[3]
		return n, nil
	}
	return Name{}, fmt.Errorf("%w: %.120q", ErrName, raw)
}

// String is the name without its random part.
func (n Name) String() string {
	switch {
	case n.Mapping != "":
		return "/cryptsetup/" + n.Mapping
	case n.Unit != "":
		return "/unit/" + n.Unit + "/" + n.Credential
	}
	return ""
}
