package maa

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/keyagent/keyagent/attestation/azure"
)

// nvAKCertificate is where Azure's vTPM has the certificate of its attestation key.
const nvAKCertificate = 0x01C101D0

// registers is how many PCRs, from 0, the provider is told: what Microsoft's own sample
// sends. PCRs are compared by the quote of package azure, not by this one.
const registers = 8

func selection() tpm2.TPMLPCRSelection {
	var all []uint
	for i := range uint(registers) {
		all = append(all, i)
	}
	return tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{
		Hash: tpm2.TPMAlgSHA256, PCRSelect: tpm2.PCClientCompatible.PCRs(all...),
	}}}
}

// rsaSSA is how Azure's attestation key signs.
func rsaSSA() tpm2.TPMTSigScheme {
	return tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgRSASSA,
		Details: tpm2.NewTPMUSigScheme(tpm2.TPMAlgRSASSA, &tpm2.TPMSSchemeHash{HashAlg: tpm2.TPMAlgSHA256})}
}

// quoted is the PCRs, as the attestation key says that they are.
type quoted struct {
	ak        tpm2.NamedHandle
	public    []byte   // its TPM2B_PUBLIC
	values    [][]byte // of the PCRs
	attest    []byte
	signature []byte
}

// digest is over the values, in the order of the PCRs.
func (q *quoted) digest() []byte {
	sum := sha256.Sum256(bytes.Join(q.values, nil))
	return sum[:]
}

// state quotes the PCRs over a nonce.
func state(t transport.TPM, nonce []byte) (*quoted, error) {
	q := &quoted{}
	ak, err := tpm2.ReadPublic{ObjectHandle: tpm2.TPMHandle(azure.AKHandle)}.Execute(t)
	if err != nil {
		return nil, fmt.Errorf("attestation key at handle %#x: %w", azure.AKHandle, err)
	}
	q.ak, q.public = tpm2.NamedHandle{Handle: azure.AKHandle, Name: ak.Name}, tpm2.Marshal(ak.OutPublic)
	rsp, err := tpm2.Quote{SignHandle: q.ak, QualifyingData: tpm2.TPM2BData{Buffer: nonce}, InScheme: rsaSSA(), PCRSelect: selection()}.Execute(t)
	if err != nil {
		return nil, fmt.Errorf("quote: %w", err)
	}
	q.attest = rsp.Quoted.Bytes()
	if q.signature, err = signature(rsp.Signature); err != nil {
		return nil, fmt.Errorf("quote: %w", err)
	}
	attest, err := rsp.Quoted.Contents()
	if err != nil {
		return nil, fmt.Errorf("quote: %w", err)
	}
	info, err := attest.Attested.Quote()
	if err != nil {
		return nil, fmt.Errorf("quote: %w", err)
	}
	// Eight values are what one answer may have.
	read, err := tpm2.PCRRead{PCRSelectionIn: selection()}.Execute(t)
	if err != nil {
		return nil, fmt.Errorf("read PCRs: %w", err)
	}
	for _, d := range read.PCRValues.Digests {
		q.values = append(q.values, d.Buffer)
	}
	if len(q.values) != registers || !bytes.Equal(q.digest(), info.PCRDigest.Buffer) {
		return nil, errors.New("PCRs changed while they were quoted")
	}
	return q, nil
}

func signature(s tpm2.TPMTSignature) ([]byte, error) {
	r, err := s.Signature.RSASSA()
	if err != nil {
		return nil, err
	}
	return r.Sig.Buffer, nil
}

// transportKey is an RSA key that the TPM forgets when it is reset. It decrypts while
// the PCRs are what they were, and the attestation key certifies that.
type transportKey struct {
	t         transport.TPM
	handle    tpm2.NamedHandle
	policy    tpm2.PolicyPCR
	public    []byte // its TPM2B_PUBLIC
	attest    []byte
	signature []byte
}

func newTransportKey(t transport.TPM, q *quoted) (*transportKey, error) {
	k := &transportKey{t: t, policy: tpm2.PolicyPCR{PcrDigest: tpm2.TPM2BDigest{Buffer: q.digest()}, Pcrs: selection()}}
	calculator, err := tpm2.NewPolicyCalculator(tpm2.TPMAlgSHA256)
	if err != nil {
		return nil, err
	}
	if err := k.policy.Update(calculator); err != nil {
		return nil, err
	}
	made, err := tpm2.CreatePrimary{
		PrimaryHandle: tpm2.TPMRHNull, CreationPCR: selection(),
		InPublic: tpm2.New2B(tpm2.TPMTPublic{
			Type: tpm2.TPMAlgRSA, NameAlg: tpm2.TPMAlgSHA256,
			ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, NoDA: true, Decrypt: true},
			AuthPolicy:       tpm2.TPM2BDigest{Buffer: calculator.Hash().Digest},
			Parameters:       tpm2.NewTPMUPublicParms(tpm2.TPMAlgRSA, &tpm2.TPMSRSAParms{KeyBits: 2048}),
			Unique:           tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{}),
		}),
	}.Execute(t)
	if err != nil {
		return nil, fmt.Errorf("make a key for the token: %w", err)
	}
	k.handle, k.public = tpm2.NamedHandle{Handle: made.ObjectHandle, Name: made.Name}, tpm2.Marshal(made.OutPublic)
	rsp, err := tpm2.Certify{ObjectHandle: k.handle, SignHandle: q.ak, InScheme: rsaSSA()}.Execute(t)
	if err == nil {
		k.attest = rsp.CertifyInfo.Bytes()
		k.signature, err = signature(rsp.Signature)
	}
	if err != nil {
		k.flush()
		return nil, fmt.Errorf("certify the key for the token: %w", err)
	}
	return k, nil
}

// flush has the TPM forget the key.
func (k *transportKey) flush() { _, _ = tpm2.FlushContext{FlushHandle: k.handle.Handle}.Execute(k.t) }

// decrypt decrypts what the provider encrypted to the key.
func (k *transportKey) decrypt(ciphertext []byte) ([]byte, error) {
	session := tpm2.Policy(tpm2.TPMAlgSHA256, 16, func(t transport.TPM, handle tpm2.TPMISHPolicy, _ tpm2.TPM2BNonce) error {
		policy := k.policy
		policy.PolicySession = handle
		_, err := policy.Execute(t)
		return err
	})
	rsp, err := tpm2.RSADecrypt{
		KeyHandle:  tpm2.AuthHandle{Handle: k.handle.Handle, Name: k.handle.Name, Auth: session},
		CipherText: tpm2.TPM2BPublicKeyRSA{Buffer: ciphertext},
		InScheme: tpm2.TPMTRSADecrypt{Scheme: tpm2.TPMAlgRSAES,
			Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgRSAES, &tpm2.TPMSEncSchemeRSAES{})},
	}.Execute(k.t)
	if err != nil {
		return nil, err
	}
	return rsp.Message.Buffer, nil
}
