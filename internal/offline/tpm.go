package offline

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/keyagent/keyagent/internal/failure"
)

// The counters are NV indices of the owner's range (TCG Registry of Reserved TPM 2.0
// Handles), one for each volume.
const (
	firstIndex = 0x01804b00
	indices    = 32
)

// Offsets in TPMS_TIME_INFO, as TPM2_PolicyCounterTimer counts them.
const (
	offsetClock   = 8
	offsetReset   = 16
	offsetRestart = 20
)

// module is an open TPM with the storage key that everything is sealed under.
type module struct {
	transport.TPMCloser
	srk  tpm2.NamedHandle
	pub  tpm2.TPMTPublic
	name []byte
}

// load makes the storage key, which is the same each time until the TPM is cleared.
func load(t transport.TPMCloser) (*module, error) {
	rsp, err := tpm2.CreatePrimary{
		PrimaryHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
		InPublic:      tpm2.New2B(tpm2.ECCSRKTemplate),
	}.Execute(t)
	if err != nil {
		return nil, ownerAuth(fmt.Errorf("storage key: %w", err))
	}
	pub, err := rsp.OutPublic.Contents()
	if err != nil {
		return nil, err
	}
	return &module{t, tpm2.NamedHandle{Handle: rsp.ObjectHandle, Name: rsp.Name}, *pub, rsp.Name.Buffer}, nil
}

func (m *module) flush(h tpm2.TPMHandle) { _, _ = tpm2.FlushContext{FlushHandle: h}.Execute(m) }

// ownerAuth gives an error of a TPM whose owner has a password its class and a hint.
func ownerAuth(err error) error {
	if errors.Is(err, tpm2.TPMRCBadAuth) || errors.Is(err, tpm2.TPMRCAuthFail) {
		return failure.New(failure.Configuration, fmt.Errorf("%w: %w", ErrOwnerAuth, err), "keyagent has no password for the owner hierarchy: tpm2_changeauth -c owner takes it away, or leave out offline")
	}
	return err
}

// salted is a session whose key only the TPM of the storage key can know: what goes over
// the bus in it is encrypted.
func (m *module) salted() tpm2.AuthOption { return tpm2.Salted(m.srk.Handle, m.pub) }

// now are the reset count and the clock.
func (m *module) now() (reset uint32, clock uint64, err error) {
	rsp, err := tpm2.ReadClock{}.Execute(m)
	if err != nil {
		return 0, 0, err
	}
	return rsp.CurrentTime.ClockInfo.ResetCount, rsp.CurrentTime.ClockInfo.Clock, nil
}

// restarts is how often the TPM was started since its last reset with the state that it had
// been told to keep, or although it had been told so.
func (m *module) restarts() (uint32, error) {
	rsp, err := tpm2.ReadClock{}.Execute(m)
	if err != nil {
		return 0, err
	}
	return rsp.CurrentTime.ClockInfo.RestartCount, nil
}

func selection(mask uint32) tpm2.TPMLPCRSelection {
	var all []uint
	for n := range uint(lastPCR + 1) {
		if mask&(1<<n) != 0 {
			all = append(all, n)
		}
	}
	return tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{Hash: tpm2.TPMAlgSHA256, PCRSelect: tpm2.PCClientCompatible.PCRs(all...)}}}
}

// registers is the digest of what the registers hold now. The TPM hands over eight at a
// time.
func (m *module) registers(mask uint32) (digest [32]byte, err error) {
	h := sha256.New()
	for n := range lastPCR + 1 {
		if mask&(1<<n) == 0 {
			continue
		}
		rsp, err := tpm2.PCRRead{PCRSelectionIn: selection(1 << n)}.Execute(m)
		if err != nil {
			return digest, err
		}
		if len(rsp.PCRValues.Digests) != 1 {
			return digest, fmt.Errorf("the TPM has no PCR %d in its SHA-256 bank", n)
		}
		h.Write(rsp.PCRValues.Digests[0].Buffer)
	}
	return [32]byte(h.Sum(nil)), nil
}

// counter is the NV index of one volume.
type counter struct {
	tpm2.NamedHandle
	value uint64
}

// label is how the index of a volume is found: it stands where an index has its policy,
// which nothing here is authorised by.
func label(volume string) []byte {
	sum := sha256.Sum256([]byte("keyagent offline index v1\x00" + volume))
	return sum[:]
}

// find looks for the indices of a volume, of which there is one or none, and for a handle
// that is free.
func (m *module) find(volume string) (mine []tpm2.NamedHandle, free tpm2.TPMHandle, err error) {
	rsp, err := tpm2.GetCapability{Capability: tpm2.TPMCapHandles, Property: firstIndex, PropertyCount: indices}.Execute(m)
	if err != nil {
		return nil, 0, err
	}
	list, err := rsp.CapabilityData.Data.Handles()
	if err != nil {
		return nil, 0, err
	}
	for _, h := range list.Handle {
		if h < firstIndex || h >= firstIndex+indices {
			continue
		}
		nv, err := tpm2.NVReadPublic{NVIndex: h}.Execute(m)
		if err != nil {
			return nil, 0, err
		}
		pub, err := nv.NVPublic.Contents()
		if err != nil {
			return nil, 0, err
		}
		if pub.Attributes.NT == tpm2.TPMNTCounter && bytes.Equal(pub.AuthPolicy.Buffer, label(volume)) {
			mine = append(mine, tpm2.NamedHandle{Handle: h, Name: nv.NVName})
		}
	}
	for h := tpm2.TPMHandle(firstIndex); h < firstIndex+indices; h++ {
		if !slices.Contains(list.Handle, h) {
			return mine, h, nil
		}
	}
	return mine, 0, nil
}

func (m *module) read(h tpm2.NamedHandle) (counter, error) {
	rsp, err := tpm2.NVRead{
		AuthHandle: tpm2.AuthHandle{Handle: h.Handle, Name: h.Name, Auth: tpm2.PasswordAuth(nil)}, NVIndex: h, Size: 8,
	}.Execute(m)
	if err != nil {
		return counter{}, fmt.Errorf("read the counter at NV index %#x: %w", uint32(h.Handle), err)
	}
	if len(rsp.Data.Buffer) != 8 {
		return counter{}, fmt.Errorf("the counter at NV index %#x has %d bytes", uint32(h.Handle), len(rsp.Data.Buffer))
	}
	return counter{h, binary.BigEndian.Uint64(rsp.Data.Buffer)}, nil
}

func (m *module) increment(h tpm2.NamedHandle) error {
	_, err := tpm2.NVIncrement{AuthHandle: tpm2.AuthHandle{Handle: h.Handle, Name: h.Name, Auth: tpm2.PasswordAuth(nil)}, NVIndex: h}.Execute(m)
	if err != nil {
		return fmt.Errorf("increment the counter at NV index %#x: %w", uint32(h.Handle), err)
	}
	return nil
}

// theCounter returns the counter of a volume, or an error that wraps [ErrNone].
func (m *module) theCounter(volume string) (counter, error) {
	mine, _, err := m.find(volume)
	if err != nil {
		return counter{}, err
	}
	if len(mine) == 0 {
		return counter{}, fmt.Errorf("%w: this TPM has no counter for it", ErrNone)
	}
	return m.read(mine[0])
}

// define makes a counter. The TPM begins it above every counter that it ever had, so that
// no value comes again.
func (m *module) define(volume string) (counter, error) {
	mine, free, err := m.find(volume)
	switch {
	case err != nil:
		return counter{}, err
	case len(mine) > 0:
		c, err := m.read(mine[0])
		if !errors.Is(err, tpm2.TPMRCNVUninitialized) {
			return c, err
		}
		free = mine[0].Handle // cut off before it was first incremented
	case free == 0:
		return counter{}, failure.Newf(failure.State, "keyagent close --give-back VOLUME frees one", "all %d NV indices for counters are taken", indices)
	default:
		if _, err := (tpm2.NVDefineSpace{
			AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
			PublicInfo: tpm2.New2B(tpm2.TPMSNVPublic{
				NVIndex: free, NameAlg: tpm2.TPMAlgSHA256, DataSize: 8, AuthPolicy: tpm2.TPM2BDigest{Buffer: label(volume)},
				Attributes: tpm2.TPMANV{NT: tpm2.TPMNTCounter, AuthRead: true, AuthWrite: true, OwnerRead: true, OwnerWrite: true, NoDA: true},
			}),
		}).Execute(m); err != nil {
			return counter{}, ownerAuth(fmt.Errorf("define a counter at NV index %#x: %w", uint32(free), err))
		}
	}
	// Its name changes with the first increment.
	for range 2 {
		nv, err := tpm2.NVReadPublic{NVIndex: free}.Execute(m)
		if err != nil {
			return counter{}, err
		}
		h := tpm2.NamedHandle{Handle: free, Name: nv.NVName}
		c, err := m.read(h)
		if !errors.Is(err, tpm2.TPMRCNVUninitialized) {
			return c, err
		}
		if err := m.increment(h); err != nil {
			return counter{}, err
		}
	}
	return counter{}, fmt.Errorf("the counter at NV index %#x does not count", uint32(free))
}

// destroy makes whatever demands the counters of a volume worthless.
func (m *module) destroy(volume string) (had bool, err error) {
	mine, _, err := m.find(volume)
	for _, h := range mine {
		// Twice: a key that was sealed, and never came to be the one that counts, is for the
		// next value. Either is enough; the second gives the space back.
		counted := m.increment(h)
		if counted == nil {
			counted = m.increment(m.named(h))
		}
		_, gone := tpm2.NVUndefineSpace{AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)}, NVIndex: m.named(h)}.Execute(m)
		if counted != nil && gone != nil {
			err = errors.Join(err, counted, gone)
		}
	}
	return len(mine) > 0, err
}

// named is a handle under the name that it has now.
func (m *module) named(h tpm2.NamedHandle) tpm2.NamedHandle {
	if nv, err := (tpm2.NVReadPublic{NVIndex: h.Handle}).Execute(m); err == nil {
		h.Name = nv.NVName
	}
	return h
}

// demand is one assertion of the policy.
type demand struct {
	run    func(t transport.TPM, session tpm2.TPMISHPolicy) error
	update func(*tpm2.PolicyCalculator) error
}

// policy is what a file's sealed object demands: the registers, the counter's exact value,
// and neither more resets nor a later clock. docs/spec/offline.md has the order.
func (f *file) policy(nv tpm2.NamedHandle) []demand {
	pcr := tpm2.PolicyPCR{PcrDigest: tpm2.TPM2BDigest{Buffer: f.digest[:]}, Pcrs: selection(f.pcrs)}
	count := tpm2.PolicyNV{
		AuthHandle: tpm2.AuthHandle{Handle: nv.Handle, Name: nv.Name, Auth: tpm2.PasswordAuth(nil)}, NVIndex: nv,
		OperandB: tpm2.TPM2BOperand{Buffer: binary.BigEndian.AppendUint64(nil, f.counter)}, Operation: tpm2.TPMEOEq,
	}
	return []demand{
		{func(t transport.TPM, s tpm2.TPMISHPolicy) error {
			pcr := pcr
			pcr.PolicySession = s
			_, err := pcr.Execute(t)
			return err
		}, pcr.Update},
		{func(t transport.TPM, s tpm2.TPMISHPolicy) error {
			count := count
			count.PolicySession = s
			_, err := count.Execute(t)
			return err
		}, count.Update},
		// A TPM that was told to keep its state, and then started without it, counts no reset.
		atMost(offsetRestart, make([]byte, 4)),
		atMost(offsetReset, binary.BigEndian.AppendUint32(nil, f.lastBoot)),
		atMost(offsetClock, binary.BigEndian.AppendUint64(nil, f.lastTime)),
	}
}

// atMost is TPM2_PolicyCounterTimer, which go-tpm does not have (TPM 2.0 part 3).
func atMost(offset uint16, limit []byte) demand {
	operand := binary.BigEndian.AppendUint16(nil, uint16(len(limit)))
	operand = append(operand, limit...)
	tail := binary.BigEndian.AppendUint16(nil, offset)
	tail = binary.BigEndian.AppendUint16(tail, uint16(tpm2.TPMEOUnsignedLE))
	return demand{func(t transport.TPM, s tpm2.TPMISHPolicy) error {
		body := slices.Concat(binary.BigEndian.AppendUint32(nil, s.HandleValue()), operand, tail)
		return raw(t, tpm2.TPMCCPolicyCounterTimer, body)
	}, func(p *tpm2.PolicyCalculator) error {
		args := sha256.Sum256(slices.Concat(limit, tail))
		return p.Update(tpm2.TPMCCPolicyCounterTimer, args[:])
	}}
}

// raw runs a command without sessions that answers with nothing but its code.
func raw(t transport.TPM, code tpm2.TPMCC, body []byte) error {
	const header = 10
	cmd := binary.BigEndian.AppendUint16(nil, uint16(tpm2.TPMSTNoSessions))
	cmd = binary.BigEndian.AppendUint32(cmd, uint32(header+len(body)))
	cmd = binary.BigEndian.AppendUint32(cmd, uint32(code))
	rsp, err := t.Send(append(cmd, body...))
	if err != nil {
		return err
	}
	if len(rsp) < header {
		return fmt.Errorf("a response of %d bytes", len(rsp))
	}
	if rc := tpm2.TPMRC(binary.BigEndian.Uint32(rsp[6:])); rc != tpm2.TPMRCSuccess {
		return rc
	}
	return nil
}

func (f *file) policyDigest(nv tpm2.NamedHandle) ([]byte, error) {
	p, err := tpm2.NewPolicyCalculator(tpm2.TPMAlgSHA256)
	if err != nil {
		return nil, err
	}
	for _, d := range f.policy(nv) {
		if err := d.update(p); err != nil {
			return nil, err
		}
	}
	return p.Hash().Digest, nil
}

// protect seals a key to the file's policy, and sets the sealed object.
func (m *module) protect(f *file, nv tpm2.NamedHandle, key []byte) error {
	digest, err := f.policyDigest(nv)
	if err != nil {
		return err
	}
	rsp, err := tpm2.Create{
		ParentHandle: tpm2.AuthHandle{Handle: m.srk.Handle, Name: m.srk.Name,
			Auth: tpm2.HMAC(tpm2.TPMAlgSHA256, 16, m.salted(), tpm2.AESEncryption(128, tpm2.EncryptIn))},
		InSensitive: tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{Data: tpm2.NewTPMUSensitiveCreate(&tpm2.TPM2BSensitiveData{Buffer: key})}},
		InPublic: tpm2.New2B(tpm2.TPMTPublic{
			Type: tpm2.TPMAlgKeyedHash, NameAlg: tpm2.TPMAlgSHA256,
			// Without userWithAuth nothing but the policy opens it.
			ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, NoDA: true},
			AuthPolicy:       tpm2.TPM2BDigest{Buffer: digest},
			Parameters:       tpm2.NewTPMUPublicParms(tpm2.TPMAlgKeyedHash, &tpm2.TPMSKeyedHashParms{Scheme: tpm2.TPMTKeyedHashScheme{Scheme: tpm2.TPMAlgNull}}),
		}),
	}.Execute(m)
	if err != nil {
		return fmt.Errorf("seal: %w", err)
	}
	f.public, f.private = tpm2.Marshal(rsp.OutPublic), tpm2.Marshal(rsp.OutPrivate)
	return nil
}

// unprotect returns the key that a file is encrypted under. The TPM refuses it unless the
// whole policy holds.
func (m *module) unprotect(f *file, nv tpm2.NamedHandle) ([]byte, error) {
	public, err := tpm2.Unmarshal[tpm2.TPM2BPublic](f.public)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrFormat, err)
	}
	private, err := tpm2.Unmarshal[tpm2.TPM2BPrivate](f.private)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrFormat, err)
	}
	object, err := tpm2.Load{
		ParentHandle: tpm2.AuthHandle{Handle: m.srk.Handle, Name: m.srk.Name, Auth: tpm2.PasswordAuth(nil)}, InPublic: *public, InPrivate: *private,
	}.Execute(m)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrFormat, err)
	}
	defer m.flush(object.ObjectHandle)
	session := func(t transport.TPM, s tpm2.TPMISHPolicy, _ tpm2.TPM2BNonce) error {
		for _, d := range f.policy(nv) {
			if err := d.run(t, s); err != nil {
				return err
			}
		}
		return nil
	}
	rsp, err := tpm2.Unseal{ItemHandle: tpm2.AuthHandle{Handle: object.ObjectHandle, Name: object.Name,
		Auth: tpm2.Policy(tpm2.TPMAlgSHA256, 16, session, m.salted(), tpm2.AESEncryption(128, tpm2.EncryptOut))}}.Execute(m)
	if err != nil {
		return nil, fmt.Errorf("unseal: %w", err)
	}
	return rsp.OutData.Buffer, nil
}
