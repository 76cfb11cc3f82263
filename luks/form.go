package luks

import (
	"fmt"
	"strings"
)

// Integrity says how the data of a volume is authenticated. The zero value is not at
// all: the owner of the disk can change what a volume decrypts to, and nobody notices.
type Integrity string

// HMACSHA256 authenticates each sector of 4096 bytes, with its place, by HMAC-SHA256:
// a sector that somebody changed, moved or took from elsewhere gives an I/O error. It
// does not tell a sector's former content from its present one, nor a volume's from that of
// its clone. The tags are kept by
// dm-integrity below dm-crypt, on the same device.
const HMACSHA256 Integrity = "hmac-sha256"

// AEGIS128 encrypts and authenticates in one pass, with a fresh random nonce of 128 bits
// for each write, which is kept beside the tag: a sector that is written twice with the
// same content differs. It says as much as [HMACSHA256] of what somebody changed, with a
// key of 128 bits. The other AEADs of the kernel have nonces of 96 bits, too few to draw at random for a disk's life.
const AEGIS128 Integrity = "aegis128"

// form is one of the forms of header that the guard knows. Each stands for one table.
type form struct {
	integrity  Integrity
	keySize    int    // bytes of the volume key: for XTS, then for the MAC
	areaSize   int64  // bytes of the keyslot's area: the key 4000 times, rounded up to 4096
	encryption string // of the segment, in the header
	tags       string // the segment's type of integrity there
	cipher     string // in the kernel's table
	needs      string // of the kernel, to map it
	whitelist  object
}

var (
	plain = newForm(form{keySize: volumeKeySize, areaSize: areaSize, encryption: cipherSpec, cipher: cipherSpec})
	// With a key for the MAC after that of the cipher.
	authenticated = newForm(form{
		integrity: HMACSHA256, keySize: volumeKeySize + macKeySize, areaSize: authAreaSize, encryption: cipherSpec, tags: "hmac(sha256)",
		cipher: "capi:authenc(hmac(sha256),xts(aes))-plain64", needs: "HMAC-SHA256 beside encryption (CONFIG_CRYPTO_AUTHENC, CONFIG_CRYPTO_HMAC)",
	})
	aead = newForm(form{
		integrity: AEGIS128, keySize: aeadKeySize, areaSize: aeadAreaSize, encryption: "aegis128-random", tags: "aead",
		cipher: "capi:aegis128-random", needs: "AEGIS-128 (CONFIG_CRYPTO_AEGIS128)",
	})

	forms = []*form{plain, authenticated, aead}
)

func newForm(f form) *form {
	f.whitelist = newWhitelist(&f)
	return &f
}

// tagged says whether each sector has a tag that is verified.
func (f *form) tagged() bool { return f.integrity != "" }

// formOf returns the form that has this integrity.
func formOf(i Integrity) (*form, error) {
	for _, f := range forms {
		if f.integrity == i {
			return f, nil
		}
	}
	return nil, fmt.Errorf("%w: integrity %.40q", ErrInvalid, i)
}

// taggedForm returns the form with tags that a crypt target in the kernel's words has, or
// pretends to have; nil if it has none.
func taggedForm(params string) *form {
	for _, f := range forms {
		if f.tagged() && strings.HasPrefix(params, f.cipher+" ") {
			return f
		}
	}
	return nil
}

// size is how many bytes of a device the guard and the MAC cover.
func (f *form) size() int { return areasOffset + int(f.areaSize) }

// formIn chooses the form that metadata is held against, by the length of its key.
func formIn(root *node) *form {
	for _, f := range forms {
		if root.at("keyslots", "0", "key_size").text == fmt.Sprint(f.keySize) {
			return f
		}
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
