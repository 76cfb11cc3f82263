package luks

import "fmt"

// Integrity says how the data of a volume is authenticated. The zero value is not at
// all: the owner of the disk can change what a volume decrypts to, and nobody notices.
type Integrity string

// HMACSHA256 authenticates each sector of 4096 bytes, with its place, by HMAC-SHA256:
// a sector that somebody changed, moved or took from elsewhere gives an I/O error. It
// does not tell a sector's former content from its present one, nor a volume's from that of
// its clone. The tags are kept by
// dm-integrity below dm-crypt, on the same device.
const HMACSHA256 Integrity = "hmac-sha256"

// form is one of the forms of header that the guard knows. Each stands for one table.
type form struct {
	integrity Integrity
	keySize   int    // bytes of the volume key: for XTS, then for the MAC
	areaSize  int64  // bytes of the keyslot's area: the key 4000 times, rounded up to 4096
	cipher    string // in the kernel's table
	whitelist object
}

var (
	plain         = newForm("", volumeKeySize, areaSize, cipherSpec)
	authenticated = newForm(HMACSHA256, volumeKeySize+macKeySize, authAreaSize, "capi:authenc(hmac(sha256),xts(aes))-plain64")
)

func newForm(i Integrity, keySize int, areaSize int64, cipher string) *form {
	f := &form{integrity: i, keySize: keySize, areaSize: areaSize, cipher: cipher}
	f.whitelist = newWhitelist(f)
	return f
}

// formOf returns the form that has this integrity.
func formOf(i Integrity) (*form, error) {
	for _, f := range []*form{plain, authenticated} {
		if f.integrity == i {
			return f, nil
		}
	}
	return nil, fmt.Errorf("%w: integrity %.40q", ErrInvalid, i)
}

// size is how many bytes of a device the guard and the MAC cover.
func (f *form) size() int { return areasOffset + int(f.areaSize) }

// formIn chooses the form that metadata is held against, by the length of its key.
func formIn(root *node) *form {
	if root.at("keyslots", "0", "key_size").text == fmt.Sprint(authenticated.keySize) {
		return authenticated
	}
	return plain
}

// at returns what stands at a path, or an empty node.
func (n *node) at(path ...string) *node {
	for _, name := range path {
		next, ok := n.child[name]
		if !ok {
			return &node{}
		}
		n = next
	}
	return n
}
