package aws

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"

	service "github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/aws-sdk-go-v2/service/kms/types"

	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/kms"
)

// recipient is who the service encrypts its answers to.
type recipient struct {
	attester Attester
	public   []byte        // SubjectPublicKeyInfo, DER
	key      *secret.Bytes // PKCS #8, DER: an *rsa.PrivateKey cannot be wiped
}

func newRecipient(attester Attester) (r *recipient, err error) {
	r = &recipient{attester: attester}
	secret.Do(func() {
		var key *rsa.PrivateKey
		if key, err = rsa.GenerateKey(rand.Reader, 2048); err != nil {
			return
		}
		var der []byte
		if der, err = x509.MarshalPKIXPublicKey(key.Public()); err != nil {
			return
		}
		r.public = append(r.public, der...)
		if der, err = x509.MarshalPKCS8PrivateKey(key); err != nil {
			return
		}
		r.key, err = secret.From(der)
	})
	if err != nil {
		return nil, fmt.Errorf("key for attested answers: %w", err)
	}
	return r, nil
}

func (r *recipient) info(ctx context.Context) (*types.RecipientInfo, error) {
	document, err := r.attester.Document(ctx, append([]byte(nil), r.public...))
	if err != nil {
		return nil, fmt.Errorf("attestation document for aws kms: %w", err)
	}
	return &types.RecipientInfo{AttestationDocument: document, KeyEncryptionAlgorithm: types.KeyEncryptionMechanismRsaesOaepSha256}, nil
}

// open takes the key out of an answer.
func (r *recipient) open(out *service.DecryptOutput, length int) (key *secret.Bytes, err error) {
	if len(out.Plaintext) != 0 {
		return nil, fmt.Errorf("%w: aws kms gave the key in plain text, although it was asked to encrypt it (hint: an endpoint that does not know recipients)", kms.ErrUnavailable)
	}
	e, err := parseEnveloped(out.CiphertextForRecipient)
	if err != nil {
		return nil, fmt.Errorf("%w: the answer of aws kms to a recipient: %w", kms.ErrUnavailable, err)
	}
	useErr := r.key.Use(func(der []byte) error {
		secret.Do(func() { key, err = e.open(der, length) })
		return err
	})
	return key, useErr
}

// open decrypts with a key in PKCS #8. All that it allocates holds secrets.
func (e *enveloped) open(der []byte, length int) (*secret.Bytes, error) {
	parsed, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, err
	}
	key, ok := parsed.(*rsa.PrivateKey)
	if !ok {
		return nil, errors.New("the key for attested answers is not RSA")
	}
	content, err := rsa.DecryptOAEP(crypto.SHA256.New(), nil, key, e.key, nil)
	if err != nil {
		return nil, fmt.Errorf("%w: aws kms did not encrypt its answer to this process", kms.ErrUnavailable)
	}
	defer secret.Wipe(content)
	plain, err := e.decrypt(content)
	if err != nil {
		return nil, fmt.Errorf("%w: the answer of aws kms to a recipient: %w", kms.ErrUnavailable, err)
	}
	defer secret.Wipe(plain[:cap(plain)])
	if len(plain) != length {
		return nil, fmt.Errorf("%w: aws kms gave a key of another length", kms.ErrWrongKey)
	}
	return secret.From(plain)
}
