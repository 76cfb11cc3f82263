package azure

import (
	"bytes"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math/big"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/facts"
)

// The layout of the HCL's report. Numbers are little-endian.
const (
	headerSize   = 32
	areaSize     = 1184 // of the hardware's report: SNP's, or a TD report and zeros
	tdReportSize = 1024
	requestSize  = 20 // what precedes the runtime data

	requestType = 2 // attestation

	typeSNP = 2
	typeTDX = 4

	tdReportData = 128 // offset in a TD report
)

// Report is a parsed report of the HCL. Nothing of it is verified.
type Report struct {
	// Version is the HCL's.
	Version uint32
	// Isolation is the kind of the hardware: attestation.SNP or attestation.TDX.
	Isolation attestation.Kind
	// Hardware is the SNP report of 1184 bytes, or the TD report of 1024.
	Hardware []byte
	// ReportData is what the hardware's report must cover: the digest of the
	// runtime data, then zeros.
	ReportData [64]byte
	// RuntimeData is that data, in JSON.
	RuntimeData []byte
	// AK is the vTPM's attestation key by the runtime data.
	AK *rsa.PublicKey

	config vmConfiguration
}

// runtimeData is what the HCL has the hardware cover.
type runtimeData struct {
	Keys   []jwk           `json:"keys"`
	Config vmConfiguration `json:"vm-configuration"`
}

type jwk struct {
	ID       string `json:"kid"`
	Type     string `json:"kty"`
	Exponent string `json:"e"`
	Modulus  string `json:"n"`
}

// vmConfiguration has pointers for what must be said, and for what old versions of
// the HCL do not say.
type vmConfiguration struct {
	Console    *bool  `json:"console-enabled"`
	SecureBoot *bool  `json:"secure-boot"`
	TPM        *bool  `json:"tpm-enabled"`
	Persisted  *bool  `json:"tpm-persisted"`
	Thumbprint string `json:"root-cert-thumbprint"`
	ID         string `json:"vmUniqueId"`
}

// Parse reads a report of the HCL as NV memory has it: zeros may follow.
func Parse(report []byte) (*Report, error) {
	if len(report) < headerSize+areaSize+requestSize || len(report) > maxReport {
		return nil, fmt.Errorf("%w: HCL report of %d bytes", ErrMalformed, len(report))
	}
	u32 := func(at int) uint32 { return binary.LittleEndian.Uint32(report[at:]) }
	area := report[headerSize : headerSize+areaSize]
	request := headerSize + areaSize
	size := int64(u32(request + 16))
	r := &Report{Version: u32(4)}
	switch {
	case string(report[:4]) != "HCLA":
		return nil, fmt.Errorf("%w: HCL report begins with %q", ErrMalformed, report[:4])
	case u32(12) != requestType || u32(16) != 0 || !zero(report[20:headerSize]):
		return nil, fmt.Errorf("%w: HCL report answers request %d with status %d", ErrMalformed, u32(12), u32(16))
	case u32(request+4) != 1:
		return nil, fmt.Errorf("%w: runtime data of version %d", ErrMalformed, u32(request+4))
	case size == 0 || size > int64(len(report)-request-requestSize):
		return nil, fmt.Errorf("%w: runtime data of %d bytes", ErrMalformed, size)
	case int64(u32(request)) != requestSize+size || int64(u32(8)) != int64(request)+requestSize+size:
		return nil, fmt.Errorf("%w: the HCL report's sizes contradict each other", ErrMalformed)
	}
	runtime := report[request+requestSize:][:size]
	if !zero(report[request+requestSize+int(size):]) {
		return nil, fmt.Errorf("%w: something follows the runtime data", ErrMalformed)
	}
	switch kind := u32(request + 8); kind {
	case typeSNP:
		r.Isolation, r.Hardware = attestation.SNP, area
	case typeTDX:
		r.Isolation, r.Hardware = attestation.TDX, area[:tdReportSize]
		if !zero(area[tdReportSize:]) {
			return nil, fmt.Errorf("%w: something follows the TD report", ErrMalformed)
		}
	default:
		return nil, fmt.Errorf("%w: hardware report of type %d", ErrMalformed, kind)
	}
	r.RuntimeData = runtime
	if err := r.digest(u32(request+12), runtime); err != nil {
		return nil, err
	}
	return r, r.parseRuntime(runtime)
}

func (r *Report) digest(kind uint32, runtime []byte) error {
	switch kind {
	case 1:
		sum := sha256.Sum256(runtime)
		copy(r.ReportData[:], sum[:])
	case 2:
		sum := sha512.Sum384(runtime)
		copy(r.ReportData[:], sum[:])
	case 3:
		r.ReportData = sha512.Sum512(runtime)
	default:
		return fmt.Errorf("%w: digest of type %d", ErrMalformed, kind)
	}
	return nil
}

func (r *Report) parseRuntime(raw []byte) error {
	var d runtimeData
	if err := json.Unmarshal(raw, &d); err != nil {
		return fmt.Errorf("%w: runtime data: %w", ErrMalformed, err)
	}
	for _, k := range d.Keys {
		if k.ID != "HCLAkPub" {
			continue
		}
		if r.AK != nil {
			return fmt.Errorf("%w: runtime data with two attestation keys", ErrMalformed)
		}
		var err error
		if r.AK, err = k.rsa(); err != nil {
			return err
		}
	}
	r.config = d.Config
	switch c := d.Config; {
	case r.AK == nil:
		return fmt.Errorf("%w: runtime data without an attestation key", ErrMalformed)
	case c.Console == nil || c.SecureBoot == nil || c.TPM == nil || c.ID == "":
		return fmt.Errorf("%w: runtime data without the VM's configuration", ErrMalformed)
	}
	return nil
}

// rsa reads a key of 2048 bits, which all vTPMs of Azure have.
func (k jwk) rsa() (*rsa.PublicKey, error) {
	n, err := base64.RawURLEncoding.Strict().DecodeString(k.Modulus)
	if err != nil {
		return nil, fmt.Errorf("%w: attestation key: %w", ErrMalformed, err)
	}
	e, err := base64.RawURLEncoding.Strict().DecodeString(k.Exponent)
	if err != nil || k.Type != "RSA" || !bytes.Equal(e, []byte{1, 0, 1}) {
		return nil, fmt.Errorf("%w: attestation key of type %q with exponent %q", ErrMalformed, k.Type, k.Exponent)
	}
	key := &rsa.PublicKey{N: new(big.Int).SetBytes(n), E: 65537}
	if key.N.BitLen() != 2048 || len(n) != 256 {
		return nil, fmt.Errorf("%w: attestation key of %d bits", ErrMalformed, key.N.BitLen())
	}
	return key, nil
}

// Claims returns what the report says of the VM, unverified: for display, and for
// making reference values.
func (r *Report) Claims() attestation.Claims {
	c := r.config
	set := map[string]any{}
	facts.AzureVMID.Put(set, c.ID)
	facts.AzureHCLVersion.Put(set, uint64(r.Version))
	facts.AzureIsolation.Put(set, string(r.Isolation))
	facts.AzureSecureBoot.Put(set, *c.SecureBoot)
	facts.AzureTPMEnabled.Put(set, *c.TPM)
	facts.AzureConsoleEnabled.Put(set, *c.Console)
	facts.AzureRootThumbprint.Put(set, c.Thumbprint)
	facts.AzureTokenVerified.Put(set, false)
	if c.Persisted != nil {
		facts.AzureTPMPersisted.Put(set, *c.Persisted)
	}
	return attestation.Claims{Kind: attestation.Azure, Identity: c.ID, Facts: set}
}

// coversRuntime looks whether the unverified report is at least of this runtime
// data, so that an issuer notices before anybody else does.
func (r *Report) coversRuntime() bool {
	at := 0x50 // REPORT_DATA of SNP
	if r.Isolation == attestation.TDX {
		at = tdReportData
	}
	return bytes.Equal(r.Hardware[at:at+64], r.ReportData[:])
}

func zero(b []byte) bool { return len(bytes.Trim(b, "\x00")) == 0 }

// Summary is what a report of the HCL says, for people. None of it is verified.
type Summary struct {
	VM         string `json:"vm_id"`
	Isolation  string `json:"isolation"`
	HCL        uint32 `json:"hcl_version"`
	SecureBoot bool   `json:"secure_boot"`
	Console    bool   `json:"console_enabled"`
	ReportData string `json:"report_data"`
}

// Summarize reads a report without verifying it.
func Summarize(report []byte) (*Summary, error) {
	r, err := Parse(report)
	if err != nil {
		return nil, err
	}
	return &Summary{VM: r.config.ID, Isolation: string(r.Isolation), HCL: r.Version, SecureBoot: *r.config.SecureBoot,
		Console: *r.config.Console, ReportData: hex.EncodeToString(r.ReportData[:])}, nil
}
