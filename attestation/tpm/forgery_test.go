package tpm

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"slices"
	"testing"

	"github.com/google/go-tpm/tpm2"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/test/sim/swtpm"
)

// Case 24.
func TestAQuoteOfAnythingElseIsRefused(t *testing.T) {
	p := swtpm.New(t, nil)
	extendAll(t, p, 0, 4, 7, 11)
	v := newVerifier(t, trustOf(t, p))
	if err := newForger(t, p).show(v); err != nil {
		t.Fatalf("the honest machine: %v", err)
	}
	asked := bank(tpm2.TPMAlgSHA256, 0, 4, 7, 11)
	for name, tt := range map[string]struct {
		pcrs tpm2.TPMLPCRSelection
		want error
	}{
		"an empty selection":           {banks(bank(tpm2.TPMAlgSHA256)), ErrSelection},
		"one PCR too few":              {banks(bank(tpm2.TPMAlgSHA256, 0, 4, 7)), ErrSelection},
		"one PCR too many":             {banks(bank(tpm2.TPMAlgSHA256, 0, 4, 7, 11, 16)), ErrSelection},
		"other PCRs":                   {banks(bank(tpm2.TPMAlgSHA256, 0, 4, 7, 23)), ErrSelection},
		"the SHA-1 bank":               {banks(bank(tpm2.TPMAlgSHA1, 0, 4, 7, 11)), ErrSelection},
		"the SHA-384 bank":             {banks(bank(tpm2.TPMAlgSHA384, 0, 4, 7, 11)), ErrSelection},
		"the SHA-512 bank":             {banks(bank(tpm2.TPMAlgSHA512, 0, 4, 7, 11)), ErrSelection},
		"a second bank after it":       {banks(asked, bank(tpm2.TPMAlgSHA384, 16)), ErrSelection},
		"a second bank before it":      {banks(bank(tpm2.TPMAlgSHA1, 16), asked), ErrSelection},
		"the same bank in two parts":   {banks(bank(tpm2.TPMAlgSHA256, 0, 4), bank(tpm2.TPMAlgSHA256, 7, 11)), ErrSelection},
		"the same bank a second time":  {banks(asked, asked), ErrSelection},
		"a second bank without a PCR":  {banks(asked, bank(tpm2.TPMAlgSHA384)), ErrSelection},
		"a bitmap of four bytes":       {banks(tpm2.TPMSPCRSelection{Hash: tpm2.TPMAlgSHA256, PCRSelect: []byte{0x91, 0x08, 0, 0}}), ErrSelection},
		"no bank, so no PCR is quoted": {banks(), ErrSelection},
	} {
		t.Run(name, func(t *testing.T) {
			f := newForger(t, p)
			f.sign = func(qualifying []byte) (tpm2.TPM2BAttest, tpm2.TPMTSignature) {
				f.pcrs = tt.pcrs
				return f.quoteOf(qualifying)
			}
			if name == "a bitmap of four bytes" {
				// A TPM of the PC Client profile refuses to quote one.
				if err := coveredErr(tt.pcrs, trustOf(t, p).PCRs); err != nil {
					wantErr(t, err, tt.want)
				}
				return
			}
			wantErr(t, f.show(v), tt.want)
		})
	}
}

func coveredErr(s tpm2.TPMLPCRSelection, pcrs []uint32) error {
	_, err := coveredPCRs(&tpm2.TPMSQuoteInfo{PCRSelect: s}, pcrs, nil)
	return err
}

// Case 24 as it was found in the field: a machine with two banks gives a genuine
// quote over SHA-512, beside which lie the SHA-256 values that it would like to
// have, and that no signature covers.
func TestValuesOfABankThatWasNotQuotedAreRefused(t *testing.T) {
	p := swtpm.New(t, nil)
	allocate(t, p, tpm2.TPMAlgSHA256, tpm2.TPMAlgSHA512)
	extendAll(t, p, 0, 4, 7, 11)
	v := newVerifier(t, trustOf(t, p))
	if err := newForger(t, p).show(v); err != nil {
		t.Fatalf("the honest machine: %v", err)
	}
	for name, s := range map[string]tpm2.TPMLPCRSelection{
		"the other bank":       banks(bank(tpm2.TPMAlgSHA512, 0, 4, 7, 11)),
		"both, the good first": banks(bank(tpm2.TPMAlgSHA256, 0, 4, 7, 11), bank(tpm2.TPMAlgSHA512, 0, 4, 7, 11)),
		"both, the good last":  banks(bank(tpm2.TPMAlgSHA512, 0, 4, 7, 11), bank(tpm2.TPMAlgSHA256, 0, 4, 7, 11)),
	} {
		for which, values := range map[string][][]byte{"good values": nil, "values of its own": slices.Repeat([][]byte{make([]byte, 32)}, 4)} {
			t.Run(name+", "+which, func(t *testing.T) {
				f := newForger(t, p)
				f.values = values
				f.sign = func(qualifying []byte) (tpm2.TPM2BAttest, tpm2.TPMTSignature) {
					f.pcrs = s
					quote, signature := f.quoteOf(qualifying)
					info := must[*tpm2.TPMSQuoteInfo](t)(must[*tpm2.TPMSAttest](t)(quote.Contents()).Attested.Quote())
					if got := info.PCRSelect.PCRSelections; len(got) != len(s.PCRSelections) || got[0].PCRSelect[0] != 0x91 {
						t.Errorf("the TPM quotes %+v", got)
					}
					return quote, signature
				}
				wantErr(t, f.show(v), ErrSelection)
			})
		}
	}
}

// Case 24: values that are not those of the quote.
func TestPCRValuesMustMatchTheQuote(t *testing.T) {
	p := swtpm.New(t, nil)
	extendAll(t, p, 0, 4, 7, 11)
	v := newVerifier(t, trustOf(t, p))
	for name, change := range map[string]func(*attestv1.TPMEvidence){
		"one bit changed": func(e *attestv1.TPMEvidence) { e.PcrValues[1] = flip(e.PcrValues[1], 31) },
		"two swapped":     func(e *attestv1.TPMEvidence) { e.PcrValues[0], e.PcrValues[1] = e.PcrValues[1], e.PcrValues[0] },
		"one missing":     func(e *attestv1.TPMEvidence) { e.PcrValues = e.PcrValues[1:] },
		"one too many":    func(e *attestv1.TPMEvidence) { e.PcrValues = append(e.PcrValues, make([]byte, 32)) },
		"none":            func(e *attestv1.TPMEvidence) { e.PcrValues = nil },
		"all zero":        func(e *attestv1.TPMEvidence) { e.PcrValues[1] = make([]byte, 32) },
		"cut elsewhere": func(e *attestv1.TPMEvidence) { // the same bytes in all, so the same digest
			e.PcrValues[0], e.PcrValues[1] = e.PcrValues[0][:31], append([]byte{e.PcrValues[0][31]}, e.PcrValues[1]...)
		},
		"all in the first": func(e *attestv1.TPMEvidence) {
			all := []byte{}
			for _, x := range e.PcrValues {
				all = append(all, x...)
			}
			e.PcrValues = [][]byte{all, {}, {}, {}}
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := newForger(t, p)
			f.change = change
			wantErr(t, f.show(v), ErrPCRDigest)
		})
	}
}

// Case 24: what the TPM signs besides quotes, and what it signs of another's.
func TestASignatureOverSomethingElseIsRefused(t *testing.T) {
	p := swtpm.New(t, nil)
	v := newVerifier(t, trustOf(t, p))
	null := tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull}
	signs := map[string]struct {
		sign func(f *forger, q []byte) (tpm2.TPM2BAttest, tpm2.TPMTSignature)
		want error
	}{
		"a certified key": {func(f *forger, q []byte) (tpm2.TPM2BAttest, tpm2.TPMTSignature) {
			rsp := must[*tpm2.CertifyResponse](f.t)(tpm2.Certify{ObjectHandle: f.auth(), SignHandle: f.auth(),
				QualifyingData: tpm2.TPM2BData{Buffer: q}, InScheme: null}.Execute(f.tpm))
			return rsp.CertifyInfo, rsp.Signature
		}, ErrNotAQuote},
		"the time": {func(f *forger, q []byte) (tpm2.TPM2BAttest, tpm2.TPMTSignature) {
			return f.timeOf(q)
		}, ErrNotAQuote},
		"a quote for another connection": {func(f *forger, _ []byte) (tpm2.TPM2BAttest, tpm2.TPMTSignature) {
			other := sha256.Sum256([]byte("another connection"))
			return f.quoteOf(other[:])
		}, ErrBinder},
		"a quote for no connection": {func(f *forger, _ []byte) (tpm2.TPM2BAttest, tpm2.TPMTSignature) {
			return f.quoteOf(nil)
		}, ErrBinder},
		"the binder itself and not its digest": {func(f *forger, _ []byte) (tpm2.TPM2BAttest, tpm2.TPMTSignature) {
			return f.quoteOf(f.binder[:48])
		}, ErrBinder},
		"a digest that begins like the right one": {func(f *forger, q []byte) (tpm2.TPM2BAttest, tpm2.TPMTSignature) {
			return f.quoteOf(q[:31])
		}, ErrBinder},
	}
	for name, tt := range signs {
		t.Run(name, func(t *testing.T) {
			f := newForger(t, p)
			f.sign = func(q []byte) (tpm2.TPM2BAttest, tpm2.TPMTSignature) { return tt.sign(f, q) }
			wantErr(t, f.show(v), tt.want)
		})
	}
	stranger, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		change func(*attestv1.TPMEvidence)
		want   error
	}{
		"one bit of the quote changed":  {func(e *attestv1.TPMEvidence) { e.Attest = flip(e.Attest, len(e.Attest)-1) }, ErrSignature},
		"the user data changed":         {func(e *attestv1.TPMEvidence) { e.Attest = flip(e.Attest, 45) }, ErrSignature},
		"a byte after the quote":        {func(e *attestv1.TPMEvidence) { e.Attest = append(e.Attest, 0) }, ErrSignature},
		"a byte after the signature":    {func(e *attestv1.TPMEvidence) { e.Signature = append(e.Signature, 0) }, ErrMalformed},
		"no signature":                  {func(e *attestv1.TPMEvidence) { e.Signature = nil }, ErrMalformed},
		"no quote":                      {func(e *attestv1.TPMEvidence) { e.Attest = nil }, ErrSignature},
		"a quote of a megabyte":         {func(e *attestv1.TPMEvidence) { e.Attest = make([]byte, 1<<20) }, ErrMalformed},
		"a signature of a megabyte":     {func(e *attestv1.TPMEvidence) { e.Signature = make([]byte, 1<<20) }, ErrMalformed},
		"zeros for a signature (r = 0)": {func(e *attestv1.TPMEvidence) { e.Signature = ecdsaSignature(nil, nil) }, ErrSignature},
		"a signature by another key": {func(e *attestv1.TPMEvidence) {
			sum := sha256.Sum256(e.Attest)
			r, s, err := ecdsa.Sign(rand.Reader, stranger, sum[:])
			if err != nil {
				panic(err)
			}
			e.Signature = ecdsaSignature(r.Bytes(), s.Bytes())
		}, ErrSignature},
		"an HMAC for a signature": {func(e *attestv1.TPMEvidence) {
			e.Signature = tpm2.Marshal(tpm2.TPMTSignature{SigAlg: tpm2.TPMAlgHMAC, Signature: tpm2.NewTPMUSignature(tpm2.TPMAlgHMAC,
				&tpm2.TPMTHA{HashAlg: tpm2.TPMAlgSHA256, Digest: make([]byte, 32)})})
		}, ErrSignature},
	} {
		t.Run(name, func(t *testing.T) {
			f := newForger(t, p)
			f.change = tt.change
			wantErr(t, f.show(v), tt.want)
		})
	}
}

func ecdsaSignature(r, s []byte) []byte {
	return tpm2.Marshal(tpm2.TPMTSignature{SigAlg: tpm2.TPMAlgECDSA, Signature: tpm2.NewTPMUSignature(tpm2.TPMAlgECDSA,
		&tpm2.TPMSSignatureECC{Hash: tpm2.TPMAlgSHA256, SignatureR: tpm2.TPM2BECCParameter{Buffer: r}, SignatureS: tpm2.TPM2BECCParameter{Buffer: s}})})
}

// Cases 19 and 25.
func TestTheCredentialMustBeThisOne(t *testing.T) {
	p := swtpm.New(t, nil)
	v := newVerifier(t, trustOf(t, p))
	var old []byte
	if err := (exchange{evidence: func(e *attestv1.TPMEvidence) { old = e.GetCredentialProof() }}).runErr(t, p, v); err != nil {
		t.Fatal(err)
	}
	for name, proof := range map[string][]byte{
		"of another challenge": old, "guessed": credentialProof(make([]byte, 32), testBinder), "empty": {},
		"cut": old[:31],
	} {
		t.Run(name, func(t *testing.T) {
			f := newForger(t, p)
			f.proof = proof
			wantErr(t, f.show(v), ErrCredential)
		})
	}
	t.Run("of another connection", func(t *testing.T) {
		x := exchange{evidence: func(e *attestv1.TPMEvidence) { e.CredentialProof[0] ^= 1 }}
		wantErr(t, x.runErr(t, p, v), ErrCredential)
	})
	t.Run("and so must the binder", func(t *testing.T) {
		wantErr(t, exchange{binder: attestation.Binder(sum64("another connection"))}.runErr(t, p, v), ErrBinder)
	})
}

func (x exchange) runErr(t testing.TB, p *swtpm.TPM, v *Verifier) error {
	t.Helper()
	_, err := x.run(t, newIssuer(t, p, IssuerOptions{}), v)
	return err
}

// Case 28: somebody resets the TPM while the machine uses it.
func TestATPMThatIsResetBetweenTwoCommandsIsNoticed(t *testing.T) {
	p := swtpm.New(t, nil)
	f := newForger(t, p)
	ctx := context.Background()
	v := newVerifier(t, trustOf(t, p))
	q, err := v.Begin(ctx, f.Offer())
	if err != nil {
		t.Fatal(err)
	}
	f.tpm.Close()
	p.Restart(t)
	// What a kernel's driver hides: the device is there, and the keys are as well.
	if f.tpm, err = OpenDevice(p.Device); err != nil {
		t.Fatal(err)
	}
	if err := f.chooseEK(); err != nil {
		t.Fatal(err)
	}
	if f.ak, err = createPrimary(f.tpm, akTemplate); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Evidence(ctx, q.Ask(), testBinder); err == nil || !contains(err, ErrReset.Error()) {
		t.Errorf("got %v", err)
	}
	f.clock = must[tpm2.TPMSClockInfo](t)(readClock(f.tpm))
	if _, err := f.Evidence(ctx, q.Ask(), testBinder); err != nil {
		t.Errorf("with the clock of now: %v", err)
	}
}
