package saved

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"google.golang.org/protobuf/proto"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
)

// kind is hardware of this test, which answers questions that it asked itself.
type kind struct {
	name   attestation.Kind
	secret []byte
}

func (k kind) Kind() attestation.Kind                             { return k.name }
func (k kind) Begin(context.Context) (attestation.Attempt, error) { return attempt{k}, nil }

type attempt struct{ k kind }

func (a attempt) Offer() []byte { return []byte("offer of " + a.k.name) }
func (a attempt) Close() error  { return nil }
func (a attempt) SelfAsk(pcrs []uint32) ([]byte, []byte, error) {
	return []byte{byte(len(pcrs))}, a.k.secret, nil
}
func (a attempt) Evidence(_ context.Context, ask []byte, b attestation.Binder) ([]byte, error) {
	return slices.Concat(ask, b[:]), nil
}

// verifier sees what was asked through Restore.
type verifier struct{ kind }

func (v verifier) Begin(context.Context, []byte) (attestation.Question, error) {
	return nil, errors.New("a question of a file is asked again, not anew")
}

func (v verifier) Restore(_ context.Context, offer, ask, secret []byte) (attestation.Question, error) {
	if string(offer) != "offer of "+string(v.name) || string(secret) != string(v.secret) {
		return nil, attestation.ErrRefused
	}
	return question{v.name, ask}, nil
}

type question struct {
	kind attestation.Kind
	ask  []byte
}

func (q question) Ask() []byte { return q.ask }

func (q question) Verify(_ context.Context, evidence []byte, b attestation.Binder) ([]attestation.Claims, error) {
	if !slices.Equal(evidence, slices.Concat(q.ask, b[:])) {
		return nil, attestation.ErrRefused
	}
	return []attestation.Claims{{Kind: q.kind}}, nil
}

func collected(t testing.TB) *attestv1.Saved {
	t.Helper()
	s, err := Collect(t.Context(), []attestation.Issuer{kind{"a", []byte("sa")}, kind{"b", nil}}, []uint32{0, 7})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestEvidenceComesBackFromItsFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "evidence.json")
	if err := Write(path, collected(t)); err != nil {
		t.Fatal(err)
	}
	s, err := Read(path)
	if err != nil || !slices.Equal(Kinds(s), []attestation.Kind{"a", "b"}) {
		t.Fatalf("%v, %v", s, err)
	}
	claims, err := Verify(t.Context(), []attestation.Verifier{verifier{kind{"b", nil}}, verifier{kind{"a", []byte("sa")}}}, s)
	if err != nil || len(claims) != 2 || claims[0].Kind != "b" {
		t.Errorf("%v, %v", claims, err)
	}
	if _, err := Verify(t.Context(), []attestation.Verifier{verifier{kind{"c", nil}}}, s); !errors.Is(err, attestation.ErrRefused) {
		t.Errorf("a kind that is not there: %v", err)
	}
	s.Binder[0] ^= 1
	if _, err := Verify(t.Context(), []attestation.Verifier{verifier{kind{"b", nil}}}, s); !errors.Is(err, attestation.ErrRefused) {
		t.Errorf("over another binder: %v", err)
	}
}

func TestAFileThatIsNotWholeIsRefused(t *testing.T) {
	for name, change := range map[string]func(*attestv1.Saved){
		"another version":     func(s *attestv1.Saved) { s.Version++ },
		"no binder":           func(s *attestv1.Saved) { s.Binder = nil },
		"nothing":             func(s *attestv1.Saved) { *s = attestv1.Saved{Version: 1, Binder: s.Binder} },
		"an offer short":      func(s *attestv1.Saved) { s.Offers = s.Offers[:1] },
		"a question short":    func(s *attestv1.Saved) { s.Asks = s.Asks[:1] },
		"a secret short":      func(s *attestv1.Saved) { s.CredentialSecrets = s.CredentialSecrets[:1] },
		"one kind twice":      func(s *attestv1.Saved) { s.Items[1], s.Offers[1], s.Asks[1] = s.Items[0], s.Offers[0], s.Asks[0] },
		"kinds that disagree": func(s *attestv1.Saved) { s.Offers[0], s.Offers[1] = s.Offers[1], s.Offers[0] },
	} {
		s := proto.Clone(collected(t)).(*attestv1.Saved)
		change(s)
		if err := Check(s); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v", name, err)
		}
		path := filepath.Join(t.TempDir(), "evidence.json")
		if err := Write(path, s); err != nil {
			t.Fatal(err)
		}
		if _, err := Read(path); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s, from a file: %v", name, err)
		}
	}
	if _, err := Read(filepath.Join(t.TempDir(), "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%v", err)
	}
}

func TestEvidenceWithoutAnExchangeIsWrapped(t *testing.T) {
	s := Of("raw", []byte("report"), attestation.Binder{7})
	if err := Check(s); err != nil || s.Binder[0] != 7 || string(s.Items[0].Data) != "report" {
		t.Errorf("%v, %v", s, err)
	}
}

// FuzzRead: whatever a file holds, it is whole or refused.
func FuzzRead(f *testing.F) {
	path := filepath.Join(f.TempDir(), "evidence.json")
	s, err := Collect(context.Background(), []attestation.Issuer{kind{"a", []byte("sa")}}, []uint32{0})
	if err != nil {
		f.Fatal(err)
	}
	if err := Write(path, s); err != nil {
		f.Fatal(err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add([]byte("{}"))
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := Parse(data)
		if err != nil {
			if !errors.Is(err, ErrMalformed) {
				t.Fatal(err)
			}
			return
		}
		if len(Kinds(s)) == 0 || len(s.Binder) != attestation.BinderSize {
			t.Fatalf("%v is whole", s)
		}
	})
}
