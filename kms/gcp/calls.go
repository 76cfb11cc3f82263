package gcp

import (
	"context"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"slices"
	"strconv"
	"strings"

	"cloud.google.com/go/kms/apiv1/kmspb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/kms/backend"
)

const (
	scheme = "gcp-kms"
	prefix = "gcp:"
	domain = "keyagent gcp kms v1"
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func checksum(p []byte) *wrapperspb.Int64Value {
	return wrapperspb.Int64(int64(crc32.Checksum(p, castagnoli)))
}

// intact reports whether p has the checksum that came with it.
func intact(p []byte, sum *wrapperspb.Int64Value) bool {
	return sum != nil && sum.GetValue() == checksum(p).GetValue()
}

// A blob is the number of this format, the number of the key's version in 64
// bits, big-endian, and the ciphertext.
const (
	blobFormat = 1
	blobHeader = 9
)

func joinBlob(version uint64, ciphertext []byte) []byte {
	return append(binary.BigEndian.AppendUint64([]byte{blobFormat}, version), ciphertext...)
}

func splitBlob(blob []byte) (version uint64, ciphertext []byte, ok bool) {
	if len(blob) <= blobHeader || blob[0] != blobFormat {
		return 0, nil, false
	}
	return binary.BigEndian.Uint64(blob[1:]), blob[blobHeader:], true
}

// splitVersion takes the name of a key's version apart.
func splitVersion(name string) (key string, version uint64, ok bool) {
	m := versionPattern.FindStringSubmatch(name)
	if m == nil {
		return "", 0, false
	}
	version, err := strconv.ParseUint(m[2], 10, 64)
	return m[1], version, err == nil
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
	aad := b.Encode(domain)
	var out *kmspb.EncryptResponse
	err := key.Use(func(p []byte) (err error) {
		out, err = k.client.Encrypt(calling, &kmspb.EncryptRequest{
			Name: k.name, Plaintext: p, PlaintextCrc32C: checksum(p),
			AdditionalAuthenticatedData: aad, AdditionalAuthenticatedDataCrc32C: checksum(aad),
		})
		if err != nil {
			err = k.explain(ctx, encrypt, k.name, err)
		}
		return err
	})
	if err != nil {
		return kms.Wrapped{}, err
	}
	if !out.GetVerifiedPlaintextCrc32C() || !out.GetVerifiedAdditionalAuthenticatedDataCrc32C() || !intact(out.GetCiphertext(), out.GetCiphertextCrc32C()) {
		return kms.Wrapped{}, damaged(encrypt)
	}
	used, version, ok := splitVersion(out.GetName())
	if !ok || used != k.name {
		return kms.Wrapped{}, fmt.Errorf("%w: gcp kms used another key than %s (hint: the project is its ID, not its number)", kms.ErrUnavailable, k.name)
	}
	blob := joinBlob(version, out.GetCiphertext())
	if len(blob) == blobHeader || len(blob) > kms.MaxBlob {
		return kms.Wrapped{}, fmt.Errorf("%w: gcp kms answered with a ciphertext of %d bytes", kms.ErrUnavailable, len(out.GetCiphertext()))
	}
	return kms.Wrapped{Scheme: scheme, KEK: prefix + out.GetName(), Blob: blob}, nil
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
	kek, version, ok := splitVersion(text)
	switch {
	case !ours || !ok:
		return nil, fmt.Errorf("%w: it names no key version of gcp kms", kms.ErrKEKVersion)
	case !slices.Contains(k.keys, kek):
		return nil, fmt.Errorf("%w: it was created under %q, which is neither the key nor an old key", kms.ErrKEKVersion, kek)
	}
	made, ciphertext, ok := splitBlob(w.Blob)
	switch {
	case !ok:
		return nil, fmt.Errorf("%w: not a blob of gcp kms", kms.ErrWrongKey)
	case made != version:
		return nil, fmt.Errorf("%w: it was created under version %d of its key, and goes by the name of version %d", kms.ErrWrongKey, made, version)
	}
	calling, cancel := context.WithTimeout(ctx, k.opts.Timeout)
	defer cancel()
	aad := b.Encode(domain)
	out, err := k.client.Decrypt(calling, &kmspb.DecryptRequest{
		Name: kek, Ciphertext: ciphertext, CiphertextCrc32C: checksum(ciphertext),
		AdditionalAuthenticatedData: aad, AdditionalAuthenticatedDataCrc32C: checksum(aad),
	})
	if err != nil {
		return nil, k.explain(ctx, decrypt, kek, err)
	}
	defer secret.Wipe(out.GetPlaintext())
	if !intact(out.GetPlaintext(), out.GetPlaintextCrc32C()) {
		return nil, damaged(decrypt)
	}
	if len(out.GetPlaintext()) != b.Length {
		return nil, fmt.Errorf("%w: gcp kms gave a key of another length", kms.ErrWrongKey)
	}
	return secret.From(out.GetPlaintext())
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
	key, err := k.client.GetCryptoKey(calling, &kmspb.GetCryptoKeyRequest{Name: k.name})
	if err != nil {
		return "", k.explain(ctx, get, k.name, err)
	}
	primary := key.GetPrimary()
	if key.GetPurpose() != kmspb.CryptoKey_ENCRYPT_DECRYPT || primary == nil {
		return "", fmt.Errorf("%w: %s is of purpose %s, or has no primary version (hint: it must be ENCRYPT_DECRYPT)", kms.ErrKEK, k.name, key.GetPurpose())
	}
	if used, _, ok := splitVersion(primary.GetName()); !ok || used != k.name {
		return "", fmt.Errorf("%w: gcp kms described another key than %s (hint: the project is its ID, not its number)", kms.ErrUnavailable, k.name)
	}
	if primary.GetState() != kmspb.CryptoKeyVersion_ENABLED {
		return "", fmt.Errorf("%w: the primary version of %s is in state %s", kms.ErrKEK, k.name, primary.GetState())
	}
	return prefix + primary.GetName(), nil
}
