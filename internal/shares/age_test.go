package shares

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"strings"
	"testing"

	"filippo.io/age"
	"golang.org/x/crypto/ssh"

	"github.com/keyagent/keyagent/internal/secret"
)

// operator is somebody with a key pair of one of the kinds that age knows.
type operator struct{ recipient, identity string }

func operators(t *testing.T) map[string]operator {
	t.Helper()
	x, err := age.GenerateX25519Identity()
	must(t, err)
	pq, err := age.GenerateHybridIdentity()
	must(t, err)
	public, private, err := ed25519.GenerateKey(rand.Reader)
	must(t, err)
	block, err := ssh.MarshalPrivateKey(private, "")
	must(t, err)
	sshPublic, err := ssh.NewPublicKey(public)
	must(t, err)
	return map[string]operator{
		"X25519":       {x.Recipient().String(), "# a comment\n\n" + x.String() + "\n"},
		"post-quantum": {pq.Recipient().String(), pq.String()},
		"SSH":          {strings.TrimSpace(string(ssh.MarshalAuthorizedKey(sshPublic))) + " somebody@somewhere", string(pem.EncodeToMemory(block))},
	}
}

func identitiesOf(t *testing.T, text string) []age.Identity {
	t.Helper()
	file, err := secret.From([]byte(text))
	must(t, err)
	defer file.Close()
	ids, err := ParseIdentities(file, nil)
	must(t, err)
	return ids
}

func TestAShareIsForItsOperator(t *testing.T) {
	s, all, _ := split(t, 2, 3)
	everybody := operators(t)
	for name, o := range everybody {
		r, err := ParseRecipient(o.recipient, nil)
		must(t, err)
		data, err := all[0].Encrypt(r)
		must(t, err)
		if !IsEncrypted(data) {
			t.Errorf("%s: %.40s", name, data)
		}
		share, err := Decrypt(data, identitiesOf(t, o.identity))
		if err != nil || s.Check(share) != nil || share.Index != 1 {
			t.Errorf("%s: %v", name, err)
			continue
		}
		must(t, share.Close())
		for other, o := range everybody {
			if _, err := Decrypt(data, identitiesOf(t, o.identity)); other != name && !errors.Is(err, ErrNotYours) {
				t.Errorf("%s reads what is for %s: %v", other, name, err)
			}
		}
		for _, cut := range []int{1, len(data) / 2, len(data) - 60} {
			if _, err := Decrypt(data[:cut], identitiesOf(t, o.identity)); err == nil {
				t.Errorf("%s: the first %d bytes are a share", name, cut)
			}
		}
	}
}

func TestWhoIsNobodyGetsNoShare(t *testing.T) {
	for _, text := range []string{"", "age1", "AGE-SECRET-KEY-1QQQ", "ssh-dss AAAA", "hunter2", "age1yubikey1"} {
		if r, err := ParseRecipient(text, nil); !errors.Is(err, ErrRecipient) || r != nil {
			t.Errorf("%q: %v", text, err)
		}
	}
	for _, text := range []string{"hunter2", "# nothing", "AGE-SECRET-KEY-1hunter2", "-----BEGIN OPENSSH PRIVATE KEY-----\nhunter2"} {
		file, err := secret.From([]byte(text))
		must(t, err)
		if _, err := ParseIdentities(file, nil); !errors.Is(err, ErrIdentity) || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%q: %v", text, err)
		}
	}
}
