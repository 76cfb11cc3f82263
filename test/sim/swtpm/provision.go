package swtpm

import (
	"encoding/binary"
	"fmt"
	"net"
	"strings"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// open speaks raw commands to a running TPM, as a cloud does when it provisions
// a vTPM.
func open(device string) (transport.TPMCloser, error) {
	c, err := net.Dial("unix", strings.TrimPrefix(device, "unix:"))
	if err != nil {
		return nil, err
	}
	return transport.FromReadWriteCloser(c), nil
}

// WriteNV defines an NV index that everybody may read, and fills it.
func WriteNV(device string, index uint32, data []byte) error {
	return provision(device, index, data, len(data))
}

// DefineNV makes an NV index and writes nothing into it. With no size there is none
// afterwards.
func DefineNV(device string, index uint32, size int) error {
	return provision(device, index, nil, size)
}

func provision(device string, index uint32, data []byte, size int) error {
	t, err := open(device)
	if err != nil {
		return err
	}
	defer t.Close()
	owner := tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)}
	public := tpm2.TPMSNVPublic{
		NVIndex: tpm2.TPMHandle(index), NameAlg: tpm2.TPMAlgSHA256, DataSize: uint16(size),
		Attributes: tpm2.TPMANV{OwnerWrite: true, OwnerRead: true, AuthRead: true, NoDA: true, NT: tpm2.TPMNTOrdinary},
	}
	if old, err := (tpm2.NVReadPublic{NVIndex: public.NVIndex}).Execute(t); err == nil {
		auth := owner
		if was, err := old.NVPublic.Contents(); err == nil && was.Attributes.PlatformCreate {
			auth.Handle = tpm2.TPMRHPlatform
		}
		if _, err := (tpm2.NVUndefineSpace{AuthHandle: auth, NVIndex: tpm2.NamedHandle{Handle: public.NVIndex, Name: old.NVName}}).Execute(t); err != nil {
			return fmt.Errorf("undefine NV index %#x: %w", index, err)
		}
	}
	if size == 0 {
		return nil
	}
	if _, err := (tpm2.NVDefineSpace{AuthHandle: owner, PublicInfo: tpm2.New2B(public)}).Execute(t); err != nil {
		return fmt.Errorf("define NV index %#x: %w", index, err)
	}
	for offset := 0; offset < len(data); offset += 512 {
		now, err := tpm2.NVReadPublic{NVIndex: public.NVIndex}.Execute(t)
		if err != nil {
			return err
		}
		if _, err := (tpm2.NVWrite{
			AuthHandle: owner, NVIndex: tpm2.NamedHandle{Handle: public.NVIndex, Name: now.NVName},
			Data: tpm2.TPM2BMaxNVBuffer{Buffer: data[offset:min(offset+512, len(data))]}, Offset: uint16(offset),
		}).Execute(t); err != nil {
			return fmt.Errorf("write NV index %#x: %w", index, err)
		}
	}
	return nil
}

// Primary makes a primary key of the endorsement hierarchy and returns its
// public area. With a handle that is not zero the key stays there.
func Primary(device string, template tpm2.TPMTPublic, persistent uint32) (*tpm2.TPMTPublic, error) {
	t, err := open(device)
	if err != nil {
		return nil, err
	}
	defer t.Close()
	rsp, err := tpm2.CreatePrimary{
		PrimaryHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHEndorsement, Auth: tpm2.PasswordAuth(nil)},
		InPublic:      tpm2.New2B(template),
	}.Execute(t)
	if err != nil {
		return nil, err
	}
	defer tpm2.FlushContext{FlushHandle: rsp.ObjectHandle}.Execute(t) //nolint:errcheck // the connection ends
	if persistent != 0 {
		if _, err := (tpm2.EvictControl{
			Auth:         tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
			ObjectHandle: &tpm2.NamedHandle{Handle: rsp.ObjectHandle, Name: rsp.Name}, PersistentHandle: tpm2.TPMHandle(persistent),
		}).Execute(t); err != nil {
			return nil, fmt.Errorf("keep the key at %#x: %w", persistent, err)
		}
	}
	return rsp.OutPublic.Contents()
}

// RSAAKTemplate is an attestation key as Azure and Google provision it: a
// restricted RSASSA key.
func RSAAKTemplate() tpm2.TPMTPublic {
	return tpm2.TPMTPublic{
		Type: tpm2.TPMAlgRSA, NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{
			FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true,
			UserWithAuth: true, NoDA: true, Restricted: true, SignEncrypt: true,
		},
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgRSA, &tpm2.TPMSRSAParms{
			Scheme: tpm2.TPMTRSAScheme{Scheme: tpm2.TPMAlgRSASSA,
				Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgRSASSA, &tpm2.TPMSSigSchemeRSASSA{HashAlg: tpm2.TPMAlgSHA256})},
			KeyBits: 2048,
		}),
		Unique: tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{}),
	}
}

// Extend measures a digest into a SHA-256 PCR.
func Extend(device string, pcr uint32, digest []byte) error {
	t, err := open(device)
	if err != nil {
		return err
	}
	defer t.Close()
	_, err = tpm2.PCRExtend{
		PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(pcr), Auth: tpm2.PasswordAuth(nil)},
		Digests:   tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: digest}}},
	}.Execute(t)
	return err
}

// AdvanceClock sets the TPM's clock ahead, as its owner can: TPM2_ClockSet, which go-tpm does
// not have.
func AdvanceClock(device string, by time.Duration) error {
	t, err := open(device)
	if err != nil {
		return err
	}
	defer t.Close()
	now, err := tpm2.ReadClock{}.Execute(t)
	if err != nil {
		return err
	}
	const header, clockSet = 10, 0x128
	body := binary.BigEndian.AppendUint32(nil, uint32(tpm2.TPMRHOwner))
	body = append(body, 0, 0, 0, 9, 0x40, 0, 0, 9, 0, 0, 0, 0, 0) // an empty password
	body = binary.BigEndian.AppendUint64(body, now.CurrentTime.ClockInfo.Clock+uint64(by/time.Millisecond))
	cmd := binary.BigEndian.AppendUint16(nil, uint16(tpm2.TPMSTSessions))
	cmd = binary.BigEndian.AppendUint32(cmd, uint32(header+len(body)))
	cmd = binary.BigEndian.AppendUint32(cmd, clockSet)
	rsp, err := t.Send(append(cmd, body...))
	if err == nil && binary.BigEndian.Uint32(rsp[6:]) != 0 {
		err = tpm2.TPMRC(binary.BigEndian.Uint32(rsp[6:]))
	}
	return err
}
