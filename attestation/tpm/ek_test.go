package tpm

import (
	"bytes"
	"crypto/x509"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation/certificate"
	"github.com/keyagent/keyagent/test/sim/swtpm"
)

const rsaIndex, p384Index = 0x01c00002, 0x01c00016

// ekOf returns an endorsement key of a TPM and its digest, as an operator enrols it.
func ekOf(t testing.TB, p *swtpm.TPM, template tpm2.TPMTPublic) (key any, digest string) {
	t.Helper()
	public := must[*tpm2.TPMTPublic](t)(swtpm.Primary(p.Device, template, 0))
	key = must[any](t)(tpm2.Pub(*public))
	return key, must[string](t)(EKDigest(key))
}

// offerBy is what an issuer offers, and what it had to say.
func offerBy(t testing.TB, p *swtpm.TPM, opts IssuerOptions) (*attestv1.TPMOffer, string, error) {
	t.Helper()
	var said strings.Builder
	opts.Log = func(msg string, err error) { said.WriteString(msg + ": " + err.Error() + "\n") }
	a, err := newIssuer(t, p, opts).Begin(t.Context())
	if err != nil {
		return nil, said.String(), err
	}
	defer a.Close()
	o := &attestv1.TPMOffer{}
	unmarshal(t, a.Offer(), o)
	return o, said.String(), nil
}

// A certificate that nobody can read, or none where there should be one, does not stop a
// machine: its other key is used, or this one without a certificate.
func TestAnEKCertificateThatCannotBeReadStopsNoMachine(t *testing.T) {
	p, m := swtpm.New(t, nil), newMaker(t, nil)
	key, digest := ekOf(t, p, tpm2.RSAEKTemplate)
	good := m.certify(key, nil)
	for name, tc := range map[string]struct {
		rsa  []byte // in its index; nil for an index that was never written
		said string
	}{
		"never written": {nil, ""},
		"rubbish":       {bytes.Repeat([]byte{0xAB}, 400), "certificate at NV index 0x1c00002"},
		"cut off":       {good[:len(good)-9], "certificate at NV index 0x1c00002"},
		"another key's": {m.certify(m.key.Public(), nil), "not the key in its certificate"},
	} {
		t.Run(name, func(t *testing.T) {
			if tc.rsa == nil {
				must[bool](t)(true, swtpm.DefineNV(p.Device, rsaIndex, 900))
			} else {
				must[bool](t)(true, swtpm.WriteNV(p.Device, rsaIndex, tc.rsa))
			}
			// The other key has a good certificate.
			o, _, err := offerBy(t, p, IssuerOptions{})
			if err != nil || len(o.GetEkCertificate()) == 0 {
				t.Fatalf("%v, %d bytes of certificate", err, len(o.GetEkCertificate()))
			}
			if _, err := (exchange{}).run(t, newIssuer(t, p, IssuerOptions{}), newVerifier(t, trustOf(t, p))); err != nil {
				t.Errorf("the other key: %v", err)
			}
			// Asked for by name, it is used without one, and can be enrolled.
			o, said, err := offerBy(t, p, IssuerOptions{EK: EKRSA2048})
			if err != nil || len(o.GetEkCertificate()) != 0 || !strings.Contains(said, tc.said) {
				t.Fatalf("%v, %d bytes of certificate, said %q", err, len(o.GetEkCertificate()), said)
			}
			trust := Trust{Enrolled: []Enrolled{{Name: "rack-7", EKDigest: digest}}, PCRs: []uint32{0}}
			if c, err := (exchange{}).run(t, newIssuer(t, p, IssuerOptions{EK: EKRSA2048}), newVerifier(t, trust)); err != nil || c.Trust != "enrolled:rack-7" || !c.Until.IsZero() {
				t.Errorf("%v, vouched for by %q", err, c.Trust)
			}
			// A pin finds the key behind the better one.
			if o, _, err := offerBy(t, p, IssuerOptions{EKPin: digest}); err != nil || len(o.GetEkPublic()) == 0 || digestIn(t, o) != digest {
				t.Errorf("pinned: %v", err)
			}
		})
	}
	if _, _, err := offerBy(t, p, IssuerOptions{EKPin: strings.Repeat("0", 64)}); err == nil || !strings.Contains(err.Error(), "the configuration pins") {
		t.Errorf("a pin that no key has: %v", err)
	}
}

func digestIn(t testing.TB, o *attestv1.TPMOffer) string {
	t.Helper()
	public := must[*tpm2.TPMTPublic](t)(tpm2.Unmarshal[tpm2.TPMTPublic](o.GetEkPublic()))
	return must[string](t)(EKDigest(must[any](t)(tpm2.Pub(*public))))
}

// Indices as makers fill them.
func TestAnEKCertificateIsTakenOutOfItsIndex(t *testing.T) {
	p, m := swtpm.New(t, nil), newMaker(t, nil)
	key, _ := ekOf(t, p, tpm2.RSAEKTemplate)
	good := m.certify(key, func(c *x509.Certificate) { c.SerialNumber = big.NewInt(0x1234) })
	trust := Trust{Roots: []Root{{Name: "maker", Certificate: m.cert}}, PCRs: []uint32{0}}
	for name, nv := range map[string][]byte{
		"filled with 11":           append(bytes.Clone(good), bytes.Repeat([]byte{0x11}, 200)...),
		"with a header of TPM 1.2": append([]byte{0x10, 0x01, 0x00, byte(len(good) >> 8), byte(len(good))}, good...),
		"with both of them":        append([]byte{0x10, 0x01, 0x00, byte((len(good) + 2) >> 8), byte(len(good) + 2), 0x10, 0x02}, good...),
	} {
		must[bool](t)(true, swtpm.WriteNV(p.Device, rsaIndex, nv))
		v := newVerifier(t, trust)
		for range 2 { // the second time from what the verifier remembers
			c, err := exchange{}.run(t, newIssuer(t, p, IssuerOptions{EK: EKRSA2048}), v)
			if err != nil || c.Trust != "root:maker" || c.Until.IsZero() || c.Until.After(m.cert.NotAfter) {
				t.Errorf("%s: %v, until %s", name, err, c.Until)
			}
		}
	}
}

// Certificates between a TPM and its root come from the policy, from the node's
// configuration, or from the TPM itself.
func TestIntermediatesComeFromWhereTheyAre(t *testing.T) {
	p, root := swtpm.New(t, nil), newMaker(t, nil)
	office := newMaker(t, root)
	key, _ := ekOf(t, p, tpm2.RSAEKTemplate)
	leaf := office.certify(key, func(c *x509.Certificate) {
		c.IssuingCertificateURL = []string{"http://maker.example/office.crt"}
	})
	must[bool](t)(true, swtpm.WriteNV(p.Device, rsaIndex, leaf))
	must[bool](t)(true, swtpm.DefineNV(p.Device, p384Index, 0))
	trust := Trust{Roots: []Root{{Name: "maker", Certificate: root.cert}}, PCRs: []uint32{0}}
	issuer := func(pool ...*x509.Certificate) *Issuer { return newIssuer(t, p, IssuerOptions{EKIntermediates: pool}) }

	_, err := exchange{}.run(t, issuer(), newVerifier(t, trust))
	wantErr(t, err, ErrEKUntrusted)
	for _, word := range []string{`"CN=maker's office"`, "key ID " + fmt.Sprintf("%x", office.cert.SubjectKeyId), "http://maker.example/office.crt", "ek_intermediates"} {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("the refusal does not say %s: %v", word, err)
		}
	}
	if c, err := (exchange{}).run(t, issuer(root.cert, newMaker(t, nil).cert, office.cert), newVerifier(t, trust)); err != nil || c.Trust != "root:maker" {
		t.Errorf("from the configuration: %v", err)
	}
	beside := Trust{Roots: []Root{{Name: "maker", Certificate: root.cert, Intermediates: []*x509.Certificate{office.cert}}}, PCRs: []uint32{0}}
	if _, err := (exchange{}).run(t, issuer(), newVerifier(t, beside)); err != nil {
		t.Errorf("from the policy: %v", err)
	}
	// The chain is one text in as many indices as it needs.
	chain := append(bytes.Clone(office.cert.Raw), root.cert.Raw...)
	must[bool](t)(true, swtpm.WriteNV(p.Device, uint32(firstChainIndex), chain[:300]))
	must[bool](t)(true, swtpm.WriteNV(p.Device, uint32(firstChainIndex)+1, chain[300:]))
	if _, err := (exchange{}).run(t, issuer(), newVerifier(t, trust)); err != nil {
		t.Errorf("from the TPM: %v", err)
	}
	must[bool](t)(true, swtpm.WriteNV(p.Device, uint32(firstChainIndex)+1, []byte{1, 2, 3}))
	if o, said, err := offerBy(t, p, IssuerOptions{}); err != nil || len(o.GetEkIntermediates()) != 0 || !strings.Contains(said, "left out") {
		t.Errorf("a broken chain in the TPM: %v, %q", err, said)
	}
}

func TestAChainIsOrderedAndEnds(t *testing.T) {
	root := newMaker(t, nil)
	office := newMaker(t, root)
	leaf := must[*x509.Certificate](t)(certificate.Parse(office.certify(office.key.Public(), nil)))
	if got := chainFrom(leaf, []*x509.Certificate{root.cert, leaf, office.cert, office.cert}); !slices.EqualFunc(got, [][]byte{office.cert.Raw}, bytes.Equal) {
		t.Errorf("%d certificates", len(got))
	}
	// Two that name each other as their issuer.
	one, other := *office.cert, *office.cert
	one.RawSubject, one.RawIssuer, one.Raw = []byte("one"), []byte("other"), []byte("1")
	other.RawSubject, other.RawIssuer, other.Raw = []byte("other"), []byte("one"), []byte("2")
	if got := chainFrom(&one, []*x509.Certificate{&one, &other}); len(got) > 2 {
		t.Errorf("%d certificates", len(got))
	}
}

// A certificate that its maker took back, and one whose authority was.
func TestARevokedEKIsRefusedWhereAListIsGiven(t *testing.T) {
	p, root := swtpm.New(t, nil), newMaker(t, nil)
	office := newMaker(t, root)
	key, _ := ekOf(t, p, tpm2.RSAEKTemplate)
	leaf := must[*x509.Certificate](t)(certificate.Parse(office.certify(key, func(c *x509.Certificate) { c.SerialNumber = big.NewInt(99) })))
	must[bool](t)(true, swtpm.WriteNV(p.Device, rsaIndex, leaf.Raw))
	list := func(by *maker, serial int64) *x509.RevocationList {
		by.cert.KeyUsage |= x509.KeyUsageCRLSign
		signer := *by.cert
		signer.SubjectKeyId = []byte{1}
		der := must[[]byte](t)(x509.CreateRevocationList(nil, &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: time.Now().Add(-48 * time.Hour), NextUpdate: time.Now().Add(-24 * time.Hour),
			RevokedCertificateEntries: []x509.RevocationListEntry{{SerialNumber: big.NewInt(serial), RevocationTime: time.Now()}}}, &signer, by.key))
		return must[*x509.RevocationList](t)(x509.ParseRevocationList(der))
	}
	// A policy that is reloaded brings another list to a verifier that remembers the chain.
	inForce := Trust{Roots: []Root{{Name: "maker", Certificate: root.cert, Intermediates: []*x509.Certificate{office.cert}, CRLs: []*x509.RevocationList{list(office, 98)}}}, PCRs: []uint32{0}}
	reloaded := must[*Verifier](t)(NewVerifier(VerifierOptions{Trust: func() Trust { return inForce }}))
	if _, err := (exchange{}).run(t, newIssuer(t, p, IssuerOptions{EK: EKRSA2048}), reloaded); err != nil {
		t.Fatal(err)
	}
	inForce.Roots[0].CRLs = []*x509.RevocationList{list(office, 99)}
	_, err := exchange{}.run(t, newIssuer(t, p, IssuerOptions{EK: EKRSA2048}), reloaded)
	wantErr(t, err, ErrEKRevoked)
	for name, tc := range map[string]struct {
		crls []*x509.RevocationList
		want error
	}{
		"no list":                 {nil, nil},
		"a list of others":        {[]*x509.RevocationList{list(office, 98)}, nil},
		"the key":                 {[]*x509.RevocationList{list(office, 98), list(office, 99)}, ErrEKRevoked},
		"its office":              {[]*x509.RevocationList{list(root, office.cert.SerialNumber.Int64())}, ErrEKRevoked},
		"a list that others sign": {[]*x509.RevocationList{list(newMaker(t, newMaker(t, nil)), 99)}, nil},
	} {
		trust := Trust{Roots: []Root{{Name: "maker", Certificate: root.cert, Intermediates: []*x509.Certificate{office.cert}, CRLs: tc.crls}}, PCRs: []uint32{0}}
		v := newVerifier(t, trust)
		for range 2 { // the second time from what the verifier remembers
			_, err := exchange{}.run(t, newIssuer(t, p, IssuerOptions{EK: EKRSA2048}), v)
			if tc.want != nil {
				wantErr(t, err, tc.want)
			} else if err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
}
