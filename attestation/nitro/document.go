package nitro

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha512"
	"crypto/x509"
	"encoding/binary"
	"fmt"
	"math/big"

	"github.com/fxamacker/cbor/v2"

	"github.com/keyagent/keyagent/internal/pattern"
)

// definite and anyLength read CBOR in which every value has one meaning: no key twice, no
// field that is not known, no tags. The frame has definite lengths only. The payload
// is signed as it stands, and AWS writes its maps with indefinite length.
var (
	definite  = reader(cbor.IndefLengthForbidden)
	anyLength = reader(cbor.IndefLengthAllowed)
)

func reader(lengths cbor.IndefLengthMode) cbor.DecMode {
	m, err := cbor.DecOptions{
		IndefLength:       lengths,
		DupMapKey:         cbor.DupMapKeyEnforcedAPF,
		TagsMd:            cbor.TagsForbidden,
		MaxNestedLevels:   4,
		MaxArrayElements:  16,
		MaxMapPairs:       32,
		ExtraReturnErrors: cbor.ExtraDecErrorUnknownField,
		UTF8:              cbor.UTF8RejectInvalid,
		FieldNameMatching: cbor.FieldNameMatchingCaseSensitive,
		BignumTag:         cbor.BignumTagForbidden,
		NaN:               cbor.NaNDecodeForbidden,
		Inf:               cbor.InfDecodeForbidden,
	}.DecMode()
	if err != nil {
		panic(err) // the options are constants
	}
	return m
}

// tagSign1 may stand before a COSE_Sign1: RFC 9052, section 4.2.
const tagSign1 = 0xD2

// es384 is the only protected header: ECDSA with SHA-384, RFC 9053.
var es384 = []byte{0xA1, 0x01, 0x38, 0x22}

// signed is a COSE_Sign1 taken apart. Nothing in it is verified.
type signed struct {
	_         struct{} `cbor:",toarray"`
	Protected []byte
	Header    map[any]any
	Payload   []byte
	Signature []byte
}

// document is a payload. Nothing in it is verified until [signed.verify].
type document struct {
	ModuleID    string            `cbor:"module_id"`
	Digest      string            `cbor:"digest"`
	Timestamp   uint64            `cbor:"timestamp"` // milliseconds since 1970
	PCRs        map[uint64][]byte `cbor:"nitrotpm_pcrs"`
	Certificate []byte            `cbor:"certificate"`
	Bundle      [][]byte          `cbor:"cabundle"`
	PublicKey   []byte            `cbor:"public_key"`
	UserData    []byte            `cbor:"user_data"`
	Nonce       []byte            `cbor:"nonce"`
	// Enclave is what the document of an enclave has in place of PCRs. It is here to
	// be refused by name.
	Enclave cbor.RawMessage `cbor:"pcrs"`
}

func parse(data []byte) (*signed, *document, error) {
	if len(data) == 0 || len(data) > maxDocument {
		return nil, nil, fmt.Errorf("%w: %d bytes", ErrMalformed, len(data))
	}
	if data[0] == tagSign1 {
		data = data[1:]
	}
	var s signed
	if err := definite.Unmarshal(data, &s); err != nil {
		return nil, nil, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	if !bytes.Equal(s.Protected, es384) || len(s.Header) != 0 || len(s.Signature) != 2*48 {
		return nil, nil, fmt.Errorf("%w: only ES384 without other headers is accepted", ErrMalformed)
	}
	var d document
	if err := anyLength.Unmarshal(s.Payload, &d); err != nil {
		return nil, nil, fmt.Errorf("%w: payload: %w", ErrMalformed, err)
	}
	return &s, &d, d.check()
}

// module is how a NitroTPM is named: the instance and its TPM. The modules of
// enclaves are named "-enc" and a number.
var module = pattern.New(`^(i-[0-9a-f]{8,17})-tpm[0-9a-f]{16}$`)

func (d *document) check() error {
	if d.Enclave != nil || !module.MatchString(d.ModuleID) {
		return fmt.Errorf("%w: module %q", ErrNotNitroTPM, d.ModuleID)
	}
	if d.Digest != "SHA384" || d.Timestamp == 0 {
		return fmt.Errorf("%w: digest %q, timestamp %d", ErrMalformed, d.Digest, d.Timestamp)
	}
	if len(d.PublicKey) > 0 || len(d.UserData) > 0 {
		return fmt.Errorf("%w: it has a public key or user data", ErrMalformed)
	}
	if len(d.PCRs) == 0 {
		return fmt.Errorf("%w: no PCRs", ErrMalformed)
	}
	for n, value := range d.PCRs {
		if n > 23 || len(value) != sha512.Size384 {
			return fmt.Errorf("%w: PCR %d of %d bytes", ErrMalformed, n, len(value))
		}
	}
	if len(d.Bundle) > maxCertificates {
		return fmt.Errorf("%w: %d certificates", ErrMalformed, len(d.Bundle))
	}
	return nil
}

// instance is the part of the module's name that stays.
func (d *document) instance() string { return module.FindStringSubmatch(d.ModuleID)[1] }

// certificate parses the key's certificate and demands that it may sign.
func (d *document) certificate() (*x509.Certificate, *ecdsa.PublicKey, error) {
	cert, err := parseCertificate(d.Certificate)
	if err != nil {
		return nil, nil, err
	}
	key, ok := cert.PublicKey.(*ecdsa.PublicKey)
	if !ok || key.Curve != elliptic.P384() || cert.IsCA || cert.KeyUsage&x509.KeyUsageDigitalSignature == 0 {
		return nil, nil, fmt.Errorf("%w: %q", ErrCertificate, cert.Subject.CommonName)
	}
	return cert, key, nil
}

func parseCertificate(der []byte) (*x509.Certificate, error) {
	if len(der) > maxCertificate {
		return nil, fmt.Errorf("%w: certificate of %d bytes", ErrMalformed, len(der))
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("%w: certificate: %w", ErrMalformed, err)
	}
	return cert, nil
}

// verify checks the signature over the Sig_structure of RFC 9052, section 4.4:
// an array of "Signature1", the protected header, no external data, the payload.
func (s *signed) verify(key *ecdsa.PublicKey) bool {
	h := sha512.New384()
	h.Write([]byte("\x84\x6aSignature1"))
	h.Write(text(s.Protected))
	h.Write(text(nil))
	h.Write(text(s.Payload))
	r, t := new(big.Int).SetBytes(s.Signature[:48]), new(big.Int).SetBytes(s.Signature[48:])
	return ecdsa.Verify(key, h.Sum(nil), r, t)
}

// text is a byte string in CBOR's shortest form, of less than 64 KiB.
func text(b []byte) []byte {
	var head []byte
	switch n := len(b); {
	case n < 24:
		head = []byte{0x40 | byte(n)}
	case n < 256:
		head = []byte{0x58, byte(n)}
	default:
		head = binary.BigEndian.AppendUint16([]byte{0x59}, uint16(n))
	}
	return append(head, b...)
}
