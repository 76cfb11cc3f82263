package nitro

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/fxamacker/cbor/v2"
	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/keyagent/keyagent/attestation"
)

// nsmRequest is AWS's vendor command TPM2_AWS_NSM_REQUEST. Its two handles are one
// NV index, first as authorisation and then as what it works on: it takes a request
// to the Nitro Security Module from there, and leaves the answer there.
const nsmRequest tpm2.TPMCC = 0x20000001

const (
	// messageSize is what AWS's own tool sets aside: a document has about 5 KiB, and
	// up to 3 KiB of what the caller puts in.
	messageSize = 8 << 10
	// chunk is what every TPM reads at once.
	chunk = 512
)

// The module's messages, as AWS's nsm-api writes them: a map with the name of the
// request or answer.
type (
	attestationRequest struct {
		Attestation struct {
			UserData  []byte `cbor:"user_data"`
			Nonce     []byte `cbor:"nonce"`
			PublicKey []byte `cbor:"public_key"`
		}
	}
	answer struct {
		Attestation struct {
			Document []byte `cbor:"document"`
		}
		Error string
	}
)

func request(binder attestation.Binder) ([]byte, error) {
	var r attestationRequest
	r.Attestation.Nonce = binder[:]
	return cbor.Marshal(r)
}

// documentOf reads an answer, behind which the index has more bytes.
func documentOf(data []byte) ([]byte, error) {
	var a answer
	if _, err := anyLength.UnmarshalFirst(data, &a); err != nil {
		return nil, fmt.Errorf("answer is not understood: %w", err)
	}
	if a.Error != "" {
		return nil, fmt.Errorf("the Nitro Security Module says %q", a.Error)
	}
	if len(a.Attestation.Document) == 0 || len(a.Attestation.Document) > maxDocument {
		return nil, fmt.Errorf("answer has a document of %d bytes", len(a.Attestation.Document))
	}
	return a.Attestation.Document, nil
}

// attest has the TPM make a document over binder. What goes over the TPM's bus
// needs no protection, since the document is signed and public; sessions are salted
// all the same, and the index has a password of its own, as AWS's tool does it.
func attest(t transport.TPM, index tpm2.TPMHandle, binder attestation.Binder) (document []byte, err error) {
	ek, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHEndorsement, InPublic: tpm2.New2B(tpm2.RSAEKTemplate)}.Execute(t)
	if err != nil {
		return nil, fmt.Errorf("make the key that salts sessions: %w", err)
	}
	defer func() { _, _ = tpm2.FlushContext{FlushHandle: ek.ObjectHandle}.Execute(t) }()
	ekPublic, err := ek.OutPublic.Contents()
	if err != nil {
		return nil, err
	}
	// Without a zero: those at the end do not count (part 1, 19.6.5), and go-tpm 0.9.8
	// takes every zero for one at the end.
	password := []byte(rand.Text())

	if err := define(t, index, password, ek.ObjectHandle, *ekPublic); err != nil {
		return nil, fmt.Errorf("set NV index %#x aside: %w", uint32(index), err)
	}
	name := func() (tpm2.TPM2BName, error) {
		rsp, err := tpm2.NVReadPublic{NVIndex: index}.Execute(t)
		if err != nil {
			return tpm2.TPM2BName{}, fmt.Errorf("name of NV index %#x: %w", uint32(index), err)
		}
		return rsp.NVName, nil
	}
	defer func() {
		if e := undefine(t, index); e != nil && err == nil {
			err = fmt.Errorf("give NV index %#x back: %w", uint32(index), e)
		}
	}()

	session := func() (tpm2.Session, func() error, error) {
		return tpm2.HMACSession(t, tpm2.TPMAlgSHA512, 64, tpm2.Auth(password), tpm2.Salted(ek.ObjectHandle, *ekPublic))
	}
	nv, end, err := session()
	if err != nil {
		return nil, fmt.Errorf("session: %w", err)
	}
	defer func() { _ = end() }()
	before, err := name()
	if err != nil {
		return nil, err
	}
	message, err := request(binder)
	if err != nil {
		return nil, err
	}
	if _, err := (tpm2.NVWrite{
		AuthHandle: tpm2.AuthHandle{Handle: index, Name: before, Auth: nv},
		NVIndex:    tpm2.NamedHandle{Handle: index, Name: before},
		Data:       tpm2.TPM2BMaxNVBuffer{Buffer: message},
	}).Execute(t); err != nil {
		return nil, fmt.Errorf("write the request: %w", err)
	}
	after, err := name() // is another one, since the index is written now
	if err != nil {
		return nil, err
	}
	vendor, endVendor, err := session()
	if err != nil {
		return nil, fmt.Errorf("session: %w", err)
	}
	err = send(t, index, after, vendor)
	if err = errors.Join(err, endVendor()); err != nil {
		return nil, fmt.Errorf("vendor command: %w", err)
	}
	var data []byte
	for len(data) < messageSize {
		rsp, err := tpm2.NVRead{
			AuthHandle: tpm2.AuthHandle{Handle: index, Name: after, Auth: nv},
			NVIndex:    tpm2.NamedHandle{Handle: index, Name: after},
			Size:       chunk, Offset: uint16(len(data)),
		}.Execute(t)
		if err != nil {
			return nil, fmt.Errorf("read the answer: %w", err)
		}
		if len(rsp.Data.Buffer) != chunk {
			return nil, fmt.Errorf("read the answer: %d bytes, not %d", len(rsp.Data.Buffer), chunk)
		}
		data = append(data, rsp.Data.Buffer...)
	}
	return documentOf(data)
}

// define sets the index aside. One that is there already was left behind by a
// process that died: agents take turns at it.
func define(t transport.TPM, index tpm2.TPMHandle, password []byte, salt tpm2.TPMHandle, public tpm2.TPMTPublic) error {
	command := tpm2.NVDefineSpace{
		AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
		Auth:       tpm2.TPM2BAuth{Buffer: password},
		PublicInfo: tpm2.New2B(tpm2.TPMSNVPublic{
			NVIndex: index, NameAlg: tpm2.TPMAlgSHA512, DataSize: messageSize,
			Attributes: tpm2.TPMANV{AuthRead: true, AuthWrite: true},
		}),
	}
	execute := func() error {
		_, err := command.Execute(t, tpm2.HMAC(tpm2.TPMAlgSHA512, 64, tpm2.Salted(salt, public), tpm2.AESEncryption(128, tpm2.EncryptIn)))
		return err
	}
	err := execute()
	if errors.Is(err, tpm2.TPMRCNVDefined) {
		if err = undefine(t, index); err == nil {
			err = execute()
		}
	}
	return err
}

func undefine(t transport.TPM, index tpm2.TPMHandle) error {
	public, err := tpm2.NVReadPublic{NVIndex: index}.Execute(t)
	if err != nil {
		return err
	}
	_, err = tpm2.NVUndefineSpace{
		AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
		NVIndex:    tpm2.NamedHandle{Handle: index, Name: public.NVName},
	}.Execute(t)
	return err
}

// send sends the vendor command. Of its response only the code is looked at: the
// session is not used again, and it is the document that is signed.
func send(t transport.TPM, index tpm2.TPMHandle, name tpm2.TPM2BName, session tpm2.Session) error {
	if err := session.NewNonceCaller(); err != nil {
		return err
	}
	auth, err := session.Authorize(nsmRequest, nil, nil, []tpm2.TPM2BName{name, name}, 0)
	if err != nil {
		return err
	}
	area := tpm2.Marshal(*auth)
	command := binary.BigEndian.AppendUint16(nil, uint16(tpm2.TPMSTSessions))
	command = binary.BigEndian.AppendUint32(command, uint32(10+2*4+4+len(area)))
	command = binary.BigEndian.AppendUint32(command, uint32(nsmRequest))
	command = binary.BigEndian.AppendUint32(command, uint32(index))
	command = binary.BigEndian.AppendUint32(command, uint32(index))
	command = binary.BigEndian.AppendUint32(command, uint32(len(area)))
	command = append(command, area...)
	rsp, err := t.Send(command)
	if err != nil {
		return err
	}
	if len(rsp) < 10 || int(binary.BigEndian.Uint32(rsp[2:])) != len(rsp) {
		return fmt.Errorf("response of %d bytes", len(rsp))
	}
	if code := tpm2.TPMRC(binary.BigEndian.Uint32(rsp[6:])); code != tpm2.TPMRCSuccess {
		return code
	}
	if !bytes.Equal(rsp[:2], command[:2]) {
		return fmt.Errorf("response without the session")
	}
	return nil
}
