package snp_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"os"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/snp"
	"github.com/keyagent/keyagent/test/sim/amd"
)

var update = flag.Bool("update", false, "make testdata/evidence.bin and testdata/chip.pem anew")

// saved is one exchange of a synthetic chip, the same for every run, so that a
// corpus means something.
func saved(t testing.TB) (*evidence, *amd.Chip, *snp.Verifier) {
	t.Helper()
	chip := must[*amd.Chip](t)(amd.Load("testdata/chip.pem"))
	ev := &evidence{}
	if err := proto.Unmarshal(must[[]byte](t)(os.ReadFile("testdata/evidence.bin")), ev); err != nil {
		t.Fatal(err)
	}
	return ev, chip, lab(t, chip.Authority, at(chip.ARK.NotBefore.Add(time.Hour)))
}

func TestSavedEvidenceVerifies(t *testing.T) {
	if *update {
		chip := newChip(t, "Genoa")
		ev := must[*evidence](t)(chip.Evidence(amd.Report{Version: 5, Data: testBinder, Measurement: [48]byte{1}}))
		if err := errors.Join(chip.Save("testdata/chip.pem"), os.WriteFile("testdata/evidence.bin", must[[]byte](t)(proto.Marshal(ev)), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	ev, _, v := saved(t)
	if _, err := verify(t.Context(), v, ev); err != nil {
		t.Fatal(err)
	}
}

func refusedOr(t *testing.T, err error) {
	t.Helper()
	if err != nil && !errors.Is(err, attestation.ErrRefused) {
		t.Fatalf("a nameless error: %v", err)
	}
}

func FuzzParse(f *testing.F) {
	ev, _, _ := saved(f)
	f.Add(ev.GetReport())
	for _, g := range genuineReports {
		f.Add(file(f, g.name+".report"))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := snp.Parse(data)
		refusedOr(t, err)
		if err != nil {
			return
		}
		want := 61
		if r.Version >= 5 {
			want += 2 // mitigations
		}
		if len(r.Claims().Facts) != want {
			t.Fatalf("%d facts", len(r.Claims().Facts))
		}
	})
}

func FuzzCertificateTable(f *testing.F) {
	_, chip, _ := saved(f)
	f.Add(chip.Table())
	overflow := make([]byte, 4096)
	binary.LittleEndian.PutUint32(overflow[16:], 0xFFFFFFF0)
	binary.LittleEndian.PutUint32(overflow[20:], 0x20)
	f.Add(overflow)
	f.Fuzz(func(t *testing.T, data []byte) {
		leaf, err := snp.TableLeaf(data)
		if err == nil && leaf != nil && !bytes.Contains(data, leaf) {
			t.Fatal("a certificate from outside the table")
		}
	})
}

// FuzzEvidence: only the genuine report is ever accepted.
func FuzzEvidence(f *testing.F) {
	ev, _, v := saved(f)
	f.Add(must[[]byte](f)(proto.Marshal(ev)))
	f.Fuzz(func(t *testing.T, data []byte) {
		q, err := v.Begin(context.Background(), nil)
		if err != nil {
			t.Fatal(err)
		}
		all, err := q.Verify(context.Background(), data, testBinder)
		refusedOr(t, err)
		if err != nil {
			return
		}
		var got evidence
		if err := proto.Unmarshal(data, &got); err != nil || !bytes.Equal(got.GetReport()[:0x2A0], ev.GetReport()[:0x2A0]) ||
			!bytes.Equal(all[0].Measurements["measurement"].Value, ev.GetReport()[0x90:0xC0]) {
			t.Fatal("another report is accepted")
		}
	})
}

// FuzzEndorsements changes certificate and list by themselves.
func FuzzEndorsements(f *testing.F) {
	ev, _, v := saved(f)
	f.Add(ev.GetCertificate(), ev.GetCrl())
	f.Add(file(f, "turin.vcek"), ev.GetCrl())
	f.Fuzz(func(t *testing.T, certificate, crl []byte) {
		_, err := v.VerifyReport(context.Background(), clone(ev, func(e *evidence) { e.Certificate, e.Crl = certificate, crl }), testBinder)
		refusedOr(t, err)
		if err == nil && !bytes.Equal(certificate, ev.GetCertificate()) {
			t.Fatal("another certificate is accepted")
		}
		_, _, _, err = snp.ParseLeaf(certificate)
		refusedOr(t, err)
	})
}
