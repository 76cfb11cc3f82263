package tpm

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"google.golang.org/protobuf/proto"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/test/swtpm"
)

// wantErr is the one assertion about errors. A refusal is also a refusal to
// those who do not know this package.
func wantErr(t testing.TB, err, want error) {
	t.Helper()
	if !errors.Is(err, want) || !errors.Is(err, attestation.ErrRefused) {
		t.Errorf("got %v, want %v", err, want)
	}
}

func must[T any](t testing.TB) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// forger is an attacker who owns a machine with a genuine TPM: every command
// that the TPM executes is at his service, and he writes the frames.
type forger struct {
	t testing.TB
	*attempt
	binder attestation.Binder
	pcrs   tpm2.TPMLPCRSelection
	proof  []byte // instead of the activated credential's
	values [][]byte
	sign   func(qualifying []byte) (tpm2.TPM2BAttest, tpm2.TPMTSignature)
	lie    func(*attestv1.TPMOffer)
	change func(*attestv1.TPMEvidence)
}

func newForger(t testing.TB, p *swtpm.TPM) *forger {
	t.Helper()
	a, err := newIssuer(t, p, IssuerOptions{}).Begin(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close() })
	f := &forger{t: t, attempt: a.(*attempt), binder: testBinder}
	f.sign = f.quoteOf
	return f
}

// useAK makes another attestation key.
func (f *forger) useAK(hierarchy tpm2.TPMHandle, change func(*tpm2.TPMTPublic)) {
	f.t.Helper()
	f.ak.flush(f.tpm)
	template := akTemplate
	change(&template)
	rsp, err := tpm2.CreatePrimary{
		PrimaryHandle: tpm2.AuthHandle{Handle: hierarchy, Auth: tpm2.PasswordAuth(nil)},
		InPublic:      tpm2.New2B(template),
	}.Execute(f.tpm)
	if err != nil {
		f.t.Fatal(err)
	}
	f.ak = object{rsp.ObjectHandle, *must[*tpm2.TPMTPublic](f.t)(rsp.OutPublic.Contents()), rsp.Name}
}

func (f *forger) auth() tpm2.AuthHandle {
	return tpm2.AuthHandle{Handle: f.ak.handle, Name: f.ak.name, Auth: tpm2.PasswordAuth(nil)}
}

func (f *forger) quoteOf(qualifying []byte) (tpm2.TPM2BAttest, tpm2.TPMTSignature) {
	f.t.Helper()
	rsp, err := tpm2.Quote{SignHandle: f.auth(), QualifyingData: tpm2.TPM2BData{Buffer: qualifying},
		InScheme: tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull}, PCRSelect: f.pcrs}.Execute(f.tpm)
	if err != nil {
		f.t.Fatal(err)
	}
	return rsp.Quoted, rsp.Signature
}

// timeOf is TPM2_GetTime, which the library sends without its authorisations.
func (f *forger) timeOf(qualifying []byte) (tpm2.TPM2BAttest, tpm2.TPMTSignature) {
	f.t.Helper()
	u32, u16 := binary.BigEndian.AppendUint32, binary.BigEndian.AppendUint16
	password := append(u32(nil, 0x40000009), 0, 0, 0, 0, 0)
	body := u32(u32(nil, 0x4000000B), uint32(f.ak.handle))
	body = u32(body, uint32(2*len(password)))
	body = append(append(body, password...), password...)
	body = append(u16(body, uint16(len(qualifying))), qualifying...)
	body = u16(body, uint16(tpm2.TPMAlgNull))
	command := append(u32(u32(u16(nil, 0x8002), uint32(10+len(body))), uint32(tpm2.TPMCCGetTime)), body...)
	rsp := must[[]byte](f.t)(f.tpm.Send(command))
	if rc := binary.BigEndian.Uint32(rsp[6:10]); rc != 0 {
		f.t.Fatalf("TPM2_GetTime: %#x", rc)
	}
	n := binary.BigEndian.Uint16(rsp[14:16])
	attest := rsp[16 : 16+n]
	end := 14 + binary.BigEndian.Uint32(rsp[10:14])
	sig := must[*tpm2.TPMTSignature](f.t)(tpm2.Unmarshal[tpm2.TPMTSignature](rsp[16+n : end]))
	return tpm2.BytesAs2B[tpm2.TPMSAttest](attest), *sig
}

// show goes through the exchange with a verifier, who expects testBinder, and
// then lets the TPM go: it speaks to one at a time.
func (f *forger) show(v *Verifier) error {
	f.t.Helper()
	defer f.Close()
	offer := &attestv1.TPMOffer{EkCertificate: f.cert, EkPublic: tpm2.Marshal(f.ekey.public), AkPublic: tpm2.Marshal(f.ak.public)}
	if f.lie != nil {
		f.lie(offer)
	}
	q, err := v.Begin(context.Background(), must[[]byte](f.t)(proto.Marshal(offer)))
	if err != nil {
		return err
	}
	var ask attestv1.TPMAsk
	if err := proto.Unmarshal(q.Ask(), &ask); err != nil {
		f.t.Fatal(err)
	}
	if f.proof == nil {
		f.proof = must[[]byte](f.t)(f.activate(&ask, f.binder))
	}
	if len(f.pcrs.PCRSelections) == 0 {
		f.pcrs = selection(ask.GetPcrs())
	}
	if f.values == nil {
		f.values = must[[][]byte](f.t)(readPCRs(f.tpm, ask.GetPcrs()))
	}
	qualifying := sha256.Sum256(f.binder[:])
	attest, signature := f.sign(qualifying[:])
	e := &attestv1.TPMEvidence{Attest: attest.Bytes(), Signature: tpm2.Marshal(signature), PcrValues: f.values, CredentialProof: f.proof}
	if f.change != nil {
		f.change(e)
	}
	_, err = q.Verify(context.Background(), must[[]byte](f.t)(proto.Marshal(e)), testBinder)
	return err
}

func bank(alg tpm2.TPMAlgID, pcrs ...uint) tpm2.TPMSPCRSelection {
	return tpm2.TPMSPCRSelection{Hash: alg, PCRSelect: tpm2.PCClientCompatible.PCRs(pcrs...)}
}

func banks(s ...tpm2.TPMSPCRSelection) tpm2.TPMLPCRSelection {
	return tpm2.TPMLPCRSelection{PCRSelections: s}
}

func flip(b []byte, i int) []byte {
	out := bytes.Clone(b)
	out[i] ^= 1
	return out
}
