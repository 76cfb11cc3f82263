package tpm

import (
	"context"
	"crypto/sha256"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"google.golang.org/protobuf/proto"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/test/sim/swtpm"
)

var testBinder = attestation.Binder(sum64("a connection"))

func sum64(s string) (b [64]byte) {
	h := sha256.Sum256([]byte(s))
	copy(b[:32], h[:])
	copy(b[32:], h[:])
	return b
}

func newIssuer(t testing.TB, p *swtpm.TPM, opts IssuerOptions) *Issuer {
	t.Helper()
	opts.Device = p.Device
	if opts.EventLog == "" {
		opts.EventLog = t.TempDir() + "/no-log"
	}
	i, err := NewIssuer(opts)
	if err != nil {
		t.Fatal(err)
	}
	return i
}

func trustOf(t testing.TB, p *swtpm.TPM) Trust {
	t.Helper()
	c, err := p.Authority.Issuer()
	if err != nil {
		t.Fatal(err)
	}
	return Trust{Roots: []Root{{Name: "lab", Certificate: c}}, PCRs: []uint32{0, 4, 7, 11}}
}

func newVerifier(t testing.TB, trust Trust) *Verifier {
	t.Helper()
	v, err := NewVerifier(VerifierOptions{Trust: func() Trust { return trust }})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// extendAll gives every PCR that trust asks for a value, as a boot would.
func extendAll(t testing.TB, p *swtpm.TPM, pcrs ...uint32) {
	t.Helper()
	dev, err := OpenDevice(p.Device)
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	for _, n := range pcrs {
		d := sha256.Sum256([]byte{byte(n)})
		if _, err := (tpm2.PCRExtend{
			PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(n), Auth: tpm2.PasswordAuth(nil)},
			Digests:   tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: d[:]}}},
		}).Execute(dev); err != nil {
			t.Fatal(err)
		}
	}
}

// exchange is the whole conversation, with a hand in the middle: each function
// may change what passes.
type exchange struct {
	offer    func(*attestv1.TPMOffer)
	ask      func(*attestv1.TPMAsk)
	evidence func(*attestv1.TPMEvidence)
	binder   attestation.Binder // what the verifier expects, testBinder if zero
}

func (x exchange) run(t testing.TB, i *Issuer, v *Verifier) (attestation.Claims, error) {
	t.Helper()
	ctx := context.Background()
	a, err := i.Begin(ctx)
	if err != nil {
		t.Fatalf("issuer: %v", err)
	}
	defer a.Close()
	offer := change(t, a.Offer(), &attestv1.TPMOffer{}, x.offer)
	q, err := v.Begin(ctx, offer)
	if err != nil {
		return attestation.Claims{}, err
	}
	ask := change(t, q.Ask(), &attestv1.TPMAsk{}, x.ask)
	ev, err := a.Evidence(ctx, ask, testBinder)
	if err != nil {
		return attestation.Claims{}, err
	}
	ev = change(t, ev, &attestv1.TPMEvidence{}, x.evidence)
	if x.binder == (attestation.Binder{}) {
		x.binder = testBinder
	}
	claims, err := q.Verify(ctx, ev, x.binder)
	if err != nil {
		return attestation.Claims{}, err
	}
	return claims[0], nil
}

func change[M proto.Message](t testing.TB, data []byte, m M, f func(M)) []byte {
	t.Helper()
	if f == nil {
		return data
	}
	if err := proto.Unmarshal(data, m); err != nil {
		t.Fatal(err)
	}
	f(m)
	out, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestGenuineEvidenceIsAccepted(t *testing.T) {
	p := swtpm.New(t, nil)
	extendAll(t, p, 0, 4, 7, 11)
	for _, kind := range []EKType{EKAuto, EKRSA2048, EKP384} {
		t.Run(string(kind), func(t *testing.T) {
			c, err := exchange{}.run(t, newIssuer(t, p, IssuerOptions{EK: kind}), newVerifier(t, trustOf(t, p)))
			if err != nil {
				t.Fatal(err)
			}
			if c.Trust != "root:lab" || len(c.Identity) != 64 || len(c.Measurements) != 4 {
				t.Errorf("claims %+v", c)
			}
			want := sha256.Sum256([]byte{4})
			if got := c.Measurements["pcr4"].Value; string(got) != string(Extend(make([]byte, 32), want[:])) {
				t.Errorf("pcr4 is %x", got)
			}
		})
	}
}

func TestAnEnrolledKeyNeedsNoCertificate(t *testing.T) {
	p := swtpm.New(t, nil)
	var digest string
	c, err := exchange{}.run(t, newIssuer(t, p, IssuerOptions{}), newVerifier(t, trustOf(t, p)))
	if err != nil {
		t.Fatal(err)
	}
	digest = c.Identity
	trust := Trust{Enrolled: []Enrolled{{"rack-7", digest}}, PCRs: []uint32{0}}
	strip := func(o *attestv1.TPMOffer) { o.EkCertificate = nil }
	c, err = exchange{offer: strip}.run(t, newIssuer(t, p, IssuerOptions{EKPin: digest}), newVerifier(t, trust))
	if err != nil || c.Trust != "enrolled:rack-7" {
		t.Fatalf("%+v, %v", c, err)
	}
	trust.Enrolled[0].EKDigest = digest[1:] + "0"
	_, err = exchange{offer: strip}.run(t, newIssuer(t, p, IssuerOptions{}), newVerifier(t, trust))
	if !errors.Is(err, ErrEKUntrusted) {
		t.Fatalf("another enrolled key: %v", err)
	}
	if _, err := newIssuer(t, p, IssuerOptions{EKPin: digest[1:] + "0"}).Begin(context.Background()); err == nil {
		t.Fatal("an issuer with another pin began")
	}
}

func TestAnUnsetTrustIsAConfigurationError(t *testing.T) {
	p := swtpm.New(t, nil)
	full := trustOf(t, p)
	for name, trust := range map[string]Trust{
		"nothing at all":         {},
		"no roots (case 20)":     {PCRs: full.PCRs},
		"no PCRs (case 20)":      {Roots: full.Roots},
		"PCRs out of range":      {Roots: full.Roots, PCRs: []uint32{24}},
		"a PCR named twice":      {Roots: full.Roots, PCRs: []uint32{4, 4}},
		"PCRs in no clear order": {Roots: full.Roots, PCRs: []uint32{7, 4}},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := exchange{}.run(t, newIssuer(t, p, IssuerOptions{}), newVerifier(t, trust))
			if !errors.Is(err, ErrConfiguration) || errors.Is(err, attestation.ErrRefused) {
				t.Fatalf("got %v", err)
			}
		})
	}
	if _, err := NewVerifier(VerifierOptions{}); !errors.Is(err, ErrConfiguration) {
		t.Fatalf("a verifier without trust: %v", err)
	}
}

func TestAWrongClockIsNamed(t *testing.T) {
	p := swtpm.New(t, nil)
	trust := trustOf(t, p)
	past := time.Now().AddDate(-10, 0, 0)
	v, err := NewVerifier(VerifierOptions{Trust: func() Trust { return trust }, Now: func() time.Time { return past }})
	if err != nil {
		t.Fatal(err)
	}
	_, err = exchange{}.run(t, newIssuer(t, p, IssuerOptions{}), v)
	if !errors.Is(err, ErrEKExpired) || !contains(err, past.Format(time.RFC3339)) {
		t.Fatalf("got %v", err)
	}
}

func TestAMissingDeviceIsNamed(t *testing.T) {
	for _, dev := range []string{"/dev/no-such-tpm", "unix:/no/such/socket", t.TempDir()} {
		i, err := NewIssuer(IssuerOptions{Device: dev})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := i.Begin(context.Background()); !errors.Is(err, attestation.ErrNoDevice) {
			t.Errorf("%s: %v", dev, err)
		}
	}
}

func TestARestartedTPMHasAnotherEpoch(t *testing.T) {
	p := swtpm.New(t, nil)
	i, v := newIssuer(t, p, IssuerOptions{}), newVerifier(t, trustOf(t, p))
	before, err := exchange{}.run(t, i, v)
	if err != nil {
		t.Fatal(err)
	}
	again, err := exchange{}.run(t, i, v)
	if err != nil || again.Epoch != before.Epoch {
		t.Fatalf("epoch %q then %q, %v", before.Epoch, again.Epoch, err)
	}
	p.Restart(t)
	after, err := exchange{}.run(t, i, v)
	if err != nil || after.Epoch == before.Epoch || after.Identity != before.Identity {
		t.Fatalf("epoch %q then %q, %v", before.Epoch, after.Epoch, err)
	}
}

func contains(err error, text string) bool {
	return err != nil && strings.Contains(err.Error(), text)
}
