package intel

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/binary"
	"encoding/hex"
	"fmt"
)

// Machine is one platform with TDX.
type Machine struct {
	World    *World
	Platform Platform
	PCK      Authority
	// Attestation is the quoting enclave's key for quotes. Its certificate is
	// only a vessel.
	Attestation Authority
	QE          QE
}

// Platform is what the PCK certificate says.
type Platform struct {
	CA         string // "platform" or "processor"
	FMSPC      string
	PCEID      string
	Components [16]byte
	PCESVN     int
}

// QE is what the quoting enclave's report says.
type QE struct {
	MRSigner   [32]byte
	Attributes [16]byte
	MiscSelect [4]byte
	ProdID     uint16
	SVN        uint16
	AuthData   []byte
	// Tail follows the digest in the report's data, where zeros must be.
	Tail [32]byte
}

// DefaultPlatform is up to date by the default TCB info.
func DefaultPlatform() Platform {
	return Platform{CA: "platform", FMSPC: "50806f000000", PCEID: "0000", PCESVN: 13,
		Components: [16]byte{8, 8, 2, 2, 4, 1, 0, 5}}
}

// Machine certifies a platform.
func (w *World) Machine(p Platform) (*Machine, error) {
	m := &Machine{World: w, Platform: p}
	issuer := &w.Platform
	if p.CA == "processor" {
		issuer = &w.Processor
	}
	ext, err := p.extension()
	if err != nil {
		return nil, err
	}
	if m.PCK, err = w.Issue("Intel SGX PCK Certificate", issuer, false, ext); err != nil {
		return nil, err
	}
	if m.Attestation, err = w.Issue("attestation key", &Authority{}, false); err != nil {
		return nil, err
	}
	m.QE = QE{ProdID: 2, SVN: 6, AuthData: []byte("authentication data"), Attributes: [16]byte{0x11, 0, 0, 0, 0, 0, 0, 0, 0xe7}}
	copy(m.QE.MRSigner[:], qeSigner)
	return m, nil
}

// qeSigner is who signs the synthetic quoting enclave.
var qeSigner = []byte("synthetic quoting enclave signer")

type attribute struct {
	ID    asn1.ObjectIdentifier
	Value any
}

func sgx(ids ...int) asn1.ObjectIdentifier {
	return append(asn1.ObjectIdentifier{1, 2, 840, 113741, 1, 13, 1}, ids...)
}

// extension is Intel's SGX extension: PPID, TCB, PCE-ID, FMSPC, type, and of a
// platform CA the instance ID and the configuration.
func (p Platform) extension() (pkix.Extension, error) {
	fmspc, err := hex.DecodeString(p.FMSPC)
	if err != nil {
		return pkix.Extension{}, err
	}
	pceID, err := hex.DecodeString(p.PCEID)
	if err != nil {
		return pkix.Extension{}, err
	}
	var tcb []attribute
	for i, svn := range p.Components {
		tcb = append(tcb, attribute{sgx(2, i+1), int(svn)})
	}
	tcb = append(tcb, attribute{sgx(2, 17), p.PCESVN}, attribute{sgx(2, 18), p.Components[:]})
	ppid, piid := make([]byte, 16), make([]byte, 16)
	rand.Read(ppid)
	rand.Read(piid)
	all := []attribute{{sgx(1), ppid}, {sgx(2), tcb}, {sgx(3), pceID}, {sgx(4), fmspc}, {sgx(5), asn1.Enumerated(0)}}
	if p.CA == "platform" {
		all = append(all, attribute{sgx(6), piid},
			attribute{sgx(7), []attribute{{sgx(7, 1), true}, {sgx(7, 2), false}, {sgx(7, 3), true}}})
	}
	der, err := asn1.Marshal(all)
	return pkix.Extension{Id: sgx(), Value: der}, err
}

// Fields of a quote. The zero value of a field is zero in the quote.
type Fields struct {
	Version  uint16 // 4 or 5; default 4
	Body15   bool   // of version 5: a TD report 1.5
	TCBSVN   [16]byte
	Signer   [48]byte
	Seam     [48]byte
	SeamAttr [8]byte
	Attr     [8]byte
	XFAM     [8]byte
	MRTD     [48]byte
	Config   [48]byte
	Owner    [48]byte
	OwnerCfg [48]byte
	RTMR     [4][48]byte
	Report   [64]byte
	TCBSVN2  [16]byte
	Service  [48]byte
}

// DefaultFields are those of a TD on a module 1.5 that is up to date by the
// default TCB info.
func DefaultFields() Fields {
	return Fields{Version: 4, TCBSVN: [16]byte{5, 1, 6}, TCBSVN2: [16]byte{6, 1, 6}, Attr: [8]byte{3: 0x10},
		XFAM: [8]byte{0xe7, 0, 6}, MRTD: [48]byte{1, 2, 3}, Seam: [48]byte{9}}
}

// Header is the first 48 bytes of a quote.
func (f Fields) header() []byte {
	h := binary.LittleEndian.AppendUint16(nil, f.Version)
	h = append(h, 2, 0, 0x81, 0, 0, 0, 0, 0, 0, 0)
	h = append(h, 0x93, 0x9a, 0x72, 0x33, 0xf7, 0x9c, 0x4c, 0xa9, 0x94, 0x0a, 0x0d, 0xb3, 0x95, 0x7f, 0x06, 0x07)
	return append(h, make([]byte, 20)...)
}

// Signed is what the attestation key signs: header, and body with what precedes
// it in a quote of version 5.
func (f Fields) Signed() []byte {
	if f.Version == 0 {
		f.Version = 4
	}
	var body []byte
	for _, b := range [][]byte{f.TCBSVN[:], f.Seam[:], f.Signer[:], f.SeamAttr[:], f.Attr[:], f.XFAM[:], f.MRTD[:], f.Config[:],
		f.Owner[:], f.OwnerCfg[:], f.RTMR[0][:], f.RTMR[1][:], f.RTMR[2][:], f.RTMR[3][:], f.Report[:]} {
		body = append(body, b...)
	}
	out := f.header()
	if f.Version == 5 {
		kind := uint16(2)
		if f.Body15 {
			kind, body = 3, append(append(body, f.TCBSVN2[:]...), f.Service[:]...)
		}
		out = binary.LittleEndian.AppendUint16(out, kind)
		out = binary.LittleEndian.AppendUint32(out, uint32(len(body)))
	}
	return append(out, body...)
}

// TDReport is the TDREPORT_STRUCT of 1024 bytes that a TD gets from its module
// and that a quote is made of. Its MACs are zero.
func (f Fields) TDReport() []byte {
	out := make([]byte, 1024)
	out[0] = 0x81 // type: TD
	copy(out[128:], f.Report[:])
	copy(out[256+8:], f.TCBSVN[:])
	copy(out[256+24:], f.Seam[:])
	copy(out[256+72:], f.Signer[:])
	copy(out[256+120:], f.SeamAttr[:])
	at := 512
	for _, b := range [][]byte{f.Attr[:], f.XFAM[:], f.MRTD[:], f.Config[:], f.Owner[:], f.OwnerCfg[:],
		f.RTMR[0][:], f.RTMR[1][:], f.RTMR[2][:], f.RTMR[3][:]} {
		at += copy(out[at:], b)
	}
	return out
}

// Quote has the quoting enclave sign fields.
func (m *Machine) Quote(f Fields) ([]byte, error) {
	point, err := m.Attestation.Key.PublicKey.Bytes()
	if err != nil {
		return nil, err
	}
	key := point[1:]
	report := m.report(sha256.Sum256(append(key[:64:64], m.QE.AuthData...)))
	qeSignature, err := sign(m.PCK.Key, report)
	if err != nil {
		return nil, err
	}
	signed := f.Signed()
	signature, err := sign(m.Attestation.Key, signed)
	if err != nil {
		return nil, err
	}
	chain := append(m.Chain(), 0)
	inner := append(report, qeSignature...)
	inner = binary.LittleEndian.AppendUint16(inner, uint16(len(m.QE.AuthData)))
	inner = append(inner, m.QE.AuthData...)
	inner = binary.LittleEndian.AppendUint16(inner, 5)
	inner = binary.LittleEndian.AppendUint32(inner, uint32(len(chain)))
	inner = append(inner, chain...)

	auth := append(signature, key...)
	auth = binary.LittleEndian.AppendUint16(auth, 6)
	auth = binary.LittleEndian.AppendUint32(auth, uint32(len(inner)))
	auth = append(auth, inner...)
	out := binary.LittleEndian.AppendUint32(signed, uint32(len(auth)))
	return append(out, auth...), nil
}

// Chain is the PCK's, in PEM.
func (m *Machine) Chain() []byte {
	issuer := m.World.Platform
	if m.Platform.CA == "processor" {
		issuer = m.World.Processor
	}
	return PEM(m.PCK.Certificate, issuer.Certificate, m.World.Root.Certificate)
}

// report is the quoting enclave's SGX report.
func (m *Machine) report(data [32]byte) []byte {
	r := make([]byte, 384)
	copy(r, m.Platform.Components[:])
	copy(r[16:], m.QE.MiscSelect[:])
	copy(r[48:], m.QE.Attributes[:])
	copy(r[64:], "enclave measurement")
	copy(r[128:], m.QE.MRSigner[:])
	binary.LittleEndian.PutUint16(r[256:], m.QE.ProdID)
	binary.LittleEndian.PutUint16(r[258:], m.QE.SVN)
	copy(r[320:], data[:])
	copy(r[352:], m.QE.Tail[:])
	return r
}

// sign makes a signature of two 32-byte numbers over SHA-256.
func sign(key *ecdsa.PrivateKey, message []byte) ([]byte, error) {
	digest := sha256.Sum256(message)
	r, s, err := ecdsa.Sign(rand.Reader, key, digest[:])
	if err != nil {
		return nil, fmt.Errorf("sign: %w", err)
	}
	out := make([]byte, 64)
	r.FillBytes(out[:32])
	s.FillBytes(out[32:])
	return out, nil
}
