package tpm

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"google.golang.org/protobuf/proto"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/test/sim/swtpm"
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
	f.ak = object{rsp.ObjectHandle, *must[*tpm2.TPMTPublic](f.t)(rsp.OutPublic.Contents()), rsp.Name, true}
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
	params := append(binary.BigEndian.AppendUint16(nil, uint16(len(qualifying))), qualifying...)
	params = binary.BigEndian.AppendUint16(params, uint16(tpm2.TPMAlgNull))
	rsp := command(f.t, f.tpm, tpm2.TPMCCGetTime, []tpm2.TPMHandle{tpm2.TPMRHEndorsement, f.ak.handle}, params)
	n := binary.BigEndian.Uint16(rsp)
	sig := must[*tpm2.TPMTSignature](f.t)(tpm2.Unmarshal[tpm2.TPMTSignature](rsp[2+n:]))
	return tpm2.BytesAs2B[tpm2.TPMSAttest](rsp[2 : 2+n]), *sig
}

// command sends one that the library does not have, each handle with an empty
// password, and returns the parameters of the response.
func command(t testing.TB, d transport.TPM, code tpm2.TPMCC, handles []tpm2.TPMHandle, params []byte) []byte {
	t.Helper()
	u32 := binary.BigEndian.AppendUint32
	var body, auth []byte
	for _, h := range handles {
		body = u32(body, uint32(h))
		auth = append(u32(auth, uint32(tpm2.TPMRSPW)), 0, 0, 0, 0, 0)
	}
	body = append(append(u32(body, uint32(len(auth))), auth...), params...)
	head := u32(u32([]byte{0x80, 0x02}, uint32(10+len(body))), uint32(code))
	rsp := must[[]byte](t)(d.Send(append(head, body...)))
	if rc := binary.BigEndian.Uint32(rsp[6:10]); rc != 0 {
		t.Fatalf("TPM command %#x: %#x", uint32(code), rc)
	}
	return rsp[14 : 14+binary.BigEndian.Uint32(rsp[10:14])]
}

// allocate turns on more banks, as a firmware's setup does.
func allocate(t testing.TB, p *swtpm.TPM, algs ...tpm2.TPMAlgID) {
	t.Helper()
	d := must[transport.TPMCloser](t)(OpenDevice(p.Device))
	var s tpm2.TPMLPCRSelection
	for _, alg := range algs {
		s.PCRSelections = append(s.PCRSelections, tpm2.TPMSPCRSelection{Hash: alg, PCRSelect: []byte{0xff, 0xff, 0xff}})
	}
	const pcrAllocate = 0x12B
	if rsp := command(t, d, pcrAllocate, []tpm2.TPMHandle{tpm2.TPMRHPlatform}, tpm2.Marshal(s)); rsp[0] != 1 {
		t.Fatalf("banks %v were not allocated", algs)
	}
	d.Close()
	p.Restart(t)
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
