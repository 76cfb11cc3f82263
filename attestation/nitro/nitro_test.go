package nitro_test

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"math/big"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/fxamacker/cbor/v2"
	"google.golang.org/protobuf/proto"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/nitro"
	aws "github.com/keyagent/keyagent/test/sim/nitro"
)

var testBinder = attestation.Binder{1, 2, 3, 63: 4}

func must[T any](t testing.TB) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func newAWS(t testing.TB) *aws.Authority {
	return must[*aws.Authority](t)(aws.New(time.Now(), nil))
}

func newVerifier(t testing.TB, trust nitro.Trust, now time.Time) *nitro.Verifier {
	return must[*nitro.Verifier](t)(nitro.NewVerifier(nitro.VerifierOptions{
		Trust: func() nitro.Trust { return trust }, Now: func() time.Time { return now }}))
}

// verify runs one exchange over a document.
func verify(t testing.TB, v *nitro.Verifier, document []byte) (attestation.Claims, error) {
	t.Helper()
	q, err := v.Begin(t.Context(), nil)
	if err != nil {
		return attestation.Claims{}, err
	}
	all, err := q.Verify(t.Context(), must[[]byte](t)(proto.Marshal(&attestv1.NitroEvidence{Document: document})), testBinder)
	if err != nil {
		return attestation.Claims{}, err
	}
	return all[0], nil
}

func refused(t testing.TB, name string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) || !errors.Is(err, attestation.ErrRefused) {
		t.Errorf("%s: got %v, want %v", name, err, want)
	}
}

func TestADocumentIsAccepted(t *testing.T) {
	a, now := newAWS(t), time.Now()
	plain := must[[]byte](t)(a.Document(now, testBinder[:]))
	for name, document := range map[string][]byte{"plain": plain, "tagged": append([]byte{0xD2}, plain...)} {
		c, err := verify(t, newVerifier(t, a.Trust(), now), document)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if c.Kind != attestation.Nitro || c.Identity != "i-0123456789abcdef0" || c.Trust != "root:lab" || c.Epoch != "" ||
			c.Facts["module_id"] != aws.Module || c.Facts["timestamp"] != uint64(now.UnixMilli()) || len(c.Facts) != 3 {
			t.Errorf("%+v", c)
		}
		if len(c.Measurements) != 24 || !bytes.Equal(c.Measurements["pcr23"].Value, append([]byte{23}, make([]byte, 47)...)) {
			t.Errorf("%v", c.Measurements)
		}
	}
}

// rsaCertificate is what anybody can make.
func rsaCertificate(t testing.TB) []byte {
	key := must[*rsa.PrivateKey](t)(rsa.GenerateKey(rand.Reader, 2048))
	c := &x509.Certificate{SerialNumber: big.NewInt(1)}
	return must[[]byte](t)(x509.CreateCertificate(rand.Reader, c, c, key.Public(), key))
}

func TestADocumentOfAnotherSourceIsRefused(t *testing.T) {
	a, other, now := newAWS(t), newAWS(t), time.Now()
	leaf := func(edit func(*x509.Certificate)) []byte {
		weak := must[*aws.Authority](t)(aws.New(now, edit))
		d := must[[]byte](t)(weak.Document(now, testBinder[:]))
		if _, err := verify(t, newVerifier(t, weak.Trust(), now), d); !errors.Is(err, nitro.ErrCertificate) {
			t.Errorf("an unfit certificate: %v", err)
		}
		return d
	}
	leaf(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyAgreement })
	leaf(func(c *x509.Certificate) { c.IsCA = true })
	good := a.Payload(now, testBinder[:])
	with := func(changes map[string]any) []byte {
		p := maps.Clone(good)
		for k, v := range changes {
			if v == nil {
				delete(p, k)
			} else {
				p[k] = v
			}
		}
		return must[[]byte](t)(a.Sign(p))
	}
	pcrs := func(n uint64, value []byte) map[string]any {
		return map[string]any{"nitrotpm_pcrs": map[uint64][]byte{n: value}}
	}
	for name, tc := range map[string]struct {
		document []byte
		want     error
	}{
		"another PKI with the same names": {must[[]byte](t)(other.Document(now, testBinder[:])), nitro.ErrUntrusted},
		"another's certificates":          {with(map[string]any{"certificate": other.Leaf.Raw, "cabundle": [][]byte{other.Root.Raw, other.Middle.Raw}}), nitro.ErrUntrusted},
		"no bundle":                       {with(map[string]any{"cabundle": [][]byte{}}), nitro.ErrUntrusted},
		"intermediate as certificate":     {with(map[string]any{"certificate": a.Middle.Raw}), nitro.ErrCertificate},
		"garbage as certificate":          {with(map[string]any{"certificate": []byte("garbage")}), nitro.ErrMalformed},
		"too large a certificate":         {with(map[string]any{"certificate": make([]byte, 2049)}), nitro.ErrMalformed},
		"garbage in the bundle":           {with(map[string]any{"cabundle": [][]byte{[]byte("garbage")}}), nitro.ErrMalformed},
		"an RSA key in the bundle":        {with(map[string]any{"cabundle": [][]byte{a.Root.Raw, a.Middle.Raw, rsaCertificate(t)}}), nitro.ErrCertificate},
		"a bundle of nine":                {with(map[string]any{"cabundle": make([][]byte, 9)}), nitro.ErrMalformed},
		"another nonce":                   {must[[]byte](t)(a.Document(now, make([]byte, 64))), nitro.ErrNonce},
		"a nonce that is shorter":         {must[[]byte](t)(a.Document(now, testBinder[:32])), nitro.ErrNonce},
		"no nonce":                        {with(map[string]any{"nonce": nil}), nitro.ErrNonce},
		"the binder as user data":         {with(map[string]any{"nonce": nil, "user_data": testBinder[:]}), nitro.ErrMalformed},
		"user data":                       {with(map[string]any{"user_data": []byte("x")}), nitro.ErrMalformed},
		"a public key":                    {with(map[string]any{"public_key": []byte("x")}), nitro.ErrMalformed},
		"an enclave's PCRs":               {with(map[string]any{"pcrs": good["nitrotpm_pcrs"], "nitrotpm_pcrs": nil}), nitro.ErrNotNitroTPM},
		"PCRs of both":                    {with(map[string]any{"pcrs": good["nitrotpm_pcrs"]}), nitro.ErrNotNitroTPM},
		"an enclave's name":               {with(map[string]any{"module_id": "i-0123456789abcdef0-enc0123456789abcdef"}), nitro.ErrNotNitroTPM},
		"no name":                         {with(map[string]any{"module_id": nil}), nitro.ErrNotNitroTPM},
		"a name with a tail":              {with(map[string]any{"module_id": aws.Module + "\n"}), nitro.ErrNotNitroTPM},
		"another digest":                  {with(map[string]any{"digest": "SHA256"}), nitro.ErrMalformed},
		"no time":                         {with(map[string]any{"timestamp": nil}), nitro.ErrMalformed},
		"no PCRs":                         {with(map[string]any{"nitrotpm_pcrs": nil}), nitro.ErrMalformed},
		"a PCR 24":                        {with(pcrs(24, make([]byte, 48))), nitro.ErrMalformed},
		"a short PCR":                     {with(pcrs(4, make([]byte, 32))), nitro.ErrMalformed},
		"a field that is not known":       {with(map[string]any{"more": 1}), nitro.ErrMalformed},
		"a field in other letters":        {with(map[string]any{"Nonce": testBinder[:], "nonce": nil}), nitro.ErrMalformed},
		"a number as a name":              {with(map[string]any{"module_id": 1}), nitro.ErrMalformed},
		"nothing":                         {nil, nitro.ErrMalformed},
		"too much":                        {make([]byte, 16<<10+1), nitro.ErrMalformed},
	} {
		_, err := verify(t, newVerifier(t, a.Trust(), now), tc.document)
		refused(t, name, err, tc.want)
	}
	// One of several roots vouches, and is named.
	both := nitro.Trust{Roots: append([]nitro.Root{{Name: "other", Certificate: other.Root}}, a.Trust().Roots...)}
	if c, err := verify(t, newVerifier(t, both, now), with(nil)); err != nil || c.Trust != "root:lab" {
		t.Errorf("%v, %s", err, c.Trust)
	}
}

func TestCBORWithTwoMeaningsIsRefused(t *testing.T) {
	a, now := newAWS(t), time.Now()
	v := newVerifier(t, a.Trust(), now)
	payload := must[[]byte](t)(cbor.Marshal(a.Payload(now, testBinder[:])))
	// The last pair again, behind a map header that counts it.
	twice := append(append([]byte{payload[0] + 1}, payload[1:]...), must[[]byte](t)(cbor.Marshal("digest"))...)
	twice = append(twice, must[[]byte](t)(cbor.Marshal("SHA384"))...)
	endless := append(append([]byte{0xBF}, payload[1:]...), 0xFF)
	good := must[[]byte](t)(a.Document(now, testBinder[:]))
	var parts []any
	if err := cbor.Unmarshal(good, &parts); err != nil {
		t.Fatal(err)
	}
	frame := func(change func(p []any) any) []byte {
		return must[[]byte](t)(cbor.Marshal(change(append([]any{}, parts...))))
	}
	for name, document := range map[string][]byte{
		"a key twice":             must[[]byte](t)(a.Sign(twice)),
		"a frame of no length":    append(append([]byte{0x9F}, good[1:]...), 0xFF),
		"a map without an end":    must[[]byte](t)(a.Sign(endless[:len(endless)-1])),
		"an end without a map":    must[[]byte](t)(a.Sign(append(bytes.Clone(payload), 0xFF))),
		"a key without a value":   must[[]byte](t)(a.Sign(append(append(bytes.Clone(endless[:len(endless)-1]), 0x61, 'x'), 0xFF))),
		"a key twice, no length":  must[[]byte](t)(a.Sign(append(append([]byte{0xBF}, twice[1:]...), 0xFF))),
		"a tail after payload":    must[[]byte](t)(a.Sign(append(bytes.Clone(payload), 0))),
		"a tail":                  append(bytes.Clone(good), 0),
		"cut":                     good[:len(good)-1],
		"tagged twice":            append([]byte{0xD2, 0xD2}, good...),
		"another tag":             append([]byte{0xD1}, good...),
		"a tag within":            must[[]byte](t)(a.Sign(append([]byte{0xC6}, payload...))),
		"three parts":             frame(func(p []any) any { return p[:3] }),
		"five parts":              frame(func(p []any) any { return append(p, []byte{}) }),
		"another algorithm":       frame(func(p []any) any { p[0] = []byte{0xA1, 0x01, 0x26}; return p }),
		"no protected header":     frame(func(p []any) any { p[0] = []byte{}; return p }),
		"header said at length":   frame(func(p []any) any { p[0] = []byte{0xA1, 0x18, 0x01, 0x38, 0x22}; return p }),
		"an unprotected header":   frame(func(p []any) any { p[1] = map[int]int{4: 1}; return p }),
		"a detached payload":      frame(func(p []any) any { p[2] = nil; return p }),
		"a short signature":       frame(func(p []any) any { p[3] = p[3].([]byte)[:95]; return p }),
		"a map in its place":      frame(func(p []any) any { return map[int]any{0: p} }),
		"a payload of many parts": must[[]byte](t)(a.Sign(bytes.Repeat([]byte{0x81}, 1000))),
	} {
		_, err := verify(t, v, document)
		refused(t, name, err, nitro.ErrMalformed)
	}
	flipped := frame(func(p []any) any { s := bytes.Clone(p[3].([]byte)); s[95] ^= 1; p[3] = s; return p })
	_, err := verify(t, v, flipped)
	refused(t, "a flipped signature", err, nitro.ErrSignature)
	zero := frame(func(p []any) any { p[3] = make([]byte, 96); return p })
	_, err = verify(t, v, zero)
	refused(t, "a zero signature", err, nitro.ErrSignature)
}

// AWS's own documents have maps of indefinite length.
func TestAPayloadOfIndefiniteLengthIsRead(t *testing.T) {
	a, now := newAWS(t), time.Now()
	want, err := verify(t, newVerifier(t, a.Trust(), now), must[[]byte](t)(a.Document(now, testBinder[:])))
	if err != nil {
		t.Fatal(err)
	}
	fields := a.Payload(now, testBinder[:])
	outer := []byte{0xBF}
	for name, value := range fields {
		outer = append(outer, must[[]byte](t)(cbor.Marshal(name))...)
		body := must[[]byte](t)(cbor.Marshal(value))
		switch {
		case name == "nitrotpm_pcrs" && body[0] == 0xB8: // more than 23 pairs: a map, its count in a byte
			body = append(append([]byte{0xBF}, body[2:]...), 0xFF)
		case name == "nitrotpm_pcrs" && body[0]&0xE0 == 0xA0, name == "cabundle" && body[0] > 0x80 && body[0] < 0x98:
			body = append(append([]byte{body[0]&0xE0 | 0x1F}, body[1:]...), 0xFF)
		}
		outer = append(outer, body...)
	}
	document := must[[]byte](t)(a.Sign(append(outer, 0xFF)))
	got, err := verify(t, newVerifier(t, a.Trust(), now), document)
	if !want.Until.After(now) || want.Until.After(a.Root.NotAfter) {
		t.Errorf("the claims rest until %s", want.Until)
	}
	if err != nil || got.Identity != want.Identity || len(got.Measurements) != len(want.Measurements) || len(got.Measurements) == 0 {
		t.Errorf("%+v, %v", got, err)
	}
	for bit := 0; bit < len(document)*8; bit += 61 {
		bad := bytes.Clone(document)
		bad[bit/8] ^= 1 << (bit % 8)
		if _, err := verify(t, newVerifier(t, a.Trust(), now), bad); !errors.Is(err, attestation.ErrRefused) {
			t.Fatalf("bit %d of byte %d: %v", bit%8, bit/8, err)
		}
	}
}

func TestEveryChangedBitOfADocumentIsRefused(t *testing.T) {
	a, now := newAWS(t), time.Now()
	v := newVerifier(t, a.Trust(), now)
	good := must[[]byte](t)(a.Document(now, testBinder[:]))
	for bit := 0; bit < len(good)*8; bit += 29 {
		bad := bytes.Clone(good)
		bad[bit/8] ^= 1 << (bit % 8)
		if _, err := verify(t, v, bad); !errors.Is(err, attestation.ErrRefused) {
			t.Fatalf("bit %d of byte %d: %v", bit%8, bit/8, err)
		}
	}
}

func TestAWrongClockIsNamed(t *testing.T) {
	a, now := newAWS(t), time.Now()
	document := must[[]byte](t)(a.Document(now, testBinder[:]))
	for _, off := range []time.Duration{-10 * 365 * 24 * time.Hour, -2 * time.Hour, 4 * time.Hour, 10 * 365 * 24 * time.Hour} {
		clock := now.Add(off)
		_, err := verify(t, newVerifier(t, a.Trust(), clock), document)
		refused(t, off.String(), err, nitro.ErrExpired)
		if err != nil && !strings.Contains(err.Error(), "this machine's clock says "+clock.Format(time.RFC3339)) {
			t.Error(err)
		}
	}
}

func TestUnsetMeansRefused(t *testing.T) {
	if _, err := nitro.NewVerifier(nitro.VerifierOptions{}); !errors.Is(err, nitro.ErrConfiguration) {
		t.Error(err)
	}
	a := newAWS(t)
	for name, trust := range map[string]nitro.Trust{
		"nothing": {}, "no name": {Roots: []nitro.Root{{Certificate: a.Root}}}, "no certificate": {Roots: []nitro.Root{{Name: "x"}}},
	} {
		if _, err := newVerifier(t, trust, time.Now()).Begin(t.Context(), nil); !errors.Is(err, nitro.ErrConfiguration) || errors.Is(err, attestation.ErrRefused) {
			t.Errorf("%s: %v", name, err)
		}
	}
	_, err := newVerifier(t, a.Trust(), time.Now()).Begin(t.Context(), []byte("an offer"))
	refused(t, "offer", err, nitro.ErrMalformed)
}

func TestAWSsRootIsThePublishedOne(t *testing.T) {
	roots := nitro.AWS()
	sum := sha256.Sum256(roots[0].Certificate.Raw)
	if len(roots) != 1 || hex.EncodeToString(sum[:]) != "641a0321a3e244efe456463195d606317ed7cdcc3c1756e09893f3c68f79bb5b" {
		t.Errorf("%x", sum)
	}
	if c := roots[0].Certificate; !c.IsCA || c.CheckSignatureFrom(c) != nil || c.NotAfter.Year() != 2049 {
		t.Error(fmt.Sprint(c.Subject, c.NotAfter))
	}
}

// The document of an enclave, genuine: its signature and its chain are those of a
// NitroTPM's, and it is refused for what it is.
func TestAGenuineDocumentOfAnEnclaveIsRefusedForWhatItIs(t *testing.T) {
	document := must[[]byte](t)(os.ReadFile("testdata/enclave.cose"))
	trust := nitro.Trust{Roots: nitro.AWS()}
	made := time.UnixMilli(1695049410860) // as it says
	if module, err := nitro.VerifyEnclave(trust, document, made); err != nil || !strings.Contains(module, "-enc") {
		t.Errorf("%q, %v", module, err)
	}
	flipped := bytes.Clone(document)
	flipped[len(flipped)-1] ^= 1
	_, err := nitro.VerifyEnclave(trust, flipped, made)
	refused(t, "flipped", err, nitro.ErrSignature)
	_, err = nitro.VerifyEnclave(trust, document, made.Add(24*time.Hour))
	refused(t, "a day later", err, nitro.ErrExpired)
	_, err = nitro.VerifyEnclave(newAWS(t).Trust(), document, made)
	refused(t, "another root", err, nitro.ErrUntrusted)
	_, err = verify(t, newVerifier(t, trust, made), document)
	refused(t, "an enclave", err, nitro.ErrNotNitroTPM)
}
