package cluster

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/keyagent/keyagent/internal/config"
	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/kms/kmstest"
)

func newKMS(t testing.TB, master, salt string) *KMS {
	t.Helper()
	m, err := secret.From([]byte(master))
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	k, err := New(Options{MasterSecret: m, Salt: []byte(salt)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.Close() })
	return k
}

const testMaster = "0123456789abcdef0123456789abcdef"

func TestConformance(t *testing.T) {
	kmstest.Run(t, kmstest.Bed{
		Open:  func(t *testing.T) kms.KMS { return newKMS(t, testMaster, "") },
		Other: func(t *testing.T) kms.KMS { return newKMS(t, "another master secret, 32 bytes..", "") },
	})
}

// The vector of docs/spec/keys.md, computed in another language.
func TestAKeyWithASaltHasItsVector(t *testing.T) {
	b := kms.Binding{VolumeID: "data-1", Purpose: kms.VolumeDEK, Version: 1, Length: 32, Salt: "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"}
	if got := b.SaltID(); got != "9bef3a0ae3fd0af2b2a3cb3ccb43e89e4cabbc29c8d0bd85ae7a0310339fb06f" {
		t.Errorf("its ID is %s", got)
	}
	k := newKMS(t, testMaster, "")
	key, w, err := k.Generate(t.Context(), b)
	if err != nil || len(w.Blob) != 0 || !k.Salts() {
		t.Fatal(w, err)
	}
	_ = key.Use(func(got []byte) error {
		if hex.EncodeToString(got) != "6fb899874f3cc757e7d09fd707129000b24ab77a9c15ad5bb9717a46c5229f46" {
			t.Errorf("the key is %x", got)
		}
		return nil
	})
}

// TestDerivationIsHKDF computes HKDF by its definition in RFC 5869 and compares.
func TestDerivationIsHKDF(t *testing.T) {
	mac := func(key, data []byte) []byte {
		h := hmac.New(sha256.New, key)
		h.Write(data)
		return h.Sum(nil)
	}
	b := kms.Binding{VolumeID: "data-1", Purpose: kms.VolumeDEK, Version: 1, Length: 32}
	info := []byte("\x00\x00\x00\x17keyagent derived key v1\x00\x00\x00\x06data-1\x00\x00\x00\x0avolume-dek\x00\x00\x00\x01\x00\x00\x00\x20")
	for _, salt := range []string{"", "some salt"} {
		prkKey := []byte(salt)
		if salt == "" {
			prkKey = make([]byte, sha256.Size)
		}
		want := mac(mac(prkKey, []byte(testMaster)), append(info, 1))
		key, _, err := newKMS(t, testMaster, salt).Generate(t.Context(), b)
		if err != nil {
			t.Fatal(err)
		}
		_ = key.Use(func(got []byte) error {
			if !bytes.Equal(got, want) {
				t.Errorf("salt %q: got %x, want %x", salt, got, want)
			}
			return nil
		})
		t.Logf("vector: salt %q key %s", salt, hex.EncodeToString(want))
	}
}

// TestPublishedVectorsOfHKDFHold runs the test cases of RFC 5869, appendix A, that
// use SHA-256 through this package's derivation.
func TestPublishedVectorsOfHKDFHold(t *testing.T) {
	run := func(from, to int) string { // the bytes from, from+1, … to
		var b []byte
		for i := from; i <= to; i++ {
			b = append(b, byte(i))
		}
		return string(b)
	}
	for name, tt := range map[string]struct {
		ikm, salt, info string
		okm             string
	}{
		"A.1": {strings.Repeat("\x0b", 22), run(0x00, 0x0c), run(0xf0, 0xf9),
			"3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"},
		"A.2": {run(0x00, 0x4f), run(0x60, 0xaf), run(0xb0, 0xff),
			"b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c59045a99cac7827271cb41c65e590e09da3275600c2f09b8367793a9aca3db71cc30c58179ec3e87c14c01d5c1f3434f1d87"},
		"A.3": {strings.Repeat("\x0b", 22), "", "",
			"8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8"},
	} {
		key, err := newKMS(t, tt.ikm, tt.salt).derive([]byte(tt.info), len(tt.okm)/2)
		if err != nil {
			t.Fatal(err)
		}
		_ = key.Use(func(got []byte) error {
			if hex.EncodeToString(got) != tt.okm {
				t.Errorf("%s: got %x", name, got)
			}
			return nil
		})
	}
}

func TestMasterSecretFiles(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "master")
	if _, err := LoadMasterSecret(path); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("a missing file: %v", err)
	}
	if err := InitMasterSecret(path); err != nil {
		t.Fatal(err)
	}
	before, _ := os.ReadFile(path)
	if len(before) != NewMasterSecret {
		t.Fatalf("%d bytes", len(before))
	}
	if err := InitMasterSecret(path); !errors.Is(err, fs.ErrExist) {
		t.Fatalf("a second one: %v", err)
	}
	if after, _ := os.ReadFile(path); !bytes.Equal(before, after) {
		t.Fatal("the master secret was overwritten")
	}
	s, err := LoadMasterSecret(path)
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
	for _, mode := range []os.FileMode{0o644, 0o640, 0o604, 0o620} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		if _, err := LoadMasterSecret(path); !errors.Is(err, config.ErrInvalid) {
			t.Errorf("mode %04o: %v", mode, err)
		}
	}
	for name, size := range map[string]int{"empty": 0, "short": 15, "endless": 129} {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, make([]byte, size), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := LoadMasterSecret(p); !errors.Is(err, secret.ErrSize) {
			t.Errorf("%s: %v", name, err)
		}
	}
	t.Setenv("CREDENTIALS_DIRECTORY", dir)
	if _, err := LoadCredential("../" + filepath.Base(dir) + "/master"); err == nil {
		t.Error("a credential's name with a slash was accepted")
	}
	if _, err := LoadCredential("master"); err != nil {
		t.Errorf("credential: %v", err)
	}
}

// TestConstellationsKeysComeBack compares with values that another language's
// HKDF gave. There, the length is no input of the derivation.
func TestConstellationsKeysComeBack(t *testing.T) {
	const id = "6f1d3a52-1c6b-4f0c-9a53-0d8a4a6b7c11"
	for _, tt := range []struct {
		salt   string
		volume string
		length int
		want   string
	}{
		{"", id, 32, "7028e6118b4b2749c36bc2fe4835416802aae4845d8b55c439fea5243134a771"},
		{"some salt", id, 32, "632939e484bd968ef833bb5391f7e1cf747409f0c3cc103eb48542c59fc9ab19"},
		{"", id, 64, "7028e6118b4b2749c36bc2fe4835416802aae4845d8b55c439fea5243134a771f1f8c62e43a53b11c1e730432bf104fa8e13fa07230109d3b781f05ee1c50204"},
		{"", id, 16, "7028e6118b4b2749c36bc2fe48354168"},
	} {
		master, err := secret.From([]byte(testMaster))
		if err != nil {
			t.Fatal(err)
		}
		k, err := New(Options{MasterSecret: master, Salt: []byte(tt.salt), Derivation: Constellation})
		if err != nil {
			t.Fatal(err)
		}
		b := kms.Binding{VolumeID: tt.volume, Purpose: kms.VolumeDEK, Version: 1, Length: tt.length}
		key, w, err := k.Generate(t.Context(), b)
		if err != nil {
			t.Fatal(err)
		}
		_ = key.Use(func(got []byte) error {
			if hex.EncodeToString(got) != tt.want {
				t.Errorf("salt %q length %d: got %x", tt.salt, tt.length, got)
			}
			return nil
		})
		if again, err := k.Unwrap(t.Context(), b, w); err != nil || !again.Equal(key) {
			t.Errorf("the key does not come back: %v", err)
		}
		if _, err := newKMS(t, testMaster, tt.salt).Unwrap(t.Context(), b, w); !errors.Is(err, kms.ErrWrongKey) {
			t.Errorf("without the option: %v", err)
		}
		for name, change := range map[string]func(*kms.Binding){
			"another version":     func(b *kms.Binding) { b.Version = 2 },
			"a name with a slash": func(b *kms.Binding) { b.VolumeID = "a/b" },
		} {
			bad := b
			change(&bad)
			if _, _, err := k.Generate(t.Context(), bad); !errors.Is(err, kms.ErrBinding) {
				t.Errorf("%s: %v", name, err)
			}
		}
		// Two volume IDs never have one key (case 31).
		for _, other := range []string{strings.ToUpper(id), strings.ReplaceAll(id, "-", ""), "data-1"} {
			b.VolumeID = other
			another, _, err := k.Generate(t.Context(), b)
			if err != nil {
				t.Fatal(err)
			}
			if another.Equal(key) {
				t.Errorf("%q has the key of %q", other, id)
			}
			another.Close()
		}
	}
	master, err := secret.From([]byte(testMaster))
	if err != nil {
		t.Fatal(err)
	}
	defer master.Close()
	if _, err := New(Options{MasterSecret: master, Derivation: "another"}); err == nil {
		t.Error("an unknown derivation is accepted")
	}
}
