package shares

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"

	"filippo.io/age"
	"filippo.io/age/agessh"
	"filippo.io/age/armor"
	"filippo.io/age/plugin"
	"golang.org/x/crypto/ssh"

	"github.com/keyagent/keyagent/internal/secret"
)

var (
	// ErrRecipient means that a share cannot be encrypted to what was named.
	ErrRecipient = errors.New("not a recipient that age knows")
	// ErrIdentity means that a file has no identity that age knows.
	ErrIdentity = errors.New("not an identity that age knows")
	// ErrNotYours means that none of the identities decrypts a share.
	ErrNotYours = errors.New("none of the identities decrypts it")
)

// maxEncrypted bounds an encrypted share in bytes: plugins may add to its header.
const maxEncrypted = 64 << 10

// ParseRecipient reads a recipient as age's command takes it: age1…, age1pq1…, one of a plugin, or
// an SSH public key. ui is asked by plugins. [ErrRecipient].
func ParseRecipient(text string, ui *plugin.ClientUI) (r age.Recipient, err error) {
	switch name, _, pluginErr := plugin.ParseRecipient(text); {
	case strings.HasPrefix(text, "ssh-"):
		r, err = agessh.ParseRecipient(text)
	case strings.HasPrefix(text, "age1pq1"):
		r, err = age.ParseHybridRecipient(text)
	case pluginErr == nil && name != "":
		r, err = plugin.NewRecipient(text, ui)
	default:
		r, err = age.ParseX25519Recipient(text)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %.20q…", ErrRecipient, text)
	}
	return r, nil
}

// ParsePlainRecipient reads a recipient that needs no program beside this one, and which is
// written in one way only: what people read is who can decrypt. An SSH key has no comment.
// [ErrRecipient].
func ParsePlainRecipient(text string) (age.Recipient, error) {
	var r age.Recipient
	var again string
	switch {
	case strings.HasPrefix(text, "ssh-"):
		key, _, _, _, err := ssh.ParseAuthorizedKey([]byte(text))
		if err == nil {
			again = strings.TrimSpace(string(ssh.MarshalAuthorizedKey(key)))
			r, err = agessh.ParseRecipient(again)
		}
		if err != nil {
			again = ""
		}
	case strings.HasPrefix(text, "age1pq1"):
		if h, err := age.ParseHybridRecipient(text); err == nil {
			r, again = h, h.String()
		}
	default:
		if x, err := age.ParseX25519Recipient(text); err == nil {
			r, again = x, x.String()
		}
	}
	if r == nil || again != text {
		return nil, fmt.Errorf("%w: %.20q…", ErrRecipient, text)
	}
	return r, nil
}

// ParseIdentities reads a file of identities as age's command takes it: age's own, a plugin's,
// or an SSH private key without a passphrase. [ErrIdentity].
func ParseIdentities(file *secret.Bytes, ui *plugin.ClientUI) (ids []age.Identity, err error) {
	err = file.Use(func(raw []byte) error {
		if bytes.HasPrefix(bytes.TrimSpace(raw), []byte("-----BEGIN")) {
			id, err := agessh.ParseIdentity(raw)
			ids = append(ids, id)
			return err
		}
		for line := range bytes.Lines(raw) {
			line = bytes.TrimSpace(line)
			switch {
			case len(line) == 0 || line[0] == '#':
			case bytes.HasPrefix(line, []byte("AGE-PLUGIN-")):
				id, err := plugin.NewIdentity(string(line), ui) // names a plugin, and holds no key of age's own
				if err != nil {
					return err
				}
				ids = append(ids, id)
			default:
				more, err := age.ParseIdentities(bytes.NewReader(line))
				if err != nil {
					return err
				}
				ids = append(ids, more...)
			}
		}
		return nil
	})
	if err != nil || len(ids) == 0 {
		return nil, ErrIdentity // the library's words may repeat what it read
	}
	return ids, nil
}

// Encrypt encrypts a share to one operator, in age's armor.
func (s *Share) Encrypt(r age.Recipient) ([]byte, error) {
	text, err := s.Encode()
	if err != nil {
		return nil, err
	}
	defer text.Close()
	data, err := EncryptTo(r, text)
	if err != nil {
		return nil, fmt.Errorf("share %d: %w", s.Index, err)
	}
	return data, nil
}

// EncryptTo encrypts a secret to one person, in age's armor.
func EncryptTo(r age.Recipient, text *secret.Bytes) ([]byte, error) {
	var out bytes.Buffer
	err := text.Use(func(raw []byte) error {
		a := armor.NewWriter(&out)
		w, err := age.Encrypt(a, r)
		if err != nil {
			return err
		}
		_, err = w.Write(raw)
		return errors.Join(err, w.Close(), a.Close())
	})
	if err != nil {
		return nil, fmt.Errorf("encrypt: %w", err)
	}
	return out.Bytes(), nil
}

// IsEncrypted reports whether a file is age's, and not a share as it is.
func IsEncrypted(data []byte) bool {
	return bytes.HasPrefix(data, []byte(armor.Header)) || bytes.HasPrefix(data, []byte("age-encryption.org/"))
}

// Decrypt reads a share that was encrypted to one of the identities. [ErrNotYours], [ErrFormat].
func Decrypt(data []byte, ids []age.Identity) (s *Share, err error) {
	if len(data) > maxEncrypted {
		return nil, fmt.Errorf("share: %w: more than %d bytes", ErrFormat, maxEncrypted)
	}
	if len(ids) == 0 {
		return nil, fmt.Errorf("share: %w", ErrNotYours)
	}
	var in io.Reader = bytes.NewReader(data)
	if bytes.HasPrefix(data, []byte(armor.Header)) {
		in = armor.NewReader(in)
	}
	secret.Do(func() {
		r, ageErr := age.Decrypt(in, ids...)
		var none *age.NoIdentityMatchError
		switch {
		case errors.As(ageErr, &none):
			err = fmt.Errorf("share: %w", ErrNotYours)
			return
		case ageErr != nil:
			err = fmt.Errorf("share: %w: %w", ErrFormat, ageErr)
			return
		}
		raw, ageErr := io.ReadAll(io.LimitReader(r, MaxShare+1))
		if ageErr != nil || len(raw) == 0 {
			err = fmt.Errorf("share: %w: it does not decrypt to its end", ErrFormat)
			return
		}
		var text *secret.Bytes
		if text, err = secret.From(raw); err != nil {
			return
		}
		defer text.Close()
		s, err = ParseShare(text)
	})
	return s, err
}
