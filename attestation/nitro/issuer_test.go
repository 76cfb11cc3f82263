package nitro_test

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/fxamacker/cbor/v2"
	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"google.golang.org/protobuf/proto"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/nitro"
	aws "github.com/keyagent/keyagent/test/sim/nitro"
)

func issuer(t *testing.T, tpm *aws.TPM) *nitro.Issuer {
	return must[*nitro.Issuer](t)(nitro.NewIssuer(nitro.IssuerOptions{Open: func() (transport.TPMCloser, error) { return tpm, nil }}))
}

// evidence runs one exchange up to the evidence, and demands that the TPM has
// nothing left of it.
func evidence(t *testing.T, tpm *aws.TPM) ([]byte, error) {
	t.Helper()
	a, err := issuer(t, tpm).Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	data, err := a.Evidence(t.Context(), nil, testBinder)
	if index, keys, sessions := tpm.Left(); index != 0 || keys != 0 || sessions != 0 {
		t.Errorf("left behind: index %#x, %d keys, %d sessions", index, keys, sessions)
	}
	return data, err
}

func TestAnInstanceProvesItself(t *testing.T) {
	a := newAWS(t)
	tpm := must[*aws.TPM](t)(aws.NewTPM(a))
	for range 2 {
		data := must[[]byte](t)(evidence(t, tpm))
		q := must[attestation.Question](t)(newVerifier(t, a.Trust(), time.Now()).Begin(t.Context(), nil))
		if _, err := q.Verify(t.Context(), data, testBinder); err != nil {
			t.Error(err)
		}
		_, err := q.Verify(t.Context(), data, attestation.Binder{9})
		refused(t, "another connection", err, nitro.ErrNonce)
	}
	// A process that died is cleaned up after.
	tpm.LeaveBehind(uint32(nitro.DefaultIndex))
	must[[]byte](t)(evidence(t, tpm))
}

func TestATPMThatGivesNoDocumentIsNamed(t *testing.T) {
	a := newAWS(t)
	encoded := func(v any) []byte { return must[[]byte](t)(cbor.Marshal(v)) }
	for name, tc := range map[string]struct {
		answer []byte // nil: the request stays
		code   tpm2.TPMRC
		want   string
	}{
		"error":             {encoded(map[string]any{"Error": "InvalidArgument"}), 0, `says "InvalidArgument"`},
		"another answer":    {encoded(map[string]any{"DescribeNSM": 1}), 0, "not understood"},
		"no document":       {encoded(map[string]any{"Attestation": map[string]any{}}), 0, "0 bytes"},
		"not CBOR":          {bytes.Repeat([]byte{0xFF}, 100), 0, "not understood"},
		"the request again": {nil, 0, "not understood"},
		"command refused":   {nil, tpm2.TPMRCCommandCode, "vendor command"},
	} {
		tpm := must[*aws.TPM](t)(aws.NewTPM(a))
		tpm.Code = tc.code
		tpm.Answer = func([]byte) []byte { return tc.answer }
		if _, err := evidence(t, tpm); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestOtherTPMsAreNotNitroTPMs(t *testing.T) {
	tpm := must[*aws.TPM](t)(aws.NewTPM(newAWS(t)))
	tpm.Plain = true
	i := issuer(t, tpm)
	for range 2 { // the second would hang if the first held the TPM
		if _, err := i.Begin(t.Context()); !errors.Is(err, attestation.ErrNoDevice) {
			t.Error(err)
		}
	}
	none := must[*nitro.Issuer](t)(nitro.NewIssuer(nitro.IssuerOptions{Open: func() (transport.TPMCloser, error) { return nil, attestation.ErrNoDevice }}))
	if _, err := none.Begin(t.Context()); !errors.Is(err, attestation.ErrNoDevice) {
		t.Error(err)
	}
	for name, opts := range map[string]nitro.IssuerOptions{
		"no TPM":   {},
		"no index": {Open: func() (transport.TPMCloser, error) { return tpm, nil }, Index: 0x81000001},
	} {
		if _, err := nitro.NewIssuer(opts); err == nil {
			t.Errorf("%s is accepted", name)
		}
	}
	tpm.Plain = false
	a := must[attestation.Attempt](t)(i.Begin(t.Context()))
	if _, err := a.Evidence(t.Context(), []byte("more"), testBinder); err == nil {
		t.Error("a question is answered that was not understood")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := a.Evidence(ctx, nil, testBinder); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if err := errors.Join(a.Close(), a.Close()); err != nil {
		t.Error(err)
	}
}

// The request is byte for byte what AWS's library writes.
func TestARequestIsTheOneThatTheModuleReads(t *testing.T) {
	got := must[[]byte](t)(nitro.Request(testBinder))
	want := []byte("\xa1\x6bAttestation\xa3\x69user_data\xf6\x65nonce\x58\x40" + string(testBinder[:]) + "\x6apublic_key\xf6")
	if !bytes.Equal(got, want) {
		t.Errorf("%x", got)
	}
}

func FuzzAnswer(f *testing.F) {
	f.Add(must[[]byte](f)(cbor.Marshal(map[string]any{"Attestation": map[string]any{"document": []byte("d")}})))
	f.Add(must[[]byte](f)(cbor.Marshal(map[string]any{"Error": "InternalError"})))
	f.Fuzz(func(t *testing.T, data []byte) {
		if d, err := nitro.DocumentOf(data); err == nil && !bytes.Contains(data, d) {
			t.Fatal("a document from outside the answer")
		}
	})
}

// FuzzDocument: only the genuine document is ever accepted.
func FuzzDocument(f *testing.F) {
	a, now := newAWS(f), time.Now()
	good := must[[]byte](f)(a.Document(now, testBinder[:]))
	want, err := verify(f, newVerifier(f, a.Trust(), now), good)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(append([]byte{0xD2}, good...))
	f.Fuzz(func(t *testing.T, data []byte) {
		got, err := verify(t, newVerifier(t, a.Trust(), now), data)
		if err != nil && !errors.Is(err, attestation.ErrRefused) {
			t.Fatalf("a nameless error: %v", err)
		}
		for name, m := range got.Measurements {
			if !bytes.Equal(m.Value, want.Measurements[name].Value) {
				t.Fatalf("%s is %x", name, m.Value)
			}
		}
	})
}

// FuzzEvidence is the frame around it.
func FuzzEvidence(f *testing.F) {
	a := newAWS(f)
	f.Add(must[[]byte](f)(proto.Marshal(&attestv1.NitroEvidence{Document: must[[]byte](f)(a.Document(time.Now(), testBinder[:]))})))
	v := newVerifier(f, a.Trust(), time.Now())
	f.Fuzz(func(t *testing.T, data []byte) {
		q := must[attestation.Question](t)(v.Begin(t.Context(), nil))
		if _, err := q.Verify(t.Context(), data, testBinder); err != nil && !errors.Is(err, attestation.ErrRefused) {
			t.Fatalf("a nameless error: %v", err)
		}
	})
}
