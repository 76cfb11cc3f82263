package tpm

import (
	"context"
	"fmt"

	"github.com/google/go-tpm/tpm2"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
)

// Platform uses what a cloud's firmware left in its vTPM: a key at a persistent
// handle, and data in NV.
type Platform struct {
	// Device is passed to OpenDevice. Default DefaultDevice.
	Device string
	// AK is the persistent handle of a restricted signing key.
	AK uint32
	// EventLog is the path of the event log. Default DefaultEventLog. A file
	// that does not exist is left out.
	EventLog string
}

func (p Platform) device() string {
	if p.Device == "" {
		return DefaultDevice
	}
	return p.Device
}

// ReadNV reads an NV index of at most 8 KiB. No such index gives nil.
func (p Platform) ReadNV(index uint32) ([]byte, error) {
	t, err := OpenDevice(p.device())
	if err != nil {
		return nil, err
	}
	defer t.Close()
	return readNV(t, tpm2.TPMHandle(index))
}

// Quote quotes pcrs over binder by the platform's key, and returns the key as a
// TPMT_PUBLIC. The evidence has the event log if withLog is set.
func (p Platform) Quote(ctx context.Context, pcrs []uint32, binder attestation.Binder, withLog bool) (*attestv1.TPMEvidence, []byte, error) {
	if err := checkPCRs(pcrs); err != nil {
		return nil, nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, nil, err
	}
	t, err := OpenDevice(p.device())
	if err != nil {
		return nil, nil, err
	}
	defer t.Close()
	handle := tpm2.TPMHandle(p.AK)
	rsp, err := tpm2.ReadPublic{ObjectHandle: handle}.Execute(t)
	if err != nil {
		return nil, nil, fmt.Errorf("attestation key at handle %#x: %w", p.AK, err)
	}
	public, err := rsp.OutPublic.Contents()
	if err != nil {
		return nil, nil, err
	}
	// Whose hierarchy the key is in is the platform's choice, and in most the
	// counters that its quotes show are obfuscated.
	e, err := quote(t, object{handle: handle, public: *public, name: rsp.Name}, tpm2.TPMSClockInfo{}, pcrs, binder)
	if err != nil {
		return nil, nil, err
	}
	if withLog {
		path := p.EventLog
		if path == "" {
			path = DefaultEventLog
		}
		if err := addLogs(e, path, DefaultUserspaceLog); err != nil {
			return nil, nil, err
		}
	}
	return e, tpm2.Marshal(*public), nil
}
