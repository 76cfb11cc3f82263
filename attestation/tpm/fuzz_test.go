package tpm

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"flag"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"google.golang.org/protobuf/proto"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/certificate"
	"github.com/keyagent/keyagent/attestation/saved"
	"github.com/keyagent/keyagent/test/sim/swtpm"
)

var update = flag.Bool("update", false, "make testdata/saved.bin and testdata/root.der anew, with a new TPM")

// genuineExchange is one exchange with a real TPM, and who vouches for it.
func genuineExchange(t testing.TB) (*attestv1.Saved, *Verifier) {
	t.Helper()
	s := &attestv1.Saved{}
	unmarshal(t, must[[]byte](t)(os.ReadFile("testdata/saved.bin")), s)
	root := must[*x509.Certificate](t)(x509.ParseCertificate(must[[]byte](t)(os.ReadFile("testdata/root.der"))))
	trust := Trust{Roots: []Root{{Name: "lab", Certificate: root}}, PCRs: []uint32{0, 4, 7, 11}}
	v, err := NewVerifier(VerifierOptions{Trust: func() Trust { return trust },
		Now: func() time.Time { return root.NotBefore.Add(24 * time.Hour) }})
	if err != nil {
		t.Fatal(err)
	}
	return s, v
}

func TestSavedEvidenceVerifies(t *testing.T) {
	if *update {
		p := swtpm.New(t, nil)
		log, _ := genuineLog(t)
		_, events := split(t, log)
		replayInto(t, p, events)
		s, err := saved.Collect(t.Context(), []attestation.Issuer{newIssuer(t, p, IssuerOptions{EventLog: "testdata/ovmf.eventlog"})}, []uint32{0, 4, 7, 11})
		if err != nil {
			t.Fatal(err)
		}
		root := must[*x509.Certificate](t)(p.Authority.Issuer())
		for path, data := range map[string][]byte{"testdata/saved.bin": marshal(t, s), "testdata/root.der": root.Raw} {
			if err := os.WriteFile(path, data, 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	s, v := genuineExchange(t)
	all, err := saved.Verify(t.Context(), []attestation.Verifier{v}, s)
	if err != nil {
		t.Fatal(err)
	}
	c := all[0]
	if c.Trust != "root:lab" || len(c.Measurements["pcr4"].Events) == 0 {
		t.Fatalf("%+v, %v", c, err)
	}
	if sum := must[*Summary](t)(Summarize(s.Offers[0].Data, s.Asks[0].Data, s.Items[0].Data)); sum.EK != c.Identity || len(sum.PCRs) != 4 {
		t.Errorf("%+v", sum)
	}
	for name, change := range map[string]func(*attestv1.Saved){
		"another version":    func(s *attestv1.Saved) { s.Version++ },
		"no binder":          func(s *attestv1.Saved) { s.Binder = nil },
		"no evidence":        func(s *attestv1.Saved) { s.Items = nil },
		"evidence twice":     func(s *attestv1.Saved) { s.Items = append(s.Items, s.Items[0]) },
		"of another kind":    func(s *attestv1.Saved) { s.Items[0].Kind = "other" },
		"no credential":      func(s *attestv1.Saved) { s.CredentialSecrets[0] = nil },
		"another credential": func(s *attestv1.Saved) { s.CredentialSecrets[0] = make([]byte, 32) },
		"another binder":     func(s *attestv1.Saved) { s.Binder = make([]byte, 64) },
		"fewer PCRs asked for": func(s *attestv1.Saved) {
			s.Asks[0].Data = change(t, s.Asks[0].Data, &attestv1.TPMAsk{}, func(a *attestv1.TPMAsk) { a.Pcrs = a.Pcrs[1:] })
		},
	} {
		other := proto.Clone(s).(*attestv1.Saved)
		change(other)
		if _, err := saved.Verify(t.Context(), []attestation.Verifier{v}, other); !errors.Is(err, attestation.ErrRefused) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// refusedOr fails unless err is a refusal: hostile bytes are never a fault of
// the verifier's own side.
func refusedOr(t *testing.T, err error) {
	t.Helper()
	if err != nil && !errors.Is(err, attestation.ErrRefused) {
		t.Fatalf("a nameless error: %v", err)
	}
}

func FuzzOffer(f *testing.F) {
	s, v := genuineExchange(f)
	f.Add(s.GetOffers()[0].GetData())
	f.Fuzz(func(t *testing.T, data []byte) {
		q, err := v.Begin(context.Background(), data)
		refusedOr(t, err)
		if err == nil && len(q.Ask()) == 0 {
			t.Fatal("accepted, and nothing is asked")
		}
	})
}

// FuzzEvidence: only the genuine values are ever accepted.
func FuzzEvidence(f *testing.F) {
	s, v := genuineExchange(f)
	want, err := saved.Verify(context.Background(), []attestation.Verifier{v}, s)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(s.GetItems()[0].GetData())
	f.Fuzz(func(t *testing.T, data []byte) {
		other := proto.Clone(s).(*attestv1.Saved)
		other.Items[0].Data = data
		got, err := saved.Verify(context.Background(), []attestation.Verifier{v}, other)
		refusedOr(t, err)
		for _, c := range got {
			for name, m := range c.Measurements {
				if !bytes.Equal(m.Value, want[0].Measurements[name].Value) {
					t.Fatalf("%s is %x", name, m.Value)
				}
			}
		}
	})
}

// FuzzQuote changes the two signed structures by themselves.
func FuzzQuote(f *testing.F) {
	s, v := genuineExchange(f)
	var e attestv1.TPMEvidence
	unmarshal(f, s.GetItems()[0].GetData(), &e)
	f.Add(e.GetAttest(), e.GetSignature())
	f.Fuzz(func(t *testing.T, attest, signature []byte) {
		if parsed, err := parse[tpm2.TPMSAttest]("attest", attest, maxAttest); err == nil {
			if info, err := parsed.Attested.Quote(); err == nil {
				_, err := coveredPCRs(info, []uint32{0, 4, 7, 11}, e.GetPcrValues())
				refusedOr(t, err)
			}
		}
		other := proto.Clone(s).(*attestv1.Saved)
		changed := proto.Clone(&e).(*attestv1.TPMEvidence)
		changed.Attest, changed.Signature = attest, signature
		other.Items[0].Data = marshal(t, changed)
		_, err := saved.Verify(context.Background(), []attestation.Verifier{v}, other)
		refusedOr(t, err)
		if err == nil && !bytes.Equal(attest, e.GetAttest()) {
			t.Fatal("another structure is accepted")
		}
	})
}

func FuzzEKCertificate(f *testing.F) {
	s, _ := genuineExchange(f)
	var o attestv1.TPMOffer
	unmarshal(f, s.GetOffers()[0].GetData(), &o)
	f.Add(o.GetEkCertificate())
	f.Fuzz(func(t *testing.T, der []byte) {
		leaf, err := parseEKCertificate(der)
		refusedOr(t, err)
		if err == nil && (leaf.IsCA || len(leaf.UnhandledCriticalExtensions) > 0) {
			t.Fatalf("accepted: CA %v, unhandled %v", leaf.IsCA, leaf.UnhandledCriticalExtensions)
		}
		_ = certificate.Unwrap(der)
	})
}

// FuzzEventLog: events that come out always lead to the value.
func FuzzEventLog(f *testing.F) {
	log, values := genuineLog(f)
	f.Add(log)
	head, events := split(f, log)
	for i := range events {
		f.Add(join(head, events[i:i+1]))
	}
	f.Fuzz(func(t *testing.T, log []byte) {
		parsed, err := ParseEventLog(log)
		refusedOr(t, err)
		if err != nil {
			return
		}
		for pcr, value := range values {
			events, err := parsed.Explain(pcr, value)
			refusedOr(t, err)
			if len(events) == 0 || err != nil {
				continue
			}
			again, _, err := parsed.Replay(pcr)
			if err != nil {
				t.Fatal(err)
			}
			// Words of user space may follow.
			for _, e := range events[len(events)-min(len(events), 6):] {
				if bytes.Equal(again, value) {
					break
				}
				if e.Seq == 0 {
					digest, _ := hex.DecodeString(e.Digest)
					again = Extend(again, digest)
				}
			}
			if !bytes.Equal(again, value) {
				t.Fatalf("pcr %d: %x explained, %x replayed", pcr, value, again)
			}
		}
	})
}

// FuzzUserspaceLog: what systemd wrote, or somebody else. Events that come out
// always lead to the value.
func FuzzUserspaceLog(f *testing.F) {
	log, values := genuineLog(f)
	f.Add([]byte("\x1e{\"pcr\":11,\"digests\":[{\"hashAlg\":\"sha256\",\"digest\":\"" + strings.Repeat("00", 32) + "\"}],\"content_type\":\"systemd\",\"content\":{\"eventType\":\"phase\",\"string\":\"x\"}}\n"))
	f.Add([]byte("{}\x1e{\"nv_index\":1}"))
	f.Fuzz(func(t *testing.T, user []byte) {
		parsed := must[*EventLog](t)(ParseEventLog(log))
		err := parsed.AddUserspace(user)
		refusedOr(t, err)
		if err != nil {
			return
		}
		for pcr, value := range values {
			if _, err := parsed.Explain(pcr, value); err != nil {
				t.Fatalf("pcr %d: a log of user space hides the firmware's: %v", pcr, err)
			}
			if _, _, err := parsed.Replay(pcr); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// noTPM is a device that answers nothing.
type noTPM struct{}

func (noTPM) Send([]byte) ([]byte, error) { return nil, errors.New("no TPM") }
func (noTPM) Close() error                { return nil }

// FuzzAsk: a verifier's question, as the machine reads it. An answer needs the
// TPM, which is not there.
func FuzzAsk(f *testing.F) {
	s, _ := genuineExchange(f)
	f.Add(s.GetAsks()[0].GetData())
	f.Fuzz(func(t *testing.T, data []byte) {
		a := &attempt{taken: true, tpm: noTPM{}, ek: eks[0], ekey: object{public: p384EKTemplate}}
		if _, err := a.Evidence(context.Background(), data, testBinder); err == nil {
			t.Fatal("evidence without a TPM")
		}
	})
}
