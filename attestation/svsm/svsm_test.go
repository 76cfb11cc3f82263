package svsm

import (
	"context"
	"errors"
	"testing"

	"github.com/google/go-sev-guest/abi"
	"google.golang.org/protobuf/proto"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/saved"
	"github.com/keyagent/keyagent/attestation/snp"
	"github.com/keyagent/keyagent/attestation/tpm"
	"github.com/keyagent/keyagent/test/sim/amd"
	"github.com/keyagent/keyagent/test/sim/swtpm"
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

func wantErr(t testing.TB, err, want error) {
	t.Helper()
	if !errors.Is(err, want) || !errors.Is(err, attestation.ErrRefused) {
		t.Errorf("got %v, want %v", err, want)
	}
}

// machine is a guest on a chip, with a vTPM that its SVSM vouches for.
type machine struct {
	guest  *amd.Guest
	issuer *Issuer
}

func newMachine(t testing.TB, chip *amd.Chip, crl []byte) *machine {
	t.Helper()
	p := swtpm.New(t, nil)
	ti := must[*tpm.Issuer](t)(tpm.NewIssuer(tpm.IssuerOptions{Device: p.Device, EK: tpm.EKRSA2048, EventLog: t.TempDir() + "/none"}))
	a := must[attestation.Attempt](t)(ti.Begin(t.Context()))
	offer := &attestv1.TPMOffer{}
	if err := proto.Unmarshal(a.Offer(), offer); err != nil {
		t.Fatal(err)
	}
	a.Close()
	guest := &amd.Guest{Chip: chip, Report: amd.Report{Policy: abi.SnpPolicy{ABIMajor: 1, SingleSocket: true}}, Table: chip.Table(), Manifest: offer.GetEkPublic()}
	si := must[*snp.Issuer](t)(snp.NewIssuer(snp.IssuerOptions{TSM: guest.TSM()}))
	return &machine{guest, must[*Issuer](t)(NewIssuer(si, ti))}
}

func world(t testing.TB) (*Verifier, *amd.Chip, []byte) {
	t.Helper()
	authority := must[*amd.Authority](t)(amd.New(amd.Options{Product: "Genoa"}))
	chip := must[*amd.Chip](t)(authority.Chip(amd.ChipOptions{}))
	sv := must[*snp.Verifier](t)(snp.NewVerifier(snp.VerifierOptions{Trust: authority.Trust}))
	v := must[*Verifier](t)(NewVerifier(sv, func() []uint32 { return []uint32{0, 7} }))
	return v, chip, must[[]byte](t)(authority.FreshCRL())
}

var binder = attestation.Binder{1, 2, 3}

// exchange runs one exchange; change sees the evidence on its way.
func exchange(t testing.TB, m *machine, v *Verifier, crl []byte, change func(*attestv1.SVSMEvidence)) ([]attestation.Claims, error) {
	t.Helper()
	ctx := context.Background()
	a := must[attestation.Attempt](t)(m.issuer.Begin(ctx))
	defer a.Close()
	q, err := v.Begin(ctx, a.Offer())
	if err != nil {
		return nil, err
	}
	e := &attestv1.SVSMEvidence{}
	if err := proto.Unmarshal(must[[]byte](t)(a.Evidence(ctx, q.Ask(), binder)), e); err != nil {
		t.Fatal(err)
	}
	e.Snp.Crl = crl
	if change != nil {
		change(e)
	}
	return q.Verify(ctx, must[[]byte](t)(proto.Marshal(e)), binder)
}

func TestAnSVSMVouchesForItsVTPM(t *testing.T) {
	v, chip, crl := world(t)
	m := newMachine(t, chip, crl)
	claims, err := exchange(t, m, v, crl, nil)
	if err != nil {
		t.Fatal(err)
	}
	verified := must[*attestation.Verified](t)(attestation.NewVerified(binder, chip.VCEK.NotBefore, claims...))
	vtpm, _ := verified.Claims(attestation.TPM)
	hw, _ := verified.Claims(attestation.SNP)
	if vtpm.Trust != "svsm" || vtpm.Via != attestation.SVSM || hw.Via != attestation.SVSM || hw.Trust != "root:lab" || len(vtpm.Measurements) != 2 {
		t.Errorf("%+v", claims)
	}
	s := must[*attestv1.Saved](t)(saved.Collect(t.Context(), []attestation.Issuer{m.issuer}, []uint32{0, 4}))
	e := &attestv1.SVSMEvidence{}
	if err := proto.Unmarshal(s.Items[0].Data, e); err != nil {
		t.Fatal(err)
	}
	e.Snp.Crl = crl
	s.Items[0].Data = must[[]byte](t)(proto.Marshal(e))
	if claims, err := saved.Verify(t.Context(), []attestation.Verifier{v}, s); err != nil || len(claims) != 3 {
		t.Errorf("from a file: %v", err)
	}
}

// Case 29: two halves of two machines, and what a guest could make by itself.
func TestAVTPMThatTheSVSMDoesNotVouchForIsRefused(t *testing.T) {
	v, chip, crl := world(t)
	m, other := newMachine(t, chip, crl), newMachine(t, chip, crl)

	honest := m.guest.Manifest
	m.guest.Manifest = other.guest.Manifest
	_, err := exchange(t, m, v, crl, nil)
	wantErr(t, err, ErrManifest)
	m.guest.Manifest = honest

	_, err = exchange(t, m, v, crl, func(e *attestv1.SVSMEvidence) { e.Manifest = other.guest.Manifest })
	wantErr(t, err, snp.ErrReportData)

	_, err = exchange(t, m, v, crl, func(e *attestv1.SVSMEvidence) {
		e.Snp.Report = must[[]byte](t)(chip.Sign(amd.Report{Data: snp.ServiceReportData(binder, e.Manifest), VMPL: 2,
			Policy: abi.SnpPolicy{ABIMajor: 1}}))
	})
	wantErr(t, err, ErrVMPL)

	_, err = exchange(t, m, v, crl, func(e *attestv1.SVSMEvidence) {
		e.Snp.Report = must[[]byte](t)(chip.Sign(amd.Report{Data: binder, Policy: abi.SnpPolicy{ABIMajor: 1}}))
	})
	wantErr(t, err, snp.ErrReportData)

	var theirs *attestv1.SVSMEvidence
	if _, err := exchange(t, other, v, crl, func(e *attestv1.SVSMEvidence) { theirs = e }); err != nil {
		t.Fatal(err)
	}
	_, err = exchange(t, m, v, crl, func(e *attestv1.SVSMEvidence) { e.Tpm = theirs.Tpm })
	wantErr(t, err, tpm.ErrSignature)
	_, err = exchange(t, m, v, crl, func(e *attestv1.SVSMEvidence) { e.Tpm.CredentialProof = make([]byte, 32) })
	wantErr(t, err, tpm.ErrCredential)
	_, err = exchange(t, m, v, crl, func(e *attestv1.SVSMEvidence) { e.Manifest = nil })
	wantErr(t, err, ErrMalformed)
	_, err = exchange(t, m, v, crl, func(e *attestv1.SVSMEvidence) { e.Tpm = nil })
	wantErr(t, err, tpm.ErrMalformed)
	if _, err := v.Begin(t.Context(), []byte{0xff}); !errors.Is(err, ErrMalformed) {
		t.Errorf("%v", err)
	}
	if _, err := v.Begin(t.Context(), nil); !errors.Is(err, attestation.ErrRefused) {
		t.Errorf("%v", err)
	}
}

func TestAMachineWithoutAnSVSMSaysSo(t *testing.T) {
	_, chip, _ := world(t)
	guest := &amd.Guest{Chip: chip}
	si := must[*snp.Issuer](t)(snp.NewIssuer(snp.IssuerOptions{TSM: guest.TSM()}))
	if err := Detect(t.Context(), si); !errors.Is(err, attestation.ErrNoDevice) {
		t.Errorf("%v", err)
	}
	if guest.Left() != 0 {
		t.Error("an entry of configfs was left")
	}
}

// FuzzEvidence: nothing is accepted but what an SVSM signed.
func FuzzEvidence(f *testing.F) {
	v, chip, crl := world(f)
	m := newMachine(f, chip, crl)
	ctx := context.Background()
	a := must[attestation.Attempt](f)(m.issuer.Begin(ctx))
	defer a.Close()
	q := must[attestation.Question](f)(v.Begin(ctx, a.Offer()))
	genuine := must[[]byte](f)(a.Evidence(ctx, q.Ask(), binder))
	f.Add(genuine)
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, data []byte) {
		// The evidence has no revocation list: it is refused in any case, and
		// nothing on the way there may panic.
		if _, err := q.Verify(ctx, data, binder); !errors.Is(err, attestation.ErrRefused) {
			t.Fatalf("%v", err)
		}
	})
}
