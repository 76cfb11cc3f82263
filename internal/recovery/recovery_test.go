package recovery

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"strings"
	"testing"
	"time"

	"filippo.io/age"
	"github.com/hiddeco/sshsig"
	"golang.org/x/crypto/ssh"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func signer(t testing.TB) (ssh.Signer, string) {
	t.Helper()
	_, private, err := ed25519.GenerateKey(rand.Reader)
	must(t, err)
	s, err := ssh.NewSignerFromKey(private)
	must(t, err)
	return s, string(ssh.MarshalAuthorizedKey(s.PublicKey()))
}

func sign(t testing.TB, s ssh.Signer, message []byte, namespace string) []byte {
	t.Helper()
	sig, err := sshsig.Sign(bytes.NewReader(message), s, sshsig.HashSHA512, namespace)
	must(t, err)
	return sshsig.Armor(sig)
}

var noon = time.Date(2026, 11, 28, 12, 0, 0, 0, time.UTC)

func request(t testing.TB) Request {
	t.Helper()
	id, err := age.GenerateX25519Identity()
	must(t, err)
	r, err := New(Request{Service: "0011223344556677", Volume: "data-1", Generation: 1, KeyVersion: 2, Reason: "the disk is read elsewhere, case 7",
		Recipient: id.Recipient().String(), From: noon, Until: noon.Add(4 * time.Hour)})
	must(t, err)
	return r
}

func TestARequestIsWhatWasMade(t *testing.T) {
	r := request(t)
	data, err := r.Encode()
	must(t, err)
	if got, err := Parse(data); err != nil || got != r {
		t.Errorf("%+v, %v", got, err)
	}
	for name, change := range map[string]func(*Request){
		"another version": func(r *Request) { r.Version = 2 },
		"no volume":       func(r *Request) { r.Volume = "" },
		"no reason":       func(r *Request) { r.Reason = "  " },
		"two lines":       func(r *Request) { r.Reason = "a\nb" },
		"a long reason":   func(r *Request) { r.Reason = strings.Repeat("x", maxReason+1) },
		"no recipient":    func(r *Request) { r.Recipient = "somebody" },
		"no time":         func(r *Request) { r.Until = r.From },
		"backwards":       func(r *Request) { r.Until = r.From.Add(-time.Hour) },
		"two days":        func(r *Request) { r.Until = r.From.Add(48 * time.Hour) },
		"no nonce":        func(r *Request) { r.Nonce = "" },
		"no service":      func(r *Request) { r.Service = "" },
	} {
		bad := r
		change(&bad)
		data, err := bad.Encode()
		must(t, err)
		if _, err := Parse(data); !errors.Is(err, ErrRequest) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, bad := range map[string][]byte{
		"more fields": bytes.Replace(data, []byte(`"version"`), []byte(`"x": 1, "version"`), 1), "blanks": append(data, ' '),
		"a field twice": bytes.Replace(data, []byte(`"version": 1,`), []byte(`"version": 1, "version": 1,`), 1), "nothing": nil, "much": make([]byte, MaxRequest+1),
	} {
		if _, err := Parse(bad); !errors.Is(err, ErrRequest) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for at, want := range map[time.Duration]error{-time.Second: ErrWindow, 0: nil, 4*time.Hour - 1: nil, 4 * time.Hour: ErrWindow} {
		if err := r.At(noon.Add(at)); !errors.Is(err, want) {
			t.Errorf("%s: %v", at, err)
		}
	}
}

func TestEnoughOperatorsApprove(t *testing.T) {
	var operators []Operator
	var signers []ssh.Signer
	for _, name := range []string{"alice", "bob", "carol"} {
		s, key := signer(t)
		signers, operators = append(signers, s), append(operators, Operator{name, key})
	}
	b, err := NewBoard(2, operators)
	must(t, err)
	data, err := request(t).Encode()
	must(t, err)
	other, err := request(t).Encode()
	must(t, err)
	stranger, _ := signer(t)
	one, three := sign(t, signers[0], data, Namespace), sign(t, signers[2], data, Namespace)
	if names, err := b.Approved(data, [][]byte{three, one}); err != nil || strings.Join(names, " ") != "alice carol" {
		t.Errorf("%v, %v", names, err)
	}
	for name, c := range map[string]struct {
		with [][]byte
		want error
	}{
		"nobody":                 {nil, ErrTooFew},
		"one":                    {[][]byte{one}, ErrTooFew},
		"one twice":              {[][]byte{one, one}, ErrTooFew},
		"one, by two signatures": {[][]byte{one, sign(t, signers[0], data, Namespace)}, ErrTooFew},
		"a stranger":             {[][]byte{one, three, sign(t, stranger, data, Namespace)}, ErrApproval},
		"of another request":     {[][]byte{one, sign(t, signers[1], other, Namespace)}, ErrApproval},
		"for another purpose":    {[][]byte{one, sign(t, signers[1], data, "file")}, ErrApproval},
		"damaged":                {[][]byte{one, three[:len(three)-60]}, ErrApproval},
		"large":                  {[][]byte{one, make([]byte, MaxSignature+1)}, ErrApproval},
		"more than there can be": {make([][]byte, maxOperators+1), ErrApproval},
	} {
		if names, err := b.Approved(data, c.with); !errors.Is(err, c.want) || names != nil {
			t.Errorf("%s: %v, %v", name, names, err)
		}
	}
	for name, c := range map[string]struct {
		threshold int
		who       []Operator
	}{
		"one alone": {1, operators}, "more than there are": {4, operators}, "nobody": {2, nil},
		"a key twice": {2, []Operator{operators[0], {"eve", operators[0].Key}}}, "a name twice": {2, []Operator{operators[0], {"alice", operators[1].Key}}},
		"no key": {2, []Operator{operators[0], {"eve", "hunter2"}}}, "no name": {2, []Operator{operators[0], {"", operators[1].Key}}},
		"options": {2, []Operator{operators[0], {"eve", "no-pty " + operators[1].Key}}},
	} {
		if _, err := NewBoard(c.threshold, c.who); !errors.Is(err, ErrOperators) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzRequest(f *testing.F) {
	data, err := request(f).Encode()
	must(f, err)
	f.Add(data)
	f.Add([]byte("{}"))
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := Parse(data)
		if err != nil && !errors.Is(err, ErrRequest) {
			t.Fatal(err)
		}
		if again, encErr := r.Encode(); err == nil && (encErr != nil || !bytes.Equal(again, data)) {
			t.Fatalf("%q", data)
		}
	})
}

func FuzzApproval(f *testing.F) {
	s, key := signer(f)
	_, other := signer(f)
	b, err := NewBoard(2, []Operator{{"alice", key}, {"bob", other}})
	must(f, err)
	f.Add(sign(f, s, []byte("x"), Namespace))
	f.Fuzz(func(t *testing.T, sig []byte) {
		if _, err := b.Approved([]byte("y"), [][]byte{sig, sig}); err == nil {
			t.Fatal("it approves")
		}
	})
}
