package tpm

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"math/big"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/test/sim/swtpm"
)

// maker is a certificate authority of this test, who certifies anything.
type maker struct {
	t    testing.TB
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newMaker(t testing.TB, parent *maker) *maker {
	t.Helper()
	m := &maker{t: t, key: must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "maker"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	if parent == nil {
		parent = &maker{cert: template, key: m.key}
	} else {
		template.Subject.CommonName = "maker's office"
	}
	der := must[[]byte](t)(x509.CreateCertificate(rand.Reader, template, parent.cert, m.key.Public(), parent.key))
	m.cert = must[*x509.Certificate](t)(x509.ParseCertificate(der))
	return m
}

// directoryName is what the EK Credential Profile puts into a certificate with
// an empty subject: a critical subject alternative name.
var directoryName = pkix.Extension{Id: oidSubjectAltName, Critical: true, Value: []byte{
	0x30, 0x12, 0xa4, 0x10, 0x30, 0x0e, 0x31, 0x0c, 0x30, 0x0a, 0x06, 0x05, 0x67, 0x81, 0x05, 0x02, 0x01, 0x0c, 0x01, 'k'}}

func (m *maker) certify(pub any, change func(*x509.Certificate)) []byte {
	m.t.Helper()
	c := &x509.Certificate{
		SerialNumber: big.NewInt(2), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageKeyAgreement,
		UnknownExtKeyUsage: []asn1.ObjectIdentifier{oidEKCertificate}, ExtraExtensions: []pkix.Extension{directoryName},
	}
	if change != nil {
		change(c)
	}
	return must[[]byte](m.t)(x509.CreateCertificate(rand.Reader, c, m.cert, pub, m.key))
}

// genuineOffer is what a TPM offers, for tests that need no more of it.
func genuineOffer(t testing.TB, p *swtpm.TPM) (*attestv1.TPMOffer, any) {
	t.Helper()
	f := newForger(t, p)
	defer f.Close()
	o := &attestv1.TPMOffer{}
	unmarshal(t, f.Offer(), o)
	return o, must[any](t)(tpm2.Pub(f.ekey.public))
}

// Case 25.
func TestAnEKCertificateThatDoesNotFitIsRefused(t *testing.T) {
	p := swtpm.New(t, nil)
	offer, ek := genuineOffer(t, p)
	root, stranger := newMaker(t, nil), newMaker(t, nil)
	office := newMaker(t, root)
	other := must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P384(), rand.Reader)).Public()
	v := newVerifier(t, Trust{Roots: []Root{{Name: "other", Certificate: newMaker(t, nil).cert}, {Name: "maker", Certificate: root.cert}}, PCRs: []uint32{0}})
	begin := func(change func(*attestv1.TPMOffer)) error {
		o := &attestv1.TPMOffer{}
		unmarshal(t, marshal(t, offer), o)
		change(o)
		_, err := v.Begin(t.Context(), marshal(t, o))
		return err
	}
	cert := func(m *maker, pub any, change func(*x509.Certificate)) func(*attestv1.TPMOffer) {
		return func(o *attestv1.TPMOffer) { o.EkCertificate = m.certify(pub, change) }
	}
	usage := func(u ...x509.ExtKeyUsage) func(*x509.Certificate) {
		return func(c *x509.Certificate) { c.UnknownExtKeyUsage, c.ExtKeyUsage = nil, u }
	}
	for name, change := range map[string]func(*attestv1.TPMOffer){
		"by the root":                        cert(root, ek, nil),
		"without an extended key usage":      cert(root, ek, usage()),
		"with a subject and no other name":   cert(root, ek, func(c *x509.Certificate) { c.ExtraExtensions, c.Subject.CommonName = nil, "ek" }),
		"by an office that the TPM names":    func(o *attestv1.TPMOffer) { cert(office, ek, nil)(o); o.EkIntermediates = [][]byte{office.cert.Raw} },
		"an office that is of no use beside": func(o *attestv1.TPMOffer) { cert(root, ek, nil)(o); o.EkIntermediates = [][]byte{stranger.cert.Raw} },
	} {
		if err := begin(change); err != nil {
			t.Errorf("a good certificate %s: %v", name, err)
		}
	}
	for name, tt := range map[string]struct {
		change func(*attestv1.TPMOffer)
		want   error
	}{
		"of another chain":               {cert(stranger, ek, nil), ErrEKUntrusted},
		"of the TPM's own chain":         {func(*attestv1.TPMOffer) {}, ErrEKUntrusted},
		"by an office that is not there": {cert(office, ek, nil), ErrEKUntrusted},
		"none":                           {func(o *attestv1.TPMOffer) { o.EkCertificate = nil }, ErrEKUntrusted},
		"the stranger's root comes along": {func(o *attestv1.TPMOffer) {
			cert(stranger, ek, nil)(o)
			o.EkIntermediates = [][]byte{stranger.cert.Raw}
		}, ErrEKUntrusted},
		"of another key": {cert(root, other, nil), ErrEKCertificate},
		"an unknown critical extension": {cert(root, ek, func(c *x509.Certificate) {
			c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: asn1.ObjectIdentifier{1, 2, 3}, Critical: true, Value: []byte{5, 0}})
		}), ErrEKCertificate},
		"a critical name that is no directory's": {cert(root, ek, func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: oidSubjectAltName, Critical: true, Value: []byte{0x30, 0x03, 0x88, 0x01, 0x2a}}}
		}), ErrEKCertificate},
		"a certificate authority's": {cert(root, ek, func(c *x509.Certificate) { c.IsCA = true }), ErrEKCertificate},
		"for TLS servers":           {cert(root, ek, usage(x509.ExtKeyUsageServerAuth)), ErrEKCertificate},
		"for any use":               {cert(root, ek, usage(x509.ExtKeyUsageAny)), ErrEKCertificate},
		"expired": {cert(root, ek, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }),
			ErrEKExpired},
		"not yet valid":     {cert(root, ek, func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) }), ErrEKExpired},
		"not a certificate": {func(o *attestv1.TPMOffer) { o.EkCertificate = []byte("certificate") }, ErrMalformed},
		"a byte behind it":  {func(o *attestv1.TPMOffer) { o.EkCertificate = append(root.certify(ek, nil), 0) }, ErrMalformed},
		"of a megabyte":     {func(o *attestv1.TPMOffer) { o.EkCertificate = make([]byte, 1<<20) }, ErrMalformed},
		"an endless chain":  {func(o *attestv1.TPMOffer) { cert(root, ek, nil)(o); o.EkIntermediates = make([][]byte, 5) }, ErrMalformed},
		"an office with a key that is only work": {func(o *attestv1.TPMOffer) {
			huge := &rsa.PublicKey{N: new(big.Int).SetBit(big.NewInt(1), 4096, 1), E: 65537}
			cert(root, ek, nil)(o)
			o.EkIntermediates = [][]byte{root.certify(huge, nil)}
		}, ErrMalformed},
		"an office with an exponent that is only work": {func(o *attestv1.TPMOffer) {
			huge := &rsa.PublicKey{N: new(big.Int).SetBit(big.NewInt(1), 2047, 1), E: 1<<31 - 1}
			cert(root, ek, nil)(o)
			o.EkIntermediates = [][]byte{root.certify(huge, nil)}
		}, ErrMalformed},
		"a broken office":    {func(o *attestv1.TPMOffer) { cert(root, ek, nil)(o); o.EkIntermediates = [][]byte{{1}} }, ErrMalformed},
		"a signature broken": {func(o *attestv1.TPMOffer) { c := root.certify(ek, nil); o.EkCertificate = flip(c, len(c)-1) }, ErrEKUntrusted},
		"an office that may sign TPMs, but is a TPM": {func(o *attestv1.TPMOffer) {
			leaf := root.certify(office.key.Public(), nil)
			o.EkCertificate, o.EkIntermediates = office.certify(ek, nil), [][]byte{leaf}
		}, ErrEKUntrusted},
	} {
		t.Run(name, func(t *testing.T) { wantErr(t, begin(tt.change), tt.want) })
	}
}

// Case 25: public areas that are not an endorsement key's.
func TestAnOfferThatIsMalformedIsRefused(t *testing.T) {
	p := swtpm.New(t, nil)
	offer, _ := genuineOffer(t, p)
	v := newVerifier(t, trustOf(t, p))
	ek := *must[*tpm2.TPMTPublic](t)(tpm2.Unmarshal[tpm2.TPMTPublic](offer.EkPublic))
	with := func(change func(*tpm2.TPMAObject)) func(*attestv1.TPMOffer) {
		return func(o *attestv1.TPMOffer) {
			pub := ek
			change(&pub.ObjectAttributes)
			o.EkPublic = tpm2.Marshal(pub)
		}
	}
	for name, tt := range map[string]struct {
		change func(*attestv1.TPMOffer)
		want   error
	}{
		"EK not fixed":           {with(func(a *tpm2.TPMAObject) { a.FixedTPM = false }), ErrEKCertificate},
		"EK not restricted":      {with(func(a *tpm2.TPMAObject) { a.Restricted = false }), ErrEKCertificate},
		"EK signs":               {with(func(a *tpm2.TPMAObject) { a.SignEncrypt = true }), ErrEKCertificate},
		"EK does not decrypt":    {with(func(a *tpm2.TPMAObject) { a.Decrypt = false }), ErrEKCertificate},
		"the AK as the EK":       {func(o *attestv1.TPMOffer) { o.EkPublic = o.AkPublic }, ErrEKCertificate},
		"the EK as the AK":       {func(o *attestv1.TPMOffer) { o.AkPublic = o.EkPublic }, ErrAKUnfit},
		"no EK":                  {func(o *attestv1.TPMOffer) { o.EkPublic = nil }, ErrMalformed},
		"no AK":                  {func(o *attestv1.TPMOffer) { o.AkPublic = nil }, ErrMalformed},
		"a byte behind the AK":   {func(o *attestv1.TPMOffer) { o.AkPublic = append(bytes.Clone(o.AkPublic), 0) }, ErrMalformed},
		"half an AK":             {func(o *attestv1.TPMOffer) { o.AkPublic = o.AkPublic[:len(o.AkPublic)/2] }, ErrMalformed},
		"an AK of a megabyte":    {func(o *attestv1.TPMOffer) { o.AkPublic = make([]byte, 1<<20) }, ErrMalformed},
		"an AK that is no point": {func(o *attestv1.TPMOffer) { o.AkPublic = flip(o.AkPublic, len(o.AkPublic)-1) }, ErrAKUnfit},
	} {
		t.Run(name, func(t *testing.T) {
			o := &attestv1.TPMOffer{}
			unmarshal(t, marshal(t, offer), o)
			tt.change(o)
			_, err := v.Begin(t.Context(), marshal(t, o))
			wantErr(t, err, tt.want)
		})
	}
	_, err := v.Begin(t.Context(), []byte{0xff})
	wantErr(t, err, ErrMalformed)
}
