package measured

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"golang.org/x/sys/unix"

	"github.com/keyagent/keyagent/attestation/tpm"
)

// PCR is the register of a TPM, as systemd has it (tpm2-measure-pcr=yes).
const PCR = 15

// deviceWait bounds how long a device that only one program may open is waited for:
// this process attests with it, too.
const deviceWait = 10 * time.Second

// TPM is PCR 15 of a TPM, in the banks that evidence is of: SHA-256, and SHA-384 where
// the TPM keeps it, as AWS's does.
type TPM struct {
	Device string // empty: tpm.DefaultDevice
	// Log is where systemd logs what user space measures; evidence carries it. Empty:
	// tpm.DefaultUserspaceLog.
	Log string
	// Warn hears that the log could not be written, so that evidence cannot explain the
	// register. Nil: nobody does.
	Warn func(error)
}

// Ready implements [Register]. It reads the register.
func (t *TPM) Ready(ctx context.Context) error {
	dev, err := t.open(ctx)
	if err != nil {
		return unready(err)
	}
	if !keeps(dev, tpm2.TPMAlgSHA256) {
		err = unready(fmt.Errorf("the TPM has no PCR %d in its SHA-256 bank (hint: enable the bank in the firmware's setup)", PCR))
	}
	return errors.Join(err, dev.Close())
}

// keeps reports whether the TPM has the register in a bank. One that was never built in
// is an error, and one that is off has no values.
func keeps(dev transport.TPM, bank tpm2.TPMAlgID) bool {
	rsp, err := tpm2.PCRRead{PCRSelectionIn: tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{
		{Hash: bank, PCRSelect: tpm2.PCClientCompatible.PCRs(PCR)},
	}}}.Execute(dev)
	return err == nil && len(rsp.PCRValues.Digests) == 1
}

// Extend implements [Register].
func (t *TPM) Extend(ctx context.Context, e Event) (Record, error) {
	path := t.Log
	if path == "" {
		path = tpm.DefaultUserspaceLog
	}
	// Before the register: what is in it and not in the log is explained by nothing.
	log, logErr := openLog(ctx, path)
	if err := ctx.Err(); err != nil {
		return Record{}, errors.Join(err, log.abandon())
	}
	banks, err := t.extend(ctx, e)
	if err != nil {
		return Record{}, errors.Join(fmt.Errorf("extend pcr %d: %w", PCR, err), log.abandon())
	}
	if logErr == nil {
		logErr = log.add(e, banks)
	}
	if logErr != nil && t.Warn != nil {
		t.Warn(fmt.Errorf("pcr %d was extended, and %s does not say so: %w", PCR, path, logErr))
	}
	return Record{fmt.Sprintf("pcr%d", PCR), e.SHA256[:]}, nil
}

// extend returns what it extended.
func (t *TPM) extend(ctx context.Context, e Event) ([]tpm2.TPMTHA, error) {
	dev, err := t.open(ctx)
	if err != nil {
		return nil, unready(err)
	}
	banks := []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: e.SHA256[:]}}
	if keeps(dev, tpm2.TPMAlgSHA384) {
		banks = append(banks, tpm2.TPMTHA{HashAlg: tpm2.TPMAlgSHA384, Digest: e.SHA384[:]})
	}
	_, err = tpm2.PCRExtend{
		PCRHandle: tpm2.AuthHandle{Handle: PCR, Auth: tpm2.PasswordAuth(nil)},
		Digests:   tpm2.TPMLDigestValues{Digests: banks},
	}.Execute(dev)
	return banks, errors.Join(err, dev.Close())
}

// open waits for a device without a resource manager, which one exchange has at a time.
func (t *TPM) open(ctx context.Context) (transport.TPMCloser, error) {
	path := t.Device
	if path == "" {
		path = tpm.DefaultDevice
	}
	ctx, cancel := context.WithTimeout(ctx, deviceWait)
	defer cancel()
	for {
		dev, err := tpm.OpenDevice(path)
		if !errors.Is(err, unix.EBUSY) {
			return dev, err
		}
		if waitErr := pause(ctx); waitErr != nil {
			return nil, err
		}
	}
}

// pause is a turn of a loop that waits for something without a way to be told of it.
func pause(ctx context.Context) error {
	t := time.NewTimer(50 * time.Millisecond)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}
