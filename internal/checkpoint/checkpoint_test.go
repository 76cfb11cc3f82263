package checkpoint

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"errors"
	"os"
	"strings"
	"testing"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/keyagent/keyagent/internal/secret"
)

func must[T any](t testing.TB) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func signer(t testing.TB, b byte) *Signer {
	t.Helper()
	seed := must[*secret.Bytes](t)(secret.From(bytes.Repeat([]byte{b}, 32)))
	t.Cleanup(func() { seed.Close() })
	return must[*Signer](t)(NewSigner(seed, sha256.Sum256([]byte("the first line"))))
}

// The vector of docs/spec/audit.md, which Go's own reader of signed notes verifies.
func TestACheckpointIsASignedNote(t *testing.T) {
	s := signer(t, 7)
	c := must[*Signed](t)(s.Sign(1000, tlog.RecordHash([]byte("root"))))
	key := must[string](t)(VerifierKey(c.Log, s.Public()))
	want := must[[]byte](t)(os.ReadFile("testdata/vector.txt"))
	if got := string(c.Note) + "\n" + key + "\n"; got != string(want) {
		t.Errorf("it is\n%s", got)
	}
	v := must[note.Verifier](t)(note.NewVerifier(key))
	if n, err := note.Open(c.Note, note.VerifierList(v)); err != nil || !strings.HasPrefix(n.Text, "keyagent-audit-") {
		t.Errorf("%v, %v", n, err)
	}
	again := must[*Signed](t)(Parse(s.Public(), c.Note))
	if again.Checkpoint != c.Checkpoint || !bytes.Equal(again.Signature, c.Signature) || !bytes.Equal(again.Note, c.Note) {
		t.Errorf("%+v", again)
	}
	if restored := must[*Signed](t)(Restore(s.Public(), c.Checkpoint, c.Signature)); !bytes.Equal(restored.Note, c.Note) {
		t.Errorf("%s", restored.Note)
	}
	id, public, err := ParseVerifierKey(key + "\n")
	if err != nil || id != c.Log || !public.Equal(s.Public()) {
		t.Errorf("%v, %v", id, err)
	}
}

func TestWhatIsNoCheckpointIsRefused(t *testing.T) {
	s := signer(t, 7)
	c := must[*Signed](t)(s.Sign(1000, tlog.RecordHash([]byte("root"))))
	good := string(c.Note)
	other := must[*Signed](t)(signer(t, 8).Sign(1000, c.Root))
	signed := func(text string) string { // with the right key
		v := must[note.Verifier](t)(verifier(c.Log.Origin(), s.Public()))
		var sig []byte
		if err := s.use(func(k ed25519.PrivateKey) { sig = ed25519.Sign(k, []byte(text)) }); err != nil {
			t.Fatal(err)
		}
		n := string(write(c.Checkpoint, v, sig))
		return text + n[strings.Index(n, "\n\n")+1:]
	}
	text := c.text()
	if _, err := Parse(s.Public(), []byte(signed(text))); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		note string
		want error
	}{
		"nothing":            {"", ErrFormat},
		"no signature":       {text, ErrFormat},
		"another's":          {string(other.Note), ErrSignature},
		"another size":       {strings.Replace(good, "\n1000\n", "\n1001\n", 1), ErrSignature},
		"cut":                {good[:len(good)-2], ErrFormat},
		"long":               {good + strings.Repeat("— x AAAAAAA=\n", 60), ErrFormat},
		"no entries":         {signed(strings.Replace(text, "\n1000\n", "\n0\n", 1)), ErrFormat},
		"a negative size":    {signed(strings.Replace(text, "\n1000\n", "\n-5\n", 1)), ErrFormat},
		"a size with a plus": {signed(strings.Replace(text, "\n1000\n", "\n+1000\n", 1)), ErrFormat},
		"a leading zero":     {signed(strings.Replace(text, "\n1000\n", "\n01000\n", 1)), ErrFormat},
		"too large a size":   {signed(strings.Replace(text, "\n1000\n", "\n9223372036854775808\n", 1)), ErrFormat},
		"a short root":       {signed(strings.Replace(text, c.Root.String(), "AAAA", 1)), ErrFormat},
		"one line more":      {signed(text + "more\n"), ErrFormat},
		"one line less":      {signed(strings.Replace(text, "1000\n", "", 1)), ErrFormat},
	} {
		if _, err := Parse(s.Public(), []byte(tt.note)); !errors.Is(err, tt.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := Parse(nil, c.Note); !errors.Is(err, ErrFormat) {
		t.Errorf("no key: %v", err)
	}
	// A cosignature of somebody else does no harm, and is not kept.
	with := good + strings.SplitAfter(string(other.Note), "\n\n")[1]
	if got, err := Parse(s.Public(), []byte(with)); err != nil || string(got.Note) != good {
		t.Errorf("with another's signature: %v", err)
	}
	for _, key := range []string{"", "x", "keyagent-audit-00+12345678+AAAA", must[string](t)(note.NewEd25519VerifierKey("somebody", s.Public()))} {
		if _, _, err := ParseVerifierKey(key); !errors.Is(err, ErrFormat) {
			t.Errorf("key %q: %v", key, err)
		}
	}
}

type hashes []tlog.Hash

func (s hashes) ReadHashes(indexes []int64) ([]tlog.Hash, error) {
	out := make([]tlog.Hash, len(indexes))
	for i, x := range indexes {
		out[i] = s[x]
	}
	return out, nil
}

func TestALogThatWentBackOrWasForkedIsNoticed(t *testing.T) {
	log := ID{1}
	var all, fork hashes
	for i := range int64(20) {
		line := []byte{byte(i)}
		all = append(all, must[[]tlog.Hash](t)(tlog.StoredHashes(i, line, all))...)
		if i >= 9 {
			line = append(line, 'x')
		}
		fork = append(fork, must[[]tlog.Hash](t)(tlog.StoredHashes(i, line, fork))...)
	}
	at := func(h hashes, n int64) Checkpoint { return Checkpoint{log, n, must[tlog.Hash](t)(tlog.TreeHash(n, h))} }
	proof := func(h hashes, to, from int64) (out [][]byte) {
		for _, p := range must[tlog.TreeProof](t)(tlog.ProveTree(to, from, h)) {
			out = append(out, p[:])
		}
		return out
	}
	for name, tt := range map[string]struct {
		now, old Checkpoint
		proof    [][]byte
		ok       bool
	}{
		"it goes on":             {at(all, 20), at(all, 10), proof(all, 20, 10), true},
		"nothing happened":       {at(all, 10), at(all, 10), nil, true},
		"it went back":           {at(all, 9), at(all, 10), proof(all, 10, 9), false},
		"another of that size":   {at(fork, 10), at(all, 10), nil, false},
		"forked, and longer":     {at(fork, 20), at(all, 10), proof(fork, 20, 10), false},
		"the proof of the other": {at(fork, 20), at(all, 10), proof(all, 20, 10), false},
		"no proof":               {at(all, 20), at(all, 10), nil, false},
		"half a hash":            {at(all, 20), at(all, 10), [][]byte{make([]byte, 31)}, false},
		"a long proof":           {at(all, 20), at(all, 10), make([][]byte, 127), false},
		"two logs":               {Checkpoint{ID{2}, 20, at(all, 20).Root}, at(all, 10), proof(all, 20, 10), false},
		"the fork is later":      {at(fork, 20), at(all, 9), proof(fork, 20, 9), true},
	} {
		err := tt.now.Follows(tt.old, tt.proof)
		if (err == nil) != tt.ok || err != nil && !errors.Is(err, ErrBack) {
			t.Errorf("%s: %v", name, err)
		}
		if err != nil && (!strings.Contains(err.Error(), tt.now.String()) || !strings.Contains(err.Error(), tt.old.String())) {
			t.Errorf("%s: not both are named: %v", name, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	s := signer(f, 7)
	c := must[*Signed](f)(s.Sign(1000, tlog.Hash{1}))
	f.Add(c.Note)
	f.Add([]byte("keyagent-audit-00\n1\nAAAA\n\n— x y\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		got, err := Parse(s.Public(), data)
		if err == nil && (got.Checkpoint != c.Checkpoint || !bytes.Equal(got.Note, c.Note)) {
			t.Errorf("%q is a checkpoint", data)
		}
		// Below the signature.
		if c, err := parseText(string(data)); err == nil && c.text() != string(data) {
			t.Errorf("%q is read as %q", data, c.text())
		}
	})
}
