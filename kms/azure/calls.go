package azure

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/Azure/azure-sdk-for-go/sdk/security/keyvault/azkeys"

	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/kms/backend"
)

const (
	scheme = "azure-keyvault"
	prefix = "azure:"
	// contentKey is the length of a content key in bytes.
	contentKey = 32
)

// splitID takes an ID of the form HOST/keys/NAME/VERSION apart, if it is of our
// vault and our key. The vault ignores the case of names.
func (k *KMS) splitID(id string) (name, version string, ok bool) {
	p := strings.Split(id, "/")
	if len(p) != 4 || !strings.EqualFold(p[0], k.host) || p[1] != "keys" || !strings.EqualFold(p[2], k.opts.Key) || !versionPattern.MatchString(p[3]) {
		return "", "", false
	}
	return p[2], p[3], true
}

// kek is the name of a key that an answer of the vault is about.
func (k *KMS) kek(id *azkeys.ID) (string, error) {
	if id != nil {
		text, _ := strings.CutPrefix(string(*id), "https://")
		if name, version, ok := k.splitID(text); ok {
			return prefix + k.host + "/keys/" + name + "/" + version, nil
		}
	}
	return "", fmt.Errorf("%w: azure kms answered for another key than %s of %s", kms.ErrUnavailable, k.opts.Key, k.host)
}

// Current implements kms.Namer.
func (k *KMS) Current(ctx context.Context) (string, error) {
	if err := ctx.Err(); err != nil {
		return "", err
	}
	if k.closed.Load() {
		return "", errClosed
	}
	calling, cancel := context.WithTimeout(ctx, k.opts.Timeout)
	defer cancel()
	out, err := k.client.GetKey(calling, k.opts.Key, "", nil)
	if err != nil {
		return "", k.explain(ctx, get, err)
	}
	if out.Key == nil || out.Key.Kty == nil {
		return "", fmt.Errorf("%w: azure kms described no key", kms.ErrUnavailable)
	}
	kek, err := k.kek(out.Key.KID)
	if err != nil {
		return "", err
	}
	may := func(op azkeys.KeyOperation) bool {
		return slices.ContainsFunc(out.Key.KeyOps, func(o *azkeys.KeyOperation) bool { return o != nil && *o == op })
	}
	algorithm := ""
	switch kind := *out.Key.Kty; {
	case out.Attributes != nil && out.Attributes.Enabled != nil && !*out.Attributes.Enabled:
		return "", fmt.Errorf("%w: %s is disabled", kms.ErrKEK, kek)
	case !may(azkeys.KeyOperationWrapKey) || !may(azkeys.KeyOperationUnwrapKey):
		return "", fmt.Errorf("%w: the operations of %s must hold wrapKey and unwrapKey", kms.ErrKEK, kek)
	case kind == azkeys.KeyTypeRSA || kind == azkeys.KeyTypeRSAHSM:
		algorithm = algorithmRSA
	case kind == azkeys.KeyTypeOctHSM && k.hsm:
		algorithm = algorithmAES
	default:
		return "", fmt.Errorf("%w: %s is of type %q (hint: it must be RSA or RSA-HSM, or oct-HSM of a managed HSM)", kms.ErrKEK, kek, kind)
	}
	k.algorithm.Store(&algorithm)
	return kek, nil
}

// Generate implements kms.KMS.
func (k *KMS) Generate(ctx context.Context, b kms.Binding) (*kms.Secret, kms.Wrapped, error) {
	return backend.Generate(ctx, b, k.Wrap)
}

// Wrap implements kms.KMS. The vault wraps by the latest version of the key, and
// says which one that was.
func (k *KMS) Wrap(ctx context.Context, b kms.Binding, key *kms.Secret) (kms.Wrapped, error) {
	if err := backend.CheckWrap(ctx, b, key); err != nil {
		return kms.Wrapped{}, err
	}
	if k.closed.Load() {
		return kms.Wrapped{}, errClosed
	}
	content, err := secret.Random(contentKey)
	if err != nil {
		return kms.Wrapped{}, err
	}
	defer content.Close()
	out := blob{algorithm: *k.algorithm.Load()}
	if out.sealed, err = backend.Seal(content, b, key); err != nil {
		return kms.Wrapped{}, err
	}
	calling, cancel := context.WithTimeout(ctx, k.opts.Timeout)
	defer cancel()
	var answer azkeys.WrapKeyResponse
	algorithm := azkeys.EncryptionAlgorithm(out.algorithm)
	err = content.Use(func(p []byte) (err error) {
		answer, err = k.client.WrapKey(calling, k.opts.Key, "", azkeys.KeyOperationParameters{Algorithm: &algorithm, Value: p}, nil)
		if err != nil {
			err = k.explain(ctx, wrap, err)
		}
		return err
	})
	if err != nil {
		return kms.Wrapped{}, err
	}
	kek, err := k.kek(answer.KID)
	if err != nil {
		return kms.Wrapped{}, err
	}
	out.wrapped = answer.Result
	data, err := out.encode()
	if err != nil {
		return kms.Wrapped{}, fmt.Errorf("%w: azure kms answered with a wrapped key of %d bytes", kms.ErrUnavailable, len(out.wrapped))
	}
	return kms.Wrapped{Scheme: scheme, KEK: kek, Blob: data}, nil
}

// Unwrap implements kms.KMS.
func (k *KMS) Unwrap(ctx context.Context, b kms.Binding, w kms.Wrapped) (*kms.Secret, error) {
	if err := backend.CheckUnwrap(ctx, b, w, scheme); err != nil {
		return nil, err
	}
	if k.closed.Load() {
		return nil, errClosed
	}
	text, ours := strings.CutPrefix(w.KEK, prefix)
	name, version, ok := k.splitID(text)
	if !ours || !ok {
		return nil, fmt.Errorf("%w: it names no version of %s of %s", kms.ErrKEKVersion, k.opts.Key, k.host)
	}
	in, err := parseBlob(w.Blob)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", kms.ErrWrongKey, err)
	}
	if in.algorithm == algorithmRSA && !k.Public() {
		// An older version may have been an RSA key, under which anybody could
		// wrap: what Public says must hold for every key that opens.
		return nil, fmt.Errorf("%w: it was wrapped by an RSA key, and the key is a symmetric one", kms.ErrWrongKey)
	}
	calling, cancel := context.WithTimeout(ctx, k.opts.Timeout)
	defer cancel()
	algorithm := azkeys.EncryptionAlgorithm(in.algorithm)
	answer, err := k.client.UnwrapKey(calling, name, version, azkeys.KeyOperationParameters{Algorithm: &algorithm, Value: in.wrapped}, nil)
	if err != nil {
		return nil, k.explain(ctx, unwrap, err)
	}
	defer secret.Wipe(answer.Result)
	used, err := k.kek(answer.KID)
	if err != nil {
		return nil, err
	}
	if !strings.EqualFold(used, w.KEK) {
		return nil, fmt.Errorf("%w: azure kms unwrapped by %s", kms.ErrWrongKey, used)
	}
	if len(answer.Result) != contentKey {
		return nil, fmt.Errorf("%w: azure kms gave a content key of another length", kms.ErrWrongKey)
	}
	content, err := secret.From(answer.Result)
	if err != nil {
		return nil, err
	}
	defer content.Close()
	return backend.Open(content, b, in.sealed)
}
