// Package azurehcl is a synthetic Azure for tests: the report that the host
// compatibility layer leaves in a vTPM, the metadata service of a host, and a
// provider of Microsoft Attestation. The hardware is test/sim/amd's or test/sim/intel's,
// the vTPM is test/sim/swtpm's.
package azurehcl

import (
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"fmt"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/keyagent/keyagent/attestation/tpm"
	"github.com/keyagent/keyagent/test/sim/amd"
	"github.com/keyagent/keyagent/test/sim/intel"
)

// Where Azure's vTPM has the report and the attestation key.
const (
	nvReport = 0x01400001
	akHandle = 0x81000003
)

// Machine is a confidential VM: its hardware, which is one of two, and what the
// HCL says of it.
type Machine struct {
	// SNP and its template for reports.
	SNP       *amd.Chip
	SNPReport amd.Report
	// TDX and its template for quotes.
	TDX    *intel.Machine
	Fields intel.Fields
	// ID is the VM's vmUniqueId.
	ID string
	// Config changes the VM's configuration before it is reported.
	Config func(map[string]any)
	// Layout changes the report after it was made.
	Layout func(report []byte) []byte
	// AK is what Provision made in the TPM.
	AK *rsa.PublicKey
}

// JWK is a key as the HCL writes it.
func JWK(kid string, key *rsa.PublicKey) map[string]any {
	return map[string]any{"kid": kid, "key_ops": []string{"sign"}, "kty": "RSA", "e": "AQAB",
		"n": base64.RawURLEncoding.EncodeToString(key.N.FillBytes(make([]byte, 256)))}
}

// Runtime is the runtime data for an attestation key. A real HCL names an
// encryption key as well, for which a software TPM's NV memory is too small.
func (m *Machine) Runtime(key *rsa.PublicKey) map[string]any {
	config := map[string]any{
		"console-enabled": false, "secure-boot": true, "tpm-enabled": true, "tpm-persisted": true,
		"root-cert-thumbprint": "6nZZnYaJc4KqUZ_yvA-mucFdYNouvlPnITnNMXsHl-0", "vmUniqueId": m.ID,
	}
	if m.Config != nil {
		m.Config(config)
	}
	return map[string]any{"keys": []any{JWK("HCLAkPub", key)}, "vm-configuration": config, "user-data": ""}
}

// Report is what the HCL leaves in NV memory for an attestation key.
func (m *Machine) Report(key *rsa.PublicKey) ([]byte, error) {
	runtime, err := json.Marshal(m.Runtime(key))
	if err != nil {
		return nil, err
	}
	var data [64]byte
	sum := sha256.Sum256(runtime)
	copy(data[:], sum[:])
	kind, hw, err := m.hardware(data)
	if err != nil {
		return nil, err
	}
	u32 := binary.LittleEndian.AppendUint32
	size := 20 + uint32(len(runtime))
	out := append([]byte("HCLA"), make([]byte, 0, 4096)...)
	for _, v := range []uint32{2, 32 + 1184 + size, 2, 0, 0, 0, 0} {
		out = u32(out, v)
	}
	out = append(out, hw...)
	out = append(out, make([]byte, 1184-len(hw))...)
	for _, v := range []uint32{size, 1, kind, 1, uint32(len(runtime))} {
		out = u32(out, v)
	}
	out = append(out, runtime...)
	if m.Layout != nil {
		out = m.Layout(out)
	}
	return out, nil
}

func (m *Machine) hardware(data [64]byte) (kind uint32, report []byte, err error) {
	if m.TDX != nil {
		f := m.Fields
		f.Report = data
		return 4, f.TDReport(), nil
	}
	r := m.SNPReport
	r.Data = data
	report, err = m.SNP.Sign(r)
	return 2, report, err
}

// akTemplate is the attestation key of Azure's vTPMs: RSA 2048, RSASSA with
// SHA-256, restricted, without a policy.
func akTemplate() tpm2.TPMTPublic {
	scheme := tpm2.NewTPMUAsymScheme(tpm2.TPMAlgRSASSA, &tpm2.TPMSSigSchemeRSASSA{HashAlg: tpm2.TPMAlgSHA256})
	return tpm2.TPMTPublic{
		Type: tpm2.TPMAlgRSA, NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true,
			UserWithAuth: true, NoDA: true, Restricted: true, SignEncrypt: true},
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgRSA, &tpm2.TPMSRSAParms{
			Scheme: tpm2.TPMTRSAScheme{Scheme: tpm2.TPMAlgRSASSA, Details: scheme}, KeyBits: 2048}),
		Unique: tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{}),
	}
}

// Provision does to a TPM what the HCL does before the guest boots: the
// attestation key at its handle, the report in NV memory. Template may change the
// key's.
func (m *Machine) Provision(device string, template func(*tpm2.TPMTPublic)) error {
	t, err := tpm.OpenDevice(device)
	if err != nil {
		return err
	}
	defer t.Close()
	public := akTemplate()
	if template != nil {
		template(&public)
	}
	if m.AK, err = persist(t, public); err != nil {
		return fmt.Errorf("attestation key: %w", err)
	}
	report, err := m.Report(m.AK)
	if err != nil {
		return err
	}
	return WriteNV(t, nvReport, report)
}

func persist(t transport.TPM, public tpm2.TPMTPublic) (*rsa.PublicKey, error) {
	made, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHEndorsement, InPublic: tpm2.New2B(public)}.Execute(t)
	if err != nil {
		return nil, err
	}
	defer func() { _, _ = tpm2.FlushContext{FlushHandle: made.ObjectHandle}.Execute(t) }()
	_, err = tpm2.EvictControl{
		Auth: tpm2.TPMRHOwner, PersistentHandle: akHandle,
		ObjectHandle: &tpm2.NamedHandle{Handle: made.ObjectHandle, Name: made.Name},
	}.Execute(t)
	if err != nil {
		return nil, err
	}
	out, err := made.OutPublic.Contents()
	if err != nil {
		return nil, err
	}
	key, err := tpm2.Pub(*out)
	if err != nil {
		return nil, err
	}
	rsaKey, ok := key.(*rsa.PublicKey)
	if !ok {
		return nil, fmt.Errorf("a %T", key)
	}
	return rsaKey, nil
}

// WriteNV defines an index and writes it, in place of what was there.
func WriteNV(t transport.TPM, index tpm2.TPMHandle, data []byte) error {
	if old, err := (tpm2.NVReadPublic{NVIndex: index}).Execute(t); err == nil {
		if _, err := (tpm2.NVUndefineSpace{AuthHandle: tpm2.TPMRHOwner, NVIndex: tpm2.NamedHandle{Handle: index, Name: old.NVName}}).Execute(t); err != nil {
			return fmt.Errorf("undefine NV index %#x: %w", uint32(index), err)
		}
	}
	_, err := tpm2.NVDefineSpace{AuthHandle: tpm2.TPMRHOwner, PublicInfo: tpm2.New2B(tpm2.TPMSNVPublic{
		NVIndex: index, NameAlg: tpm2.TPMAlgSHA256, DataSize: uint16(len(data)),
		Attributes: tpm2.TPMANV{OwnerWrite: true, OwnerRead: true, AuthRead: true, AuthWrite: true, NoDA: true},
	})}.Execute(t)
	if err != nil {
		return fmt.Errorf("define NV index %#x of %d bytes: %w", uint32(index), len(data), err)
	}
	for at := 0; at < len(data); at += 512 {
		// The name changes with the first write.
		nv, err := (tpm2.NVReadPublic{NVIndex: index}).Execute(t)
		if err != nil {
			return err
		}
		_, err = tpm2.NVWrite{
			AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
			NVIndex:    tpm2.NamedHandle{Handle: index, Name: nv.NVName},
			Data:       tpm2.TPM2BMaxNVBuffer{Buffer: data[at:min(at+512, len(data))]}, Offset: uint16(at),
		}.Execute(t)
		if err != nil {
			return fmt.Errorf("write NV index %#x: %w", uint32(index), err)
		}
	}
	return nil
}
