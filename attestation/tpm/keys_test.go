package tpm

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"google.golang.org/protobuf/proto"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/test/sim/swtpm"
)

// Case 25: keys that a TPM makes for anybody, and that sign what their owner
// likes, or leave the TPM.
func TestAnAKThatIsNotFitIsRefused(t *testing.T) {
	p := swtpm.New(t, nil)
	v := newVerifier(t, trustOf(t, p))
	for name, tt := range map[string]struct {
		hierarchy tpm2.TPMHandle
		change    func(*tpm2.TPMTPublic)
	}{
		"not restricted": {tpm2.TPMRHEndorsement, func(a *tpm2.TPMTPublic) { a.ObjectAttributes.Restricted = false }},
		"not fixed to the TPM": {tpm2.TPMRHEndorsement, func(a *tpm2.TPMTPublic) {
			a.ObjectAttributes.FixedTPM, a.ObjectAttributes.FixedParent = false, false
		}},
		"it also decrypts": {tpm2.TPMRHEndorsement, func(a *tpm2.TPMTPublic) {
			a.ObjectAttributes.Restricted, a.ObjectAttributes.Decrypt = false, true
			a.Parameters = tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{CurveID: tpm2.TPMECCNistP256})
		}},
		"it decrypts and does not sign": {tpm2.TPMRHEndorsement, func(a *tpm2.TPMTPublic) { *a = tpm2.ECCSRKTemplate }},
		"of another curve": {tpm2.TPMRHEndorsement, func(a *tpm2.TPMTPublic) {
			a.Parameters = tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{CurveID: tpm2.TPMECCNistP384,
				Scheme: tpm2.TPMTECCScheme{Scheme: tpm2.TPMAlgECDSA,
					Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: tpm2.TPMAlgSHA384})}})
		}},
		"a policy may use it": {tpm2.TPMRHEndorsement, func(a *tpm2.TPMTPublic) {
			a.AuthPolicy = tpm2.TPM2BDigest{Buffer: make([]byte, 32)}
		}},
		"of the owner's hierarchy": {tpm2.TPMRHOwner, func(*tpm2.TPMTPublic) {}},
		"of no hierarchy":          {tpm2.TPMRHNull, func(*tpm2.TPMTPublic) {}},
	} {
		t.Run(name, func(t *testing.T) {
			f := newForger(t, p)
			f.useAK(tt.hierarchy, tt.change)
			wantErr(t, f.show(v), ErrAKUnfit)
		})
	}
}

// The attributes that the verifier reads are those of the key's name, which the
// TPM compares when it activates the credential: who lies gets none.
func TestAnAKThatLiesAboutItselfIsNotActivated(t *testing.T) {
	p := swtpm.New(t, nil)
	v := newVerifier(t, trustOf(t, p))
	f := newForger(t, p)
	f.useAK(tpm2.TPMRHEndorsement, func(a *tpm2.TPMTPublic) { a.ObjectAttributes.Restricted = false })
	said := f.ak.public
	said.ObjectAttributes.Restricted = true
	f.lie = func(o *attestv1.TPMOffer) { o.AkPublic = tpm2.Marshal(said) }
	f.proof = credentialProof(make([]byte, 32), testBinder)
	// The signer's name in the quote is the true one, and is not what was said.
	wantErr(t, f.show(v), ErrAKUnfit)

	f = newForger(t, p)
	q, err := v.Begin(t.Context(), marshal(t, &attestv1.TPMOffer{EkCertificate: f.cert,
		EkPublic: tpm2.Marshal(f.ekey.public), AkPublic: tpm2.Marshal(said)}))
	if err != nil {
		t.Fatal(err)
	}
	ask := &attestv1.TPMAsk{}
	unmarshal(t, q.Ask(), ask)
	if _, err := f.activate(ask, testBinder); err == nil {
		t.Error("the TPM activated a credential of a key that it does not hold")
	}
}

// Case 25: the endorsement key of one TPM, the attestation key of another.
func TestAnAKOfAnotherTPMIsRefused(t *testing.T) {
	p := swtpm.New(t, nil)
	other := swtpm.New(t, p.Authority)
	v := newVerifier(t, trustOf(t, p))
	f, genuine := newForger(t, other), newForger(t, p)
	f.lie = func(o *attestv1.TPMOffer) {
		o.EkCertificate, o.EkPublic = genuine.cert, tpm2.Marshal(genuine.ekey.public)
	}
	f.proof = credentialProof(make([]byte, 32), testBinder)
	wantErr(t, f.show(v), ErrCredential)

	f = newForger(t, other)
	if err := f.show(v); err != nil {
		t.Errorf("the other TPM by itself: %v", err)
	}
}

// Case 25: a key in software, of which the TPM is to believe that it is a
// restricted key of its own. A TPM loads any public area from outside, and the
// key's own policy would authorise its part of activating the credential.
func TestASoftwareKeyThatIsLoadedFromOutsideIsRefused(t *testing.T) {
	p := swtpm.New(t, nil)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	policy := must[*tpm2.PolicyCalculator](t)(tpm2.NewPolicyCalculator(tpm2.TPMAlgSHA256))
	if err := (tpm2.PolicyCommandCode{Code: tpm2.TPMCCActivateCredential}).Update(policy); err != nil {
		t.Fatal(err)
	}
	f := newForger(t, p)
	v := newVerifier(t, trustOf(t, p))
	for name, auth := range map[string][]byte{"by its policy": policy.Hash().Digest, "by its empty password": nil} {
		t.Run(name, func(t *testing.T) {
			pub := akTemplate
			pub.AuthPolicy.Buffer = auth
			point := must[[]byte](t)(key.PublicKey.Bytes())
			pub.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
				X: tpm2.TPM2BECCParameter{Buffer: point[1:33]}, Y: tpm2.TPM2BECCParameter{Buffer: point[33:]}})
			offer := &attestv1.TPMOffer{EkCertificate: f.cert, EkPublic: tpm2.Marshal(f.ekey.public), AkPublic: tpm2.Marshal(pub)}
			q, err := v.Begin(t.Context(), marshal(t, offer))
			if auth != nil {
				wantErr(t, err, ErrAKUnfit)
				// What the verifier would have asked, had it let the policy pass.
				o := offerOf(t, f.ekey.public, pub)
				q = &question{ask: must[[]byte](t)(o.ask([]uint32{0}, make([]byte, 32)))}
			} else if err != nil {
				t.Fatal(err)
			}
			ask := &attestv1.TPMAsk{}
			unmarshal(t, q.Ask(), ask)
			loaded, err := tpm2.LoadExternal{InPublic: tpm2.New2B(pub), Hierarchy: tpm2.TPMRHEndorsement}.Execute(f.tpm)
			if err != nil {
				t.Fatal(err)
			}
			defer tpm2.FlushContext{FlushHandle: loaded.ObjectHandle}.Execute(f.tpm)
			session := tpm2.PasswordAuth(nil)
			if auth != nil {
				session = tpm2.Policy(tpm2.TPMAlgSHA256, 16, func(d transport.TPM, s tpm2.TPMISHPolicy, _ tpm2.TPM2BNonce) error {
					_, err := tpm2.PolicyCommandCode{PolicySession: s, Code: tpm2.TPMCCActivateCredential}.Execute(d)
					return err
				})
			}
			_, err = tpm2.ActivateCredential{
				ActivateHandle: tpm2.AuthHandle{Handle: loaded.ObjectHandle, Name: loaded.Name, Auth: session},
				KeyHandle:      tpm2.AuthHandle{Handle: f.ekey.handle, Name: f.ekey.name, Auth: f.attempt.ek.auth(f.ekey.handle, f.ekey.public)},
				CredentialBlob: tpm2.TPM2BIDObject{Buffer: ask.GetCredentialBlob()},
				Secret:         tpm2.TPM2BEncryptedSecret{Buffer: ask.GetEncryptedSecret()},
			}.Execute(f.tpm)
			t.Logf("%s: the TPM says %v", name, err)
			if err == nil && auth == nil {
				t.Error("the TPM activates credentials of software keys: nothing that it attests is worth anything")
			}
		})
	}
}

// offerOf is an offer that was not looked at.
func offerOf(t testing.TB, ek, ak tpm2.TPMTPublic) offer {
	t.Helper()
	sum := sha256.Sum256(tpm2.Marshal(ak))
	return offer{ek: &ek, ak: AK{public: &ak, Name: append([]byte{0x00, 0x0B}, sum[:]...)}}
}

func marshal(t testing.TB, m proto.Message) []byte {
	t.Helper()
	return must[[]byte](t)(proto.Marshal(m))
}

func unmarshal(t testing.TB, data []byte, m proto.Message) {
	t.Helper()
	if err := proto.Unmarshal(data, m); err != nil {
		t.Fatal(err)
	}
}
