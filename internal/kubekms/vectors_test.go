package kubekms

import (
	"bytes"
	"encoding/hex"
	"errors"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/keyagent/keyagent/internal/secret"
)

// counting returns the KEK 00, 01, 02 and so on.
func counting(t testing.TB, n int) *key {
	t.Helper()
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i)
	}
	return keyOf(t, string(b))
}

func secretOf(t testing.TB, s string) *secret.Bytes {
	t.Helper()
	b, err := secret.From([]byte(s))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func keyOf(t testing.TB, s string) *key {
	t.Helper()
	k, err := newKey(secretOf(t, s))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.secret.Close() })
	return k
}

// vectors are the rows of the specification's tables with so many cells.
func vectors(t *testing.T, cells int) [][]string {
	t.Helper()
	text, err := os.ReadFile("../../docs/spec/kubekms-envelope.md")
	if err != nil {
		t.Fatal(err)
	}
	var out [][]string
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSpace(line)
		if !strings.HasPrefix(line, "|") || !strings.HasSuffix(line, "|") {
			continue
		}
		row := strings.Split(strings.Trim(line, "|"), "|")
		for i := range row {
			row[i] = strings.Trim(strings.TrimSpace(row[i]), "`")
		}
		if _, err := strconv.Atoi(row[0]); err == nil && len(row) == cells {
			out = append(out, row)
		}
	}
	return out
}

func unhex(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestTheVectorsOfTheEnvelopeSpecificationOpen opens what another language made.
func TestTheVectorsOfTheEnvelopeSpecificationOpen(t *testing.T) {
	rows := vectors(t, 5)
	if len(rows) != 4 {
		t.Fatalf("%d vectors were found", len(rows))
	}
	for _, row := range rows {
		n, _ := strconv.Atoi(row[0])
		k := counting(t, n)
		if k.id != row[1] {
			t.Errorf("KEK of %d bytes: the key_id is %s", n, k.id)
		}
		plain, err := k.open(purpose(row[2]), unhex(t, row[4]))
		if want := unhex(t, strings.Trim(row[3], "-")); err != nil || !bytes.Equal(plain, want) {
			t.Errorf("%v: %x, %v", row[:3], plain, err)
		}
		for _, p := range []purpose{purposeV1, purposeV2, "kms v3"} {
			if string(p) != row[2] {
				if _, err := k.open(p, unhex(t, row[4])); !errors.Is(err, ErrDecrypt) {
					t.Errorf("%v opens as %s: %v", row[:3], p, err)
				}
			}
		}
	}
}

// TestTheVectorsOf2018Open opens what OpenSSL's command line made.
func TestTheVectorsOf2018Open(t *testing.T) {
	rows := vectors(t, 3)
	if len(rows) != 7 {
		t.Fatalf("%d vectors were found", len(rows))
	}
	iv := unhex(t, "f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff")
	for _, row := range rows {
		n, _ := strconv.Atoi(row[0])
		blob := append(append([]byte(legacyPrefix), iv...), unhex(t, row[2])...)
		plain, err := openLegacy([]*key{counting(t, n)}, blob)
		if err != nil || string(plain) != row[1] {
			t.Errorf("%v: %q, %v", row[:2], plain, err)
		}
	}
}

// TestWhatTheDaemonsOf2018WroteOpens opens their own ciphertexts.
func TestWhatTheDaemonsOf2018WroteOpens(t *testing.T) {
	rows := vectors(t, 4)
	if len(rows) != 12 {
		t.Fatalf("%d vectors were found", len(rows))
	}
	for _, row := range rows {
		n, _ := strconv.Atoi(row[0])
		kek := make([]byte, n)
		for i := range kek {
			kek[i] = byte(i)
		}
		r := ringOf(t, AESCBC, string(kek))
		plain, err := r.decrypt(purposeV1, unhex(t, row[3]), "")
		if err != nil || string(plain) != row[2] {
			t.Errorf("%v: %q, %v", row[:3], plain, err)
		}
	}
}

func TestAKeyIDSaysNothingAndIsUnique(t *testing.T) {
	seen := map[string]bool{}
	for _, n := range []int{16, 24, 32} {
		k := counting(t, n)
		if len(k.id) != 2*idLength || seen[k.id] {
			t.Errorf("KEK of %d bytes: %q", n, k.id)
		}
		seen[k.id] = true
		id, err := KeyID(k.secret)
		if err != nil || id != k.id {
			t.Errorf("%q, %v", id, err)
		}
	}
	for _, n := range []int{1, 15, 17, 31, 33, 64} {
		s := secretOf(t, strings.Repeat("x", n))
		if _, err := newKey(s); !errors.Is(err, ErrSource) {
			t.Errorf("KEK of %d bytes: %v", n, err)
		}
		if err := s.Use(func([]byte) error { return nil }); !errors.Is(err, secret.ErrClosed) {
			t.Errorf("a refused KEK of %d bytes is still there", n)
		}
	}
}
