package tpm

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"maps"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"google.golang.org/protobuf/encoding/protowire"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/saved"
	"github.com/keyagent/keyagent/test/sim/swtpm"
)

// fieldsOf reads the length-delimited fields of a protobuf message by number.
func fieldsOf(t testing.TB, data []byte) map[protowire.Number][][]byte {
	t.Helper()
	out := map[protowire.Number][][]byte{}
	for len(data) > 0 {
		n, typ, size := protowire.ConsumeTag(data)
		if size < 0 {
			t.Fatal(protowire.ParseError(size))
		}
		data = data[size:]
		if typ == protowire.BytesType {
			v, _ := protowire.ConsumeBytes(data)
			out[n] = append(out[n], v)
		}
		data = data[protowire.ConsumeFieldValue(n, typ, data):]
	}
	return out
}

// real is evidence of a real instance, see testdata/google/README.md.
func real(t testing.TB) (offer *attestv1.TPMOffer, e *attestv1.TPMEvidence, pcrs []uint32) {
	t.Helper()
	a := fieldsOf(t, must[[]byte](t)(os.ReadFile("testdata/google/cos-85.pb")))
	offer = &attestv1.TPMOffer{AkPublic: a[1][0], AkCertificate: a[6][0]}
	for _, quote := range a[2] {
		q := fieldsOf(t, quote)
		bank := fieldsOf(t, q[3][0])
		values := map[uint32][]byte{}
		for _, entry := range bank[2] {
			value := fieldsOf(t, entry)[2][0]
			var n uint64
			if entry[0] == 0x08 {
				n, _ = protowire.ConsumeVarint(entry[1:])
			}
			values[uint32(n)] = value
		}
		if len(values[0]) != 32 {
			continue
		}
		e = &attestv1.TPMEvidence{Attest: q[1][0], Signature: q[2][0], EventLog: a[3][0]}
		pcrs = slices.Sorted(maps.Keys(values))
		for _, n := range pcrs {
			e.PcrValues = append(e.PcrValues, values[n])
		}
	}
	return offer, e, pcrs
}

// What a real vTPM of Google's signed verifies, at a time when it was valid, and
// its certificate names the instance.
func TestARealInstanceOfGoogleIsRecognised(t *testing.T) {
	offer, e, pcrs := real(t)
	v := must[*Verifier](t)(NewVerifier(VerifierOptions{
		Trust: func() Trust { return Trust{AKRoots: Google(), PCRs: pcrs} },
		Now:   func() time.Time { return time.Date(2021, 9, 1, 0, 0, 0, 0, time.UTC) },
	}))
	q := must[attestation.Question](t)(v.Begin(t.Context(), marshal(t, offer))).(*question)
	for name, want := range map[string]any{
		"gce_zone": "us-central1-a", "gce_project_id": "google.com:wuale-gcp-testing", "gce_instance_name": "cos-test", "gce_production": true,
	} {
		if got := q.hw.facts[name]; got != want {
			t.Errorf("%s is %v, want %v", name, got, want)
		}
	}
	if q.hw.trust != "ak-root:google" {
		t.Errorf("vouched for by %q", q.hw.trust)
	}
	nonce, _ := hex.DecodeString("9009")
	quoted, err := verifyQuote(e, q.ak.Key, nonce, pcrs)
	if err != nil {
		t.Fatal(err)
	}
	if string(quoted.Signer) != string(qualifiedName(q.ak.Name)) {
		t.Error("the real key is not a primary key of the endorsement hierarchy")
	}
	if len(quoted.Measurements["pcr0"].Events) == 0 || len(quoted.Measurements["pcr4"].Events) == 0 {
		t.Error("the real event log explains nothing")
	}
	_, err = VerifyQuote(e, q.ak.Key, testBinder, pcrs)
	wantErr(t, err, ErrBinder)
	e.Signature[len(e.Signature)-1] ^= 1
	_, err = verifyQuote(e, q.ak.Key, nonce, pcrs)
	wantErr(t, err, ErrSignature)
}

// provision does what a cloud does with a vTPM: it certifies a key and leaves
// certificate and template in NV.
func provision(t testing.TB, p *swtpm.TPM, m *maker, template tpm2.TPMTPublic, at int, change func(*x509.Certificate)) {
	t.Helper()
	public := must[*tpm2.TPMTPublic](t)(swtpm.Primary(p.Device, template, 0))
	key := must[any](t)(tpm2.Pub(*public))
	der := m.certify(key, func(c *x509.Certificate) {
		c.UnknownExtKeyUsage = []asn1.ObjectIdentifier{oidAKCertificate}
		info := must[[]byte](t)(asn1.Marshal(instance{"lab-1", 7, "lab-project", 11, "node", instanceProperties{1, true}}))
		c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: oidInstance, Value: info})
		if change != nil {
			change(c)
		}
	})
	for index, data := range map[tpm2.TPMHandle][]byte{cloudAKs[at].certificate: der, cloudAKs[at].template: tpm2.Marshal(template)} {
		if err := swtpm.WriteNV(p.Device, uint32(index), data); err != nil {
			t.Fatal(err)
		}
	}
}

// A cloud's attestation key takes the place of the endorsement key, with ECC and
// with RSA; an operator may insist on either.
func TestACertifiedAttestationKeyStandsForTheTPM(t *testing.T) {
	for name, tt := range map[string]struct {
		template tpm2.TPMTPublic
		at       int
	}{"ecc": {akTemplate, 0}, "rsa": {swtpm.RSAAKTemplate(), 1}} {
		t.Run(name, func(t *testing.T) {
			p, cloud := swtpm.New(t, nil), newMaker(t, nil)
			provision(t, p, cloud, tt.template, tt.at, nil)
			trust := trustOf(t, p)
			trust.AKRoots = []Root{{Name: "cloud", Certificate: cloud.cert}}
			v := newVerifier(t, trust)
			c, err := exchange{}.run(t, newIssuer(t, p, IssuerOptions{}), v)
			if err != nil {
				t.Fatal(err)
			}
			if c.Trust != "ak-root:cloud" || c.Facts["gce_project_id"] != "lab-project" || c.Facts["gce_instance_id"] != uint64(11) {
				t.Errorf("%+v", c)
			}
			own, err := exchange{}.run(t, newIssuer(t, p, IssuerOptions{AK: AKOwn}), v)
			if err != nil || own.Trust != "root:lab" {
				t.Errorf("%+v, %v", own, err)
			}
			s := must[*attestv1.Saved](t)(saved.Collect(t.Context(), []attestation.Issuer{newIssuer(t, p, IssuerOptions{AK: AKCloud})}, []uint32{0}))
			if _, err := saved.Verify(t.Context(), []attestation.Verifier{v}, s); err != nil {
				t.Errorf("from a file: %v", err)
			}
		})
	}
}

// Case 25, for keys that a cloud certified.
func TestAnAttestationKeyCertificateThatDoesNotFitIsRefused(t *testing.T) {
	p, cloud := swtpm.New(t, nil), newMaker(t, nil)
	provision(t, p, cloud, akTemplate, 0, nil)
	a := must[attestation.Attempt](t)(newIssuer(t, p, IssuerOptions{}).Begin(t.Context()))
	defer a.Close()
	genuine := &attestv1.TPMOffer{}
	unmarshal(t, a.Offer(), genuine)
	ak := must[AK](t)(ParseAK(genuine.GetAkPublic()))
	trust := Trust{AKRoots: []Root{{Name: "cloud", Certificate: cloud.cert}}, PCRs: []uint32{0}}
	certify := func(m *maker, change func(*x509.Certificate)) []byte {
		return m.certify(ak.Key, func(c *x509.Certificate) {
			c.UnknownExtKeyUsage = []asn1.ObjectIdentifier{oidAKCertificate}
			if change != nil {
				change(c)
			}
		})
	}
	for name, tt := range map[string]struct {
		trust Trust
		offer func(*attestv1.TPMOffer)
		want  error
	}{
		"no root for attestation keys": {Trust{Roots: trust.AKRoots, PCRs: trust.PCRs}, nil, ErrAKUntrusted},
		"of another chain":             {trust, func(o *attestv1.TPMOffer) { o.AkCertificate = certify(newMaker(t, nil), nil) }, ErrAKUntrusted},
		"an authority's": {trust, func(o *attestv1.TPMOffer) {
			o.AkCertificate = certify(cloud, func(c *x509.Certificate) { c.IsCA = true })
		}, ErrAKCertificate},
		"for servers": {trust, func(o *attestv1.TPMOffer) {
			o.AkCertificate = certify(cloud, func(c *x509.Certificate) {
				c.UnknownExtKeyUsage, c.ExtKeyUsage = nil, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
			})
		}, ErrAKCertificate},
		"expired": {trust, func(o *attestv1.TPMOffer) {
			o.AkCertificate = certify(cloud, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) })
		}, ErrAKExpired},
		"an unknown critical extension": {trust, func(o *attestv1.TPMOffer) {
			o.AkCertificate = certify(cloud, func(c *x509.Certificate) {
				c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: asn1.ObjectIdentifier{1, 2, 3}, Critical: true, Value: []byte{5, 0}})
			})
		}, ErrAKCertificate},
		"an instance that cannot be read": {trust, func(o *attestv1.TPMOffer) {
			o.AkCertificate = certify(cloud, func(c *x509.Certificate) {
				c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: oidInstance, Value: []byte{0x30, 0x00, 0x00}})
			})
		}, ErrAKCertificate},
		"another key":                {trust, func(o *attestv1.TPMOffer) { o.AkPublic = tpm2.Marshal(softwareAK(t)) }, ErrAKCertificate},
		"an endorsement key as well": {trust, func(o *attestv1.TPMOffer) { o.EkPublic = o.GetAkPublic() }, ErrMalformed},
		"garbage":                    {trust, func(o *attestv1.TPMOffer) { o.AkCertificate = []byte{0x30, 0x03, 1, 2, 3} }, ErrMalformed},
	} {
		t.Run(name, func(t *testing.T) {
			o := &attestv1.TPMOffer{}
			unmarshal(t, a.Offer(), o)
			if tt.offer != nil {
				tt.offer(o)
			}
			_, err := newVerifier(t, tt.trust).Begin(t.Context(), marshal(t, o))
			wantErr(t, err, tt.want)
		})
	}
}

// softwareAK has the attributes of a TPM's key, which anybody can write down.
func softwareAK(t testing.TB) tpm2.TPMTPublic {
	t.Helper()
	key := newMaker(t, nil).key
	point := must[[]byte](t)(key.PublicKey.Bytes())
	pub := akTemplate
	pub.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
		X: tpm2.TPM2BECCParameter{Buffer: point[1:33]}, Y: tpm2.TPM2BECCParameter{Buffer: point[33:]}})
	return pub
}
