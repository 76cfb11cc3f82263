package azure

import "github.com/keyagent/keyagent/kms"

var _ kms.PublicWrapper = (*KMS)(nil)

// Public implements kms.PublicWrapper: an RSA key has a public half, a symmetric
// key of a managed HSM has none.
func (k *KMS) Public() bool {
	a := k.algorithm.Load()
	return a == nil || *a != algorithmAES
}
