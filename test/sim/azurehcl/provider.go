package azurehcl

import (
	"bytes"
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/google/go-sev-guest/verify"
	"github.com/google/go-tpm/tpm2"

	"github.com/keyagent/keyagent/attestation/eventlog"
	"github.com/keyagent/keyagent/attestation/tpm"
)

// nvAKCertificate is where Azure's vTPM has the attestation key's certificate.
const nvAKCertificate = 0x01C101D0

// Certify puts a certificate of the attestation key into the TPM, which Provision was
// called for.
func (m *Machine) Certify(device string, by *Attestation) error {
	issuer, err := x509.ParseCertificate(by.cert)
	if err != nil {
		return err
	}
	cert, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{SerialNumber: issuer.SerialNumber}, issuer, m.AK, by.Key)
	if err != nil {
		return err
	}
	t, err := tpm.OpenDevice(device)
	if err != nil {
		return err
	}
	defer t.Close()
	return WriteNV(t, nvAKCertificate, cert)
}

// Provider is what a machine asks for tokens: it checks what it is told, and encrypts
// a token to the key that the machine's vTPM certified.
type Provider struct {
	*Attestation
	Machine *Machine
	// Answer, if set, changes what is answered.
	Answer func(token map[string]any)
	// Told is the last request, unpacked.
	Told Told
}

// Told is what a machine tells a provider. Bytes are in standard base64.
type Told struct {
	AttestationProtocolVersion string
	ClientPayload              struct {
		Nonce []byte `json:"nonce"`
	}
	IsolationInfo struct {
		Type     string
		Evidence struct{ Proof, RunTimeData []byte }
	}
	OSBuild, OSDistro, OSType      []byte
	OSVersionMajor, OSVersionMinor int
	TcgLogs                        []byte
	TpmInfo                        struct {
		AikCert, AikPub, PcrQuote, PcrSignature                  []byte
		EncKeyPub, EncKeyCertifyInfo, EncKeyCertifyInfoSignature []byte
		PcrSet                                                   []int
		PCRs                                                     []struct {
			Digest []byte
			Index  int
		}
	}
}

// ServeHTTP implements http.Handler.
func (p *Provider) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodPost || r.URL.Path != "/attest/AzureGuest" || r.URL.Query().Get("api-version") != "2020-10-01" {
		http.NotFound(w, r)
		return
	}
	token, err := p.serve(r)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	answer(w, map[string]string{"token": token})
}

func (p *Provider) serve(r *http.Request) (string, error) {
	var outer struct{ AttestationInfo string }
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return "", err
	}
	if err := json.Unmarshal(body, &outer); err != nil {
		return "", err
	}
	inner, err := base64.RawURLEncoding.DecodeString(outer.AttestationInfo)
	if err != nil {
		return "", err
	}
	p.Told = Told{}
	strict := json.NewDecoder(bytes.NewReader(inner))
	strict.DisallowUnknownFields()
	if err := strict.Decode(&p.Told); err != nil {
		return "", err
	}
	if err := p.hardware(); err != nil {
		return "", fmt.Errorf("hardware: %w", err)
	}
	to, err := p.vtpm()
	if err != nil {
		return "", fmt.Errorf("vTPM: %w", err)
	}
	token, err := p.Sign(p.Claims(p.Machine, p.Told.ClientPayload.Nonce, time.Now()))
	if err != nil {
		return "", err
	}
	return p.encrypt(token, to)
}

// hardware demands a report of the machine's chip over the runtime data.
func (p *Provider) hardware() error {
	var proof struct {
		SnpReport     string
		VcekCertChain []byte
	}
	told := p.Told.IsolationInfo
	if err := json.Unmarshal(told.Evidence.Proof, &proof); err != nil {
		return err
	}
	report, err := base64.RawURLEncoding.DecodeString(proof.SnpReport)
	if err != nil {
		return err
	}
	chain := 0
	for rest := proof.VcekCertChain; ; chain++ {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if want := []*x509.Certificate{p.Machine.SNP.VCEK, p.Machine.SNP.ASK, p.Machine.SNP.ARK}; chain > 2 || !bytes.Equal(block.Bytes, want[chain].Raw) {
			return errors.New("another chain of certificates")
		}
	}
	covered := sha256.Sum256(told.Evidence.RunTimeData)
	switch {
	case p.Told.AttestationProtocolVersion != "2.0" || told.Type != "SevSnp" || chain != 3:
		return fmt.Errorf("version %q, type %q, %d certificates", p.Told.AttestationProtocolVersion, told.Type, chain)
	case len(report) != 1184 || !bytes.Equal(report[0x50:0x70], covered[:]):
		return errors.New("the report does not cover the runtime data")
	}
	return verify.SnpReportSignature(report, p.Machine.SNP.VCEK)
}

// vtpm demands a quote by the key that the runtime data names, and a key that this key
// certifies, for the state that it quoted.
func (p *Provider) vtpm() (*rsa.PublicKey, error) {
	told := p.Told.TpmInfo
	ak, _, err := public(told.AikPub)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(told.AikCert)
	if err != nil {
		return nil, err
	}
	modulus := base64.RawURLEncoding.EncodeToString(ak.N.FillBytes(make([]byte, 256)))
	if !ak.Equal(cert.PublicKey) || !strings.Contains(string(p.Told.IsolationInfo.Evidence.RunTimeData), modulus) {
		return nil, errors.New("another attestation key")
	}
	var values []byte
	for i, v := range told.PCRs {
		values = append(values, v.Digest...)
		if v.Index != i {
			return nil, fmt.Errorf("PCR %d in place of %d", v.Index, i)
		}
	}
	digest := sha256.Sum256(values)
	if !slices.Equal(told.PcrSet, []int{0, 1, 2, 3, 4, 5, 6, 7}) || len(told.PCRs) != 8 {
		return nil, fmt.Errorf("PCRs %v", told.PcrSet)
	}
	quote, err := signed(told.PcrQuote, told.PcrSignature, ak)
	if err != nil {
		return nil, err
	}
	info, err := quote.Attested.Quote()
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(quote.ExtraData.Buffer, p.Told.ClientPayload.Nonce) || !bytes.Equal(info.PCRDigest.Buffer, digest[:]) {
		return nil, errors.New("the quote is over another nonce or other PCRs")
	}
	to, enc, err := public(told.EncKeyPub)
	if err != nil {
		return nil, err
	}
	name, err := tpm2.ObjectName(enc)
	if err != nil {
		return nil, err
	}
	statement, err := signed(told.EncKeyCertifyInfo, told.EncKeyCertifyInfoSignature, ak)
	if err != nil {
		return nil, err
	}
	certified, err := statement.Attested.Certify()
	if err != nil {
		return nil, err
	}
	policy, err := tpm2.NewPolicyCalculator(tpm2.TPMAlgSHA256)
	if err != nil {
		return nil, err
	}
	if err := (tpm2.PolicyPCR{PcrDigest: tpm2.TPM2BDigest{Buffer: digest[:]}, Pcrs: info.PCRSelect}).Update(policy); err != nil {
		return nil, err
	}
	if !bytes.Equal(certified.Name.Buffer, name.Buffer) || !bytes.Equal(enc.AuthPolicy.Buffer, policy.Hash().Digest) || enc.ObjectAttributes.UserWithAuth {
		return nil, errors.New("the encryption key is another, or not bound to the PCRs")
	}
	events, err := eventlog.Parse(p.Told.TcgLogs, eventlog.SHA256, 1<<13)
	if err != nil || len(events) == 0 {
		return nil, fmt.Errorf("event log of %d events: %w", len(events), err)
	}
	return to, nil
}

func public(raw []byte) (*rsa.PublicKey, *tpm2.TPMTPublic, error) {
	p, err := tpm2.Unmarshal[tpm2.TPM2BPublic](raw)
	if err != nil {
		return nil, nil, err
	}
	contents, err := p.Contents()
	if err != nil {
		return nil, nil, err
	}
	key, err := tpm2.Pub(*contents)
	if err != nil {
		return nil, nil, err
	}
	r, ok := key.(*rsa.PublicKey)
	if !ok {
		return nil, nil, fmt.Errorf("a %T", key)
	}
	return r, contents, nil
}

func signed(attest, signature []byte, by *rsa.PublicKey) (*tpm2.TPMSAttest, error) {
	sum := sha256.Sum256(attest)
	if err := rsa.VerifyPKCS1v15(by, crypto.SHA256, sum[:], signature); err != nil {
		return nil, err
	}
	return tpm2.Unmarshal[tpm2.TPMSAttest](attest)
}

func (p *Provider) encrypt(token string, to *rsa.PublicKey) (string, error) {
	key := make([]byte, 32)
	_, _ = rand.Read(key)
	iv := make([]byte, 12)
	_, _ = rand.Read(iv)
	block, err := aes.NewCipher(key)
	if err != nil {
		return "", err
	}
	gcm, err := cipher.NewGCM(block)
	if err != nil {
		return "", err
	}
	text := gcm.Seal(nil, iv, []byte(token), []byte("Transport Key"))
	//lint:ignore SA1019 it is how the provider encrypts
	inner, err := rsa.EncryptPKCS1v15(rand.Reader, to, key)
	if err != nil {
		return "", err
	}
	sealed := map[string]any{
		"Jwt": text[:len(token)], "AuthenticationData": text[len(token):],
		"EncryptedInnerKey": inner, "EncryptionParams": map[string]any{"Iv": iv},
	}
	if p.Answer != nil {
		p.Answer(sealed)
	}
	out, err := json.Marshal(sealed)
	return base64.RawURLEncoding.EncodeToString(out), err
}
