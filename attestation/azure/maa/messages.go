package maa

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/google/go-eventlog/tcg"

	"github.com/keyagent/keyagent/attestation/azure"
	"github.com/keyagent/keyagent/attestation/eventlog"
	"github.com/keyagent/keyagent/attestation/tpm"
)

// request is everything that the provider is told.
type request struct {
	nonce  []byte
	report *azure.Report
	chip   []byte // certificates of the chip
	ak     []byte // certificate of the attestation key
	log    []byte
	state  *quoted
	key    *transportKey
}

// What the provider is told of the system is shown in tokens, and not looked at here.
const (
	osType   = "Linux"
	osDistro = "keyagent"
)

// marshal packs the request, which has JSON in base64 in JSON, twice. Bytes are in
// standard base64 unless it says URL.
func (r request) marshal() ([]byte, error) {
	proof, err := json.Marshal(map[string]any{
		"SnpReport": base64.RawURLEncoding.EncodeToString(r.report.Hardware), "VcekCertChain": r.chip,
	})
	if err != nil {
		return nil, err
	}
	type pcr struct {
		Digest []byte
		Index  int
	}
	var pcrs []pcr
	var set []int
	for i, v := range r.state.values {
		pcrs, set = append(pcrs, pcr{v, i}), append(set, i)
	}
	info, err := json.Marshal(map[string]any{
		"AttestationProtocolVersion": "2.0",
		"ClientPayload":              map[string]any{"nonce": r.nonce},
		"IsolationInfo": map[string]any{
			"Type":     "SevSnp",
			"Evidence": map[string]any{"Proof": proof, "RunTimeData": r.report.RuntimeData},
		},
		"OSType": []byte(osType), "OSDistro": []byte(osDistro), "OSBuild": []byte(osDistro),
		"OSVersionMajor": 0, "OSVersionMinor": 0,
		"TcgLogs": r.log,
		"TpmInfo": map[string]any{
			"AikCert": r.ak, "AikPub": r.state.public,
			"PcrQuote": r.state.attest, "PcrSignature": r.state.signature, "PcrSet": set, "PCRs": pcrs,
			"EncKeyPub": r.key.public, "EncKeyCertifyInfo": r.key.attest, "EncKeyCertifyInfoSignature": r.key.signature,
		},
	})
	if err != nil {
		return nil, err
	}
	return json.Marshal(map[string]string{"AttestationInfo": base64.RawURLEncoding.EncodeToString(info)})
}

// answer is an encrypted token.
type answer struct {
	JWT                []byte `json:"Jwt"`
	AuthenticationData []byte // GCM's tag
	EncryptedInnerKey  []byte
	EncryptionParams   struct {
		IV []byte `json:"Iv"`
	}
}

// The sizes of an answer: of a 2048-bit key, and of GCM.
const (
	innerKeySize = 256
	ivSize       = 12
	tagSize      = 16
)

// parseAnswer reads what the provider answered.
func parseAnswer(data []byte) (*answer, error) {
	var outer struct{ Token string }
	if err := json.Unmarshal(data, &outer); err != nil {
		return nil, err
	}
	inner, err := base64.RawURLEncoding.DecodeString(strings.TrimRight(outer.Token, "="))
	if err != nil {
		return nil, fmt.Errorf("encrypted token: %w", err)
	}
	a := &answer{}
	if err := json.Unmarshal(inner, a); err != nil {
		return nil, fmt.Errorf("encrypted token: %w", err)
	}
	if len(a.EncryptedInnerKey) != innerKeySize || len(a.EncryptionParams.IV) != ivSize || len(a.AuthenticationData) != tagSize || len(a.JWT) == 0 {
		return nil, fmt.Errorf("encrypted token: key of %d bytes, nonce of %d, tag of %d, text of %d",
			len(a.EncryptedInnerKey), len(a.EncryptionParams.IV), len(a.AuthenticationData), len(a.JWT))
	}
	return a, nil
}

// open decrypts the token.
func (a *answer) open(key []byte) (string, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return "", fmt.Errorf("encrypted token: %w", err)
	}
	gcm, err := cipher.NewGCM(block)
	if err != nil {
		return "", err
	}
	token, err := gcm.Open(nil, a.EncryptionParams.IV, append(bytes.Clone(a.JWT), a.AuthenticationData...), []byte("Transport Key"))
	if err != nil {
		return "", fmt.Errorf("encrypted token: %w", err)
	}
	return string(token), nil
}

// parseCertificates returns the chip's certificate and its makers', in PEM.
func parseCertificates(data []byte) ([]byte, error) {
	var a struct{ VcekCert, CertificateChain string }
	if err := json.Unmarshal(data, &a); err != nil {
		return nil, err
	}
	for _, part := range []string{a.VcekCert, a.CertificateChain} {
		if block, _ := pem.Decode([]byte(part)); block == nil || block.Type != "CERTIFICATE" {
			return nil, errors.New("no certificate in the answer")
		}
	}
	return []byte(a.VcekCert + a.CertificateChain), nil
}

// readLog reads the firmware's event log and returns what the provider wants of it.
func readLog(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("event log: %w", err)
	}
	defer f.Close()
	log, err := io.ReadAll(io.LimitReader(f, tpm.MaxEventLog+1))
	if err != nil {
		return nil, fmt.Errorf("event log: %w", err)
	}
	if len(log) > tpm.MaxEventLog {
		return nil, fmt.Errorf("event log %s is larger than %d bytes", path, tpm.MaxEventLog)
	}
	if log, err = stripLog(log); err != nil {
		return nil, fmt.Errorf("event log %s: %w", path, err)
	}
	return log, nil
}

// maxEvents bounds a log; firmware writes a few hundred.
const maxEvents = 8192

// stripLog leaves of a log the events of the PCRs that are quoted, with their SHA-256
// digests alone (TCG PC Client Platform Firmware Profile 1.06, section 10).
func stripLog(log []byte) ([]byte, error) {
	events, err := eventlog.Parse(log, eventlog.SHA256, maxEvents)
	if err != nil {
		return nil, err
	}
	u16, u32 := binary.LittleEndian.AppendUint16, binary.LittleEndian.AppendUint32
	// The head, of the old form, says that the events have one digest of 32 bytes.
	head := append([]byte("Spec ID Event03\x00"), 0, 0, 0, 0, 0, 2, 0, 2)
	head = u16(u16(u32(head, 1), uint16(eventlog.SHA256)), 32)
	head = append(head, 0)
	out := append(u32(u32(nil, 0), uint32(tcg.NoAction)), make([]byte, 20)...)
	out = append(u32(out, uint32(len(head))), head...)
	for _, e := range events {
		if e.Index < 0 || e.Index >= registers || len(e.Digest) != 32 {
			continue
		}
		out = u16(u32(u32(u32(out, uint32(e.Index)), uint32(e.Type)), 1), uint16(eventlog.SHA256))
		out = append(u32(append(out, e.Digest...), uint32(len(e.Data))), e.Data...)
	}
	return out, nil
}
