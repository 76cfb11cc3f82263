package aws

import (
	"context"
	"fmt"
	"strconv"

	awssdk "github.com/aws/aws-sdk-go-v2/aws"
	service "github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/aws-sdk-go-v2/service/kms/types"

	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/kms/backend"
)

const (
	scheme = "aws-kms"
	prefix = "aws:"
	domain = "keyagent aws kms v1"
	// maxCiphertext is what the service accepts in bytes.
	maxCiphertext = 6144
)

// encryptionContext is what the service authenticates, see the package
// documentation. Each field of the binding has an entry of its own, so that
// nothing depends on where one value ends and the next begins.
func encryptionContext(b kms.Binding) map[string]string {
	out := map[string]string{
		"domain":  domain,
		"volume":  b.VolumeID,
		"purpose": string(b.Purpose),
		"version": strconv.FormatUint(uint64(b.Version), 10),
		"length":  strconv.Itoa(b.Length),
	}
	if id := b.SaltID(); id != "" {
		out["salt"] = id
	}
	return out
}

// Generate implements kms.KMS.
func (k *KMS) Generate(ctx context.Context, b kms.Binding) (*kms.Secret, kms.Wrapped, error) {
	return backend.Generate(ctx, b, k.Wrap)
}

// Wrap implements kms.KMS.
func (k *KMS) Wrap(ctx context.Context, b kms.Binding, key *kms.Secret) (kms.Wrapped, error) {
	if err := backend.CheckWrap(ctx, b, key); err != nil {
		return kms.Wrapped{}, err
	}
	if k.closed.Load() {
		return kms.Wrapped{}, errClosed
	}
	calling, cancel := context.WithTimeout(ctx, k.opts.Timeout)
	defer cancel()
	var out *service.EncryptOutput
	err := key.Use(func(p []byte) (err error) {
		out, err = k.client.Encrypt(calling, &service.EncryptInput{
			KeyId: &k.opts.Key, Plaintext: p, EncryptionContext: encryptionContext(b),
			EncryptionAlgorithm: types.EncryptionAlgorithmSpecSymmetricDefault,
		})
		if err != nil {
			err = k.explain(ctx, "encrypt", err)
		}
		return err
	})
	if err != nil {
		return kms.Wrapped{}, err
	}
	used, ok := parseARN(awssdk.ToString(out.KeyId))
	switch {
	case !ok:
		return kms.Wrapped{}, fmt.Errorf("%w: aws kms did not say which key it used", kms.ErrUnavailable)
	case len(out.CiphertextBlob) == 0 || len(out.CiphertextBlob) > maxCiphertext:
		return kms.Wrapped{}, fmt.Errorf("%w: aws kms answered with a ciphertext of %d bytes", kms.ErrUnavailable, len(out.CiphertextBlob))
	}
	if err := k.follow(used); err != nil {
		return kms.Wrapped{}, err
	}
	return kms.Wrapped{Scheme: scheme, KEK: used.name(), Blob: out.CiphertextBlob}, nil
}

// follow takes what Key is now from an answer of the service. Only an alias can
// become another key, and only one of the same account.
func (k *KMS) follow(now arn) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if now == k.current {
		return nil
	}
	was := k.current
	was.id = now.id
	if !k.isAlias() || was != now {
		return fmt.Errorf("%w: aws kms used %s, asked for was %s", kms.ErrUnavailable, now, k.opts.Key)
	}
	k.current = now
	return nil
}

// Current implements kms.Namer. It asks the service, so that an alias that was
// moved is noticed.
func (k *KMS) Current(ctx context.Context) (string, error) {
	if err := ctx.Err(); err != nil {
		return "", err
	}
	if k.closed.Load() {
		return "", errClosed
	}
	a, err := k.resolve(ctx, k.opts.Key)
	if err != nil {
		return "", err
	}
	return a.name(), k.follow(a)
}

// Unwrap implements kms.KMS.
func (k *KMS) Unwrap(ctx context.Context, b kms.Binding, w kms.Wrapped) (*kms.Secret, error) {
	if err := backend.CheckUnwrap(ctx, b, w, scheme); err != nil {
		return nil, err
	}
	if k.closed.Load() {
		return nil, errClosed
	}
	if len(w.Blob) > maxCiphertext {
		return nil, fmt.Errorf("%w: it has %d bytes", kms.ErrWrongKey, len(w.Blob))
	}
	kek, err := k.allowed(ctx, w.KEK)
	if err != nil {
		return nil, err
	}
	calling, cancel := context.WithTimeout(ctx, k.opts.Timeout)
	defer cancel()
	in := &service.DecryptInput{
		KeyId: awssdk.String(kek.String()), CiphertextBlob: w.Blob, EncryptionContext: encryptionContext(b),
		EncryptionAlgorithm: types.EncryptionAlgorithmSpecSymmetricDefault,
	}
	if k.recipient != nil {
		if in.Recipient, err = k.recipient.info(calling); err != nil {
			return nil, err
		}
	}
	out, err := k.client.Decrypt(calling, in)
	if err != nil {
		return nil, k.explain(ctx, "decrypt", err)
	}
	defer secret.Wipe(out.Plaintext)
	if used := awssdk.ToString(out.KeyId); used != kek.String() {
		return nil, fmt.Errorf("%w: aws kms decrypted by another key than %s", kms.ErrWrongKey, kek)
	}
	if k.recipient != nil {
		return k.recipient.open(out, b.Length)
	}
	if len(out.Plaintext) != b.Length {
		return nil, fmt.Errorf("%w: aws kms gave a key of another length", kms.ErrWrongKey)
	}
	return secret.From(out.Plaintext)
}

// allowed returns the key that a wrapped key names, in our Region, if it is one
// of ours.
func (k *KMS) allowed(ctx context.Context, kek string) (arn, error) {
	named, ok := parseName(kek, k.opts.Region)
	if !ok {
		return arn{}, fmt.Errorf("%w: it names no key of aws kms", kms.ErrKEKVersion)
	}
	if a, ok := k.find(named); ok {
		return a, nil
	}
	if k.isAlias() {
		// Another key service may have seen earlier that the alias was moved.
		now, err := k.resolve(ctx, k.opts.Key)
		if err != nil {
			return arn{}, err
		}
		if err := k.follow(now); err != nil {
			return arn{}, err
		}
		if a, ok := k.find(named); ok {
			return a, nil
		}
	}
	return arn{}, fmt.Errorf("%w: it was created under %q, which is neither the key nor an old key", kms.ErrKEKVersion, kek)
}

func (k *KMS) find(named arn) (arn, bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.current.same(named) {
		return k.current, true
	}
	for _, a := range k.old {
		if a.same(named) {
			return a, true
		}
	}
	return arn{}, false
}
