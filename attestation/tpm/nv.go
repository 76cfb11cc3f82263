package tpm

import (
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// NV is an ordinary NV index of this program's own: a few hundred bytes that outlive a restart
// of the machine. Anyone with access to the TPM can read, write and remove it.
type NV struct {
	// Device is passed to OpenDevice. Default DefaultDevice.
	Device string
	Index  uint32
	Size   int // in bytes
}

// nvAttributes let anybody read and write the index, by its own authorisation, which is empty.
// A wrong guess of that must not lock the TPM.
var nvAttributes = tpm2.TPMANV{
	NT:        tpm2.TPMNTOrdinary,
	AuthRead:  true,
	AuthWrite: true,
	OwnerRead: true,
	NoDA:      true,
}

// ErrNV means that the NV index cannot be used: the TPM has no room, it is somebody else's, or
// the owner hierarchy has a password.
var ErrNV = errors.New("TPM NV index cannot be used")

// Load reads the index. One that is not there, or was never written, gives nil. A machine
// without the TPM gives an error that wraps [attestation.ErrNoDevice].
func (n *NV) Load() ([]byte, error) {
	t, err := n.open()
	if err != nil {
		return nil, err
	}
	defer t.Close()
	return readNV(t, tpm2.TPMHandle(n.Index))
}

// Store writes data, of Size bytes, and makes the index if it is not there: [ErrNV] if the
// TPM has no room, or its owner hierarchy a password.
func (n *NV) Store(data []byte) error {
	if len(data) != n.Size {
		return fmt.Errorf("%w: %d bytes for an index of %d", ErrNV, len(data), n.Size)
	}
	t, err := n.open()
	if err != nil {
		return err
	}
	defer t.Close()
	name, err := n.find(t)
	if err != nil {
		return fmt.Errorf("%w: %#x: %w", ErrNV, n.Index, err)
	}
	for at := 0; at < len(data); at += nvChunk {
		_, err := tpm2.NVWrite{
			AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(n.Index), Name: name, Auth: tpm2.PasswordAuth(nil)},
			NVIndex:    tpm2.NamedHandle{Handle: tpm2.TPMHandle(n.Index), Name: name},
			Data:       tpm2.TPM2BMaxNVBuffer{Buffer: data[at:min(at+nvChunk, len(data))]},
			Offset:     uint16(at),
		}.Execute(t)
		if err != nil {
			return fmt.Errorf("%w: %#x: write: %w", ErrNV, n.Index, err)
		}
		// The first write sets an attribute, which the name covers.
		if at == 0 {
			if name, err = n.find(t); err != nil {
				return fmt.Errorf("%w: %#x: %w", ErrNV, n.Index, err)
			}
		}
	}
	return nil
}

func (n *NV) open() (transport.TPMCloser, error) {
	device := n.Device
	if device == "" {
		device = DefaultDevice
	}
	return OpenDevice(device)
}

// find returns the name of the index, which it makes if there is none.
func (n *NV) find(t transport.TPM) (tpm2.TPM2BName, error) {
	read := tpm2.NVReadPublic{NVIndex: tpm2.TPMHandle(n.Index)}
	nv, err := read.Execute(t)
	if errors.Is(err, tpm2.TPMRCHandle) {
		if err := n.define(t); err != nil {
			return tpm2.TPM2BName{}, err
		}
		nv, err = read.Execute(t)
	}
	if err != nil {
		return tpm2.TPM2BName{}, err
	}
	pub, err := nv.NVPublic.Contents()
	if err != nil {
		return tpm2.TPM2BName{}, err
	}
	if int(pub.DataSize) != n.Size || !pub.Attributes.AuthWrite || pub.Attributes.NT != tpm2.TPMNTOrdinary {
		return tpm2.TPM2BName{}, errors.New("it is somebody else's")
	}
	return nv.NVName, nil
}

func (n *NV) define(t transport.TPM) error {
	_, err := tpm2.NVDefineSpace{
		AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
		PublicInfo: tpm2.New2B(tpm2.TPMSNVPublic{
			NVIndex: tpm2.TPMHandle(n.Index), NameAlg: tpm2.TPMAlgSHA256, Attributes: nvAttributes, DataSize: uint16(n.Size),
		}),
	}.Execute(t)
	switch {
	case errors.Is(err, tpm2.TPMRCNVDefined):
		return nil // another process was faster
	case errors.Is(err, tpm2.TPMRCAuthFail), errors.Is(err, tpm2.TPMRCBadAuth):
		return fmt.Errorf("the owner hierarchy has a password: %w", err)
	case errors.Is(err, tpm2.TPMRCNVSpace):
		return fmt.Errorf("the TPM has no room left: %w", err)
	}
	return err
}
