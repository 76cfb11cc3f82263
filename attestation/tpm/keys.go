package tpm

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// EKType chooses the endorsement key that an issuer uses.
type EKType string

// The endorsement keys of the EK Credential Profile that come with a
// certificate on today's machines. Auto takes P-384 where its certificate is
// present, since making an RSA key again takes seconds on many TPMs.
const (
	EKAuto    EKType = "auto"
	EKRSA2048 EKType = "rsa-2048"
	EKP384    EKType = "ecc-p384"
)

// ek describes one endorsement key of the EK Credential Profile.
type ek struct {
	kind        EKType
	certificate tpm2.TPMHandle // NV index
	persistent  tpm2.TPMHandle // where platforms keep it, if they do
	template    tpm2.TPMTPublic
	// auth authorises the EK's use; pub salts the session, so that what comes
	// out of the TPM is encrypted to somebody who knew the EK.
	auth func(handle tpm2.TPMHandle, pub tpm2.TPMTPublic) tpm2.Session
}

var eks = []ek{
	{EKP384, 0x01c00016, 0x81010016, p384EKTemplate, endorsementPolicyBSession},
	{EKRSA2048, 0x01c00002, 0x81010001, tpm2.RSAEKTemplate, endorsementPolicyASession},
}

// p384EKTemplate is template H-3 of the EK Credential Profile.
var p384EKTemplate = tpm2.TPMTPublic{
	Type:    tpm2.TPMAlgECC,
	NameAlg: tpm2.TPMAlgSHA384,
	ObjectAttributes: tpm2.TPMAObject{
		FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true,
		UserWithAuth: true, AdminWithPolicy: true, Restricted: true, Decrypt: true,
	},
	AuthPolicy: tpm2.TPM2BDigest{Buffer: []byte{ // PolicyB, SHA-384
		0xB2, 0x6E, 0x7D, 0x28, 0xD1, 0x1A, 0x50, 0xBC, 0x53, 0xD8, 0x82, 0xBC,
		0xF5, 0xFD, 0x3A, 0x1A, 0x07, 0x41, 0x48, 0xBB, 0x35, 0xD3, 0xB4, 0xE4,
		0xCB, 0x1C, 0x0A, 0xD9, 0xBD, 0xE4, 0x19, 0xCA, 0xCB, 0x47, 0xBA, 0x09,
		0x69, 0x96, 0x46, 0x15, 0x0F, 0x9F, 0xC0, 0x00, 0xF3, 0xF8, 0x0E, 0x12,
	}},
	Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{
		Symmetric: tpm2.TPMTSymDefObject{
			Algorithm: tpm2.TPMAlgAES,
			KeyBits:   tpm2.NewTPMUSymKeyBits(tpm2.TPMAlgAES, tpm2.TPMKeyBits(256)),
			Mode:      tpm2.NewTPMUSymMode(tpm2.TPMAlgAES, tpm2.TPMAlgCFB),
		},
		CurveID: tpm2.TPMECCNistP384,
	}),
	Unique: tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{}),
}

// akTemplate is a restricted ECDSA key in the endorsement hierarchy. A primary
// key is the same each time it is made, so that an operator can enrol it.
var akTemplate = tpm2.TPMTPublic{
	Type:    tpm2.TPMAlgECC,
	NameAlg: tpm2.TPMAlgSHA256,
	ObjectAttributes: tpm2.TPMAObject{
		FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true,
		UserWithAuth: true, NoDA: true, Restricted: true, SignEncrypt: true,
	},
	Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{
		Scheme: tpm2.TPMTECCScheme{
			Scheme:  tpm2.TPMAlgECDSA,
			Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: tpm2.TPMAlgSHA256}),
		},
		CurveID: tpm2.TPMECCNistP256,
	}),
	Unique: tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
		// A label of our own keeps this key apart from other users' AKs.
		X: tpm2.TPM2BECCParameter{Buffer: []byte("keyagent attestation key")},
	}),
}

// An EK is used under its policy and never under its empty password, although
// template H-3 would allow that. A password counts for the TPM's protection against
// guessing: each power cycle without a shutdown after its use is taken for a guess,
// and a machine that was switched off hard a few times could not attest for hours.

// endorsementPolicyASession satisfies PolicyA: knowledge of the endorsement
// hierarchy's secret, which is empty.
func endorsementPolicyASession(handle tpm2.TPMHandle, pub tpm2.TPMTPublic) tpm2.Session {
	return tpm2.Policy(tpm2.TPMAlgSHA256, 16, endorsementSecret,
		tpm2.Salted(handle, pub), tpm2.AESEncryption(128, tpm2.EncryptOut))
}

// endorsementPolicyBSession satisfies PolicyB, which is PolicyA or PolicyC.
func endorsementPolicyBSession(handle tpm2.TPMHandle, pub tpm2.TPMTPublic) tpm2.Session {
	policy := func(t transport.TPM, session tpm2.TPMISHPolicy, nonce tpm2.TPM2BNonce) error {
		if err := endorsementSecret(t, session, nonce); err != nil {
			return err
		}
		_, err := tpm2.PolicyOr{PolicySession: session, PHashList: tpm2.TPMLDigest{Digests: []tpm2.TPM2BDigest{policyASHA384, policyCSHA384}}}.Execute(t)
		return err
	}
	return tpm2.Policy(tpm2.TPMAlgSHA384, 16, policy,
		tpm2.Salted(handle, pub), tpm2.AESEncryption(128, tpm2.EncryptOut))
}

func endorsementSecret(t transport.TPM, session tpm2.TPMISHPolicy, nonce tpm2.TPM2BNonce) error {
	_, err := tpm2.PolicySecret{
		AuthHandle:    tpm2.AuthHandle{Handle: tpm2.TPMRHEndorsement, Auth: tpm2.PasswordAuth(nil)},
		PolicySession: session,
		NonceTPM:      nonce,
	}.Execute(t)
	return err
}

// The branches of PolicyB, as the EK Credential Profile gives them for SHA-384.
var (
	policyASHA384 = tpm2.TPM2BDigest{Buffer: []byte{
		0x8B, 0xBF, 0x22, 0x66, 0x53, 0x7C, 0x17, 0x1C, 0xB5, 0x6E, 0x40, 0x3C,
		0x4D, 0xC1, 0xD4, 0xB6, 0x4F, 0x43, 0x26, 0x11, 0xDC, 0x38, 0x6E, 0x6F,
		0x53, 0x20, 0x50, 0xC3, 0x27, 0x8C, 0x93, 0x0E, 0x14, 0x3E, 0x8B, 0xB1,
		0x13, 0x38, 0x24, 0xCC, 0xB4, 0x31, 0x05, 0x38, 0x71, 0xC6, 0xDB, 0x53,
	}}
	policyCSHA384 = tpm2.TPM2BDigest{Buffer: []byte{
		0xD6, 0x03, 0x2C, 0xE6, 0x1F, 0x2F, 0xB3, 0xC2, 0x40, 0xEB, 0x3C, 0xF6,
		0xA3, 0x32, 0x37, 0xEF, 0x2B, 0x6A, 0x16, 0xF4, 0x29, 0x3C, 0x22, 0xB4,
		0x55, 0xE2, 0x61, 0xCF, 0xFD, 0x21, 0x7A, 0xD5, 0xB4, 0x94, 0x7C, 0x2D,
		0x73, 0xE6, 0x30, 0x05, 0xEE, 0xD2, 0xDC, 0x2B, 0x35, 0x93, 0xD1, 0x65,
	}}
)

// object is a loaded key.
type object struct {
	handle tpm2.TPMHandle
	public tpm2.TPMTPublic
	name   tpm2.TPM2BName
	clear  bool // its quotes show the TPM's counters as they are
}

func (o object) flush(t transport.TPM) {
	if o.handle>>24 == 0x80 { // transient: a persistent key stays
		_, _ = tpm2.FlushContext{FlushHandle: o.handle}.Execute(t)
	}
}

func createPrimary(t transport.TPM, template tpm2.TPMTPublic) (object, error) {
	rsp, err := tpm2.CreatePrimary{
		PrimaryHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHEndorsement, Auth: tpm2.PasswordAuth(nil)},
		InPublic:      tpm2.New2B(template),
	}.Execute(t)
	if err != nil {
		return object{}, err
	}
	pub, err := rsp.OutPublic.Contents()
	if err != nil {
		return object{}, err
	}
	return object{rsp.ObjectHandle, *pub, rsp.Name, true}, nil
}

func samePublicKey(pub tpm2.TPMTPublic, cert *x509.Certificate) bool {
	if cert == nil {
		return false
	}
	key, err := tpm2.Pub(pub)
	if err != nil {
		return false
	}
	switch key := key.(type) {
	case *rsa.PublicKey:
		return key.Equal(cert.PublicKey)
	case *ecdsa.PublicKey:
		return key.Equal(cert.PublicKey)
	}
	return false
}

// nvChunk fits the smallest NV buffer of the PC Client profile.
const nvChunk = 512

// readNV reads an NV index of at most maxCertificate bytes, by the authorisation
// that its attributes allow. No index gives nil.
func readNV(t transport.TPM, index tpm2.TPMHandle) ([]byte, error) {
	nv, err := tpm2.NVReadPublic{NVIndex: index}.Execute(t)
	if err != nil {
		if errors.Is(err, tpm2.TPMRCHandle) {
			return nil, nil
		}
		return nil, fmt.Errorf("look up NV index %#x: %w", uint32(index), err)
	}
	pub, err := nv.NVPublic.Contents()
	if err != nil {
		return nil, err
	}
	if pub.DataSize > maxCertificate {
		return nil, fmt.Errorf("NV index %#x has %d bytes, at most %d are read", uint32(index), pub.DataSize, maxCertificate)
	}
	auth := tpm2.AuthHandle{Handle: index, Name: nv.NVName, Auth: tpm2.PasswordAuth(nil)}
	if !pub.Attributes.AuthRead && pub.Attributes.OwnerRead {
		auth = tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)}
	}
	data := make([]byte, 0, pub.DataSize)
	for len(data) < int(pub.DataSize) {
		n := min(nvChunk, int(pub.DataSize)-len(data))
		rsp, err := tpm2.NVRead{
			AuthHandle: auth,
			NVIndex:    tpm2.NamedHandle{Handle: index, Name: nv.NVName},
			Size:       uint16(n),
			Offset:     uint16(len(data)),
		}.Execute(t)
		if errors.Is(err, tpm2.TPMRCNVUninitialized) {
			return nil, nil // defined, and never written
		}
		if err != nil {
			return nil, fmt.Errorf("read NV index %#x: %w", uint32(index), err)
		}
		if len(rsp.Data.Buffer) == 0 {
			return nil, fmt.Errorf("read NV index %#x: nothing came back at offset %d", uint32(index), len(data))
		}
		data = append(data, rsp.Data.Buffer...)
	}
	return data, nil
}

// EKDigest names an endorsement key: the lower-case hex SHA-256 of its public
// key as PKIX DER. It is what an operator enrols.
func EKDigest(key crypto.PublicKey) (string, error) {
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:]), nil
}
