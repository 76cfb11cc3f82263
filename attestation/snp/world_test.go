package snp_test

import (
	"context"
	"crypto/x509"
	"errors"
	"net/http/httptest"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/endorsement"
	"github.com/keyagent/keyagent/attestation/snp"
	"github.com/keyagent/keyagent/test/sim/amd"
)

// evidence, for short.
type evidence = attestv1.SNPEvidence

var testBinder = attestation.Binder{1, 2, 3, 4, 63: 5}

func must[T any](t testing.TB) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func newChip(t testing.TB, product string) *amd.Chip {
	t.Helper()
	a := must[*amd.Authority](t)(amd.New(amd.Options{Product: product}))
	return must[*amd.Chip](t)(a.Chip(amd.ChipOptions{}))
}

// lab trusts one authority. Later options replace earlier ones.
func lab(t testing.TB, a *amd.Authority, change ...func(*snp.VerifierOptions)) *snp.Verifier {
	t.Helper()
	opts := snp.VerifierOptions{Trust: a.Trust}
	for _, c := range change {
		c(&opts)
	}
	return must[*snp.Verifier](t)(snp.NewVerifier(opts))
}

func at(now time.Time) func(*snp.VerifierOptions) {
	return func(o *snp.VerifierOptions) { o.Now = func() time.Time { return now } }
}

func trusting(roots ...snp.Root) func(*snp.VerifierOptions) {
	return func(o *snp.VerifierOptions) { o.Trust = func() snp.Trust { return snp.Trust{Roots: roots} } }
}

func asking(s endorsement.Source) func(*snp.VerifierOptions) {
	return func(o *snp.VerifierOptions) { o.Endorsements = s }
}

// serve runs a service and asks it through a cache, as a deployment does.
func serve(t testing.TB, k *amd.KDS) *endorsement.Cache {
	t.Helper()
	srv := httptest.NewServer(k)
	t.Cleanup(srv.Close)
	c := must[*endorsement.Cache](t)(endorsement.NewCache(endorsement.CacheOptions{Source: must[*endorsement.HTTP](t)(amd.Source(srv.URL))}))
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// verify runs one exchange over evidence.
func verify(ctx context.Context, v *snp.Verifier, ev *attestv1.SNPEvidence) (attestation.Claims, error) {
	q, err := v.Begin(ctx, nil)
	if err != nil {
		return attestation.Claims{}, err
	}
	data, err := proto.Marshal(ev)
	if err != nil {
		return attestation.Claims{}, err
	}
	all, err := q.Verify(ctx, data, testBinder)
	if err != nil {
		return attestation.Claims{}, err
	}
	return all[0], nil
}

// refused demands one refusal, by name.
func refused(t testing.TB, err, want error) {
	t.Helper()
	if !errors.Is(err, want) || !errors.Is(err, attestation.ErrRefused) {
		t.Errorf("got %v, want %v", err, want)
	}
}

func parse(t testing.TB, der []byte) *x509.Certificate {
	return must[*x509.Certificate](t)(x509.ParseCertificate(der))
}

func parseList(t testing.TB, der []byte) *x509.RevocationList {
	t.Helper()
	return must[*x509.RevocationList](t)(x509.ParseRevocationList(der))
}
