package kms

// PublicWrapper is implemented by backends whose KEK has a public half: anyone who
// knows it can wrap a key of their own choice. Only a MAC, under a key that was
// not taken from the same storage on trust, tells such a key from ours.
type PublicWrapper interface {
	// Public says whether the KEK in force has one.
	Public() bool
}

// Public says whether anybody can wrap under the KEK of k, see [PublicWrapper].
func Public(k KMS) bool {
	if m, ok := k.(*withOld); ok {
		for _, old := range m.old {
			if Public(old) {
				return true
			}
		}
		k = m.KMS
	}
	p, ok := k.(PublicWrapper)
	return ok && p.Public()
}
