package azurehcl

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"io"
	"math/big"
	"net/http"
	"strings"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

// IMDS is the metadata service of a machine's host.
type IMDS struct {
	Machine *Machine
	// Fault, if set, may answer a request itself, and says whether it did.
	Fault func(w http.ResponseWriter, r *http.Request) bool
}

// ServeHTTP implements http.Handler.
func (s *IMDS) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if s.Fault != nil && s.Fault(w, r) {
		return
	}
	if !strings.EqualFold(r.Header.Get("Metadata"), "true") {
		http.Error(w, "no Metadata header", http.StatusBadRequest)
		return
	}
	switch {
	case r.URL.Path == "/metadata/THIM/amd/certification" && s.Machine.SNP != nil:
		c := s.Machine.SNP
		answer(w, map[string]string{
			"vcekCert": certificate(c.VCEK), "tcbm": "DB18000000000004",
			"certificateChain": certificate(c.ASK) + certificate(c.ARK), "cacheControl": "86400",
		})
	case r.URL.Path == "/acc/tdquote" && r.Method == http.MethodPost && s.Machine.TDX != nil:
		s.quote(w, r)
	default:
		http.NotFound(w, r)
	}
}

// quote signs a TD report's data, with the fields of this machine.
func (s *IMDS) quote(w http.ResponseWriter, r *http.Request) {
	var q struct{ Report string }
	data, err := io.ReadAll(r.Body)
	if err == nil {
		err = json.Unmarshal(data, &q)
	}
	report, err2 := base64.RawURLEncoding.DecodeString(q.Report)
	if err != nil || err2 != nil || len(report) != 1024 {
		http.Error(w, "no TD report", http.StatusBadRequest)
		return
	}
	f := s.Machine.Fields
	f.Report = [64]byte(report[128:192])
	quote, err := s.Machine.TDX.Quote(f)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	answer(w, map[string]string{"quote": base64.RawURLEncoding.EncodeToString(quote)})
}

func answer(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v)
}

func certificate(c *x509.Certificate) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}))
}

// Attestation is a provider of Microsoft Attestation.
type Attestation struct {
	Issuer string
	Key    *rsa.PrivateKey
	Kid    string
	cert   []byte
}

// NewAttestation makes a provider with a key of its own.
func NewAttestation(issuer string) (*Attestation, error) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1)}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	return &Attestation{issuer, key, "key-1", cert}, err
}

// JWKS is what the provider has at /certs.
func (a *Attestation) JWKS() ([]byte, error) {
	return json.Marshal(map[string]any{"keys": []any{map[string]any{"kid": a.Kid, "kty": "RSA", "x5c": [][]byte{a.cert}}}})
}

// Claims are those of a token for a machine over a nonce.
func (a *Attestation) Claims(m *Machine, nonce []byte, now time.Time) jwt.MapClaims {
	kind := "sevsnpvm"
	if m.TDX != nil {
		kind = "tdxvm"
	}
	return jwt.MapClaims{
		"iss": a.Issuer, "iat": now.Unix(), "nbf": now.Unix(), "exp": now.Add(8 * time.Hour).Unix(),
		"x-ms-attestation-type": "azurevm", "x-ms-policy-hash": "wm9mHlvTU82e8UqoOy1Yj1FBRSNkfe99-69IYDq9eWs",
		"x-ms-runtime": map[string]any{"client-payload": map[string]any{"nonce": base64.StdEncoding.EncodeToString(nonce)}},
		"x-ms-isolation-tee": map[string]any{
			"x-ms-attestation-type": kind, "x-ms-compliance-status": "azure-compliant-cvm", "x-ms-runtime": m.Runtime(m.AK),
		},
	}
}

// Sign makes a token of claims.
func (a *Attestation) Sign(claims jwt.MapClaims) (string, error) {
	t := jwt.NewWithClaims(jwt.SigningMethodRS256, claims)
	t.Header["kid"] = a.Kid
	return t.SignedString(a.Key)
}
