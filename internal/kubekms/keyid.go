package kubekms

import (
	"strconv"
	"strings"
)

// A KEK that comes back, after another one encrypted in between, gets another key_id:
// kube-apiserver takes two objects with one key_id for equally fresh, so that none is
// ever used again (KMS v2, "key_id must not be re-used"). The name of the KEK stays in
// front. What is behind counts in this process only, and says nothing to another
// replica: each of them opens whatever has the name.

// turn names the KEK that encrypts from now on. The lock is held.
func (r *Ring) turn(id string) {
	if id == r.last {
		return
	}
	r.last = id
	r.turns[id]++
}

// keyID is what Status and Encrypt say. The lock is held.
func (r *Ring) keyID(id string) string {
	if n := r.turns[id]; n > 1 {
		return id + "." + strconv.Itoa(n)
	}
	return id
}

// kekOf is the name of the KEK in a key_id.
func kekOf(keyID string) string {
	name, n, ok := strings.Cut(keyID, ".")
	if turn, err := strconv.Atoi(n); ok && err == nil && turn > 1 && strconv.Itoa(turn) == n {
		return name
	}
	return keyID
}
