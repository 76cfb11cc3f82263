package azure

import (
	"context"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/golang-jwt/jwt/v5"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/facts"
)

// TokenOptions say whose tokens of Microsoft Attestation are believed.
type TokenOptions struct {
	// Issuer is the attestation provider's address, as tokens name it. Required.
	Issuer string
	// JWKS returns the provider's keys as its address /certs has them. It is asked
	// for each token and should remember them. Required.
	JWKS func(ctx context.Context) ([]byte, error)
}

// clockSkew is what Microsoft's clock and ours may differ by.
const clockSkew = time.Minute

// token is what we look at of a token for the attestation type "azurevm".
type token struct {
	jwt.RegisteredClaims
	Type    string `json:"x-ms-attestation-type"`
	Policy  string `json:"x-ms-policy-hash"`
	Runtime struct {
		Client struct {
			Nonce string `json:"nonce"`
		} `json:"client-payload"`
	} `json:"x-ms-runtime"`
	Isolation struct {
		Type       string      `json:"x-ms-attestation-type"`
		Compliance string      `json:"x-ms-compliance-status"`
		Runtime    runtimeData `json:"x-ms-runtime"`
	} `json:"x-ms-isolation-tee"`
}

// isolations are Microsoft's names of the hardware.
var isolations = map[string]attestation.Kind{"sevsnpvm": attestation.SNP, "tdxvm": attestation.TDX}

// verify demands that a token is the issuer's, of now, over the binder, and of the
// machine whose attestation key made the quote. It adds facts about it.
func (o *TokenOptions) verify(ctx context.Context, raw string, r *Report, binder attestation.Binder, now time.Time, set map[string]any) error {
	if len(raw) > maxToken {
		return fmt.Errorf("%w: %d bytes", ErrToken, len(raw))
	}
	keys, err := o.JWKS(ctx)
	if err != nil {
		return fmt.Errorf("%w: keys of %s: %w", ErrToken, o.Issuer, err)
	}
	var t token
	_, err = jwt.NewParser(
		jwt.WithValidMethods([]string{"RS256"}), jwt.WithIssuer(o.Issuer), jwt.WithExpirationRequired(), jwt.WithIssuedAt(),
		jwt.WithTimeFunc(func() time.Time { return now }), jwt.WithLeeway(clockSkew), jwt.WithStrictDecoding(),
	).ParseWithClaims(raw, &t, func(j *jwt.Token) (any, error) {
		kid, _ := j.Header["kid"].(string)
		return findKey(keys, kid)
	})
	if err != nil {
		return fmt.Errorf("%w: %w (this machine's clock says %s)", ErrToken, err, now.Format(time.RFC3339))
	}
	nonce := sha256.Sum256(binder[:])
	switch {
	case t.Type != "azurevm" || isolations[t.Isolation.Type] != r.Isolation:
		return fmt.Errorf("%w: it is of %q on %q, the hardware is %s", ErrToken, t.Type, t.Isolation.Type, r.Isolation)
	case t.Runtime.Client.Nonce != base64.StdEncoding.EncodeToString(nonce[:]):
		return fmt.Errorf("%w: it does not cover this connection", ErrToken)
	case !strings.EqualFold(t.Isolation.Runtime.Config.ID, r.config.ID):
		return fmt.Errorf("%w: it is of the VM %q", ErrToken, t.Isolation.Runtime.Config.ID)
	}
	if !t.Isolation.Runtime.has(r.AK) {
		return fmt.Errorf("%w: it is of another attestation key", ErrToken)
	}
	facts.AzureTokenVerified.Put(set, true)
	facts.AzureTokenIssuer.Put(set, t.Issuer)
	facts.AzureTokenCompliance.Put(set, t.Isolation.Compliance)
	facts.AzureTokenPolicyHash.Put(set, t.Policy)
	return nil
}

func (d runtimeData) has(ak *rsa.PublicKey) bool {
	for _, k := range d.Keys {
		if key, err := k.rsa(); k.ID == "HCLAkPub" && err == nil && key.Equal(ak) {
			return true
		}
	}
	return false
}

// findKey looks a key up in the provider's set, where each is in a certificate.
func findKey(set []byte, kid string) (*rsa.PublicKey, error) {
	var s struct {
		Keys []struct {
			ID           string   `json:"kid"`
			Certificates [][]byte `json:"x5c"`
		} `json:"keys"`
	}
	if err := json.Unmarshal(set, &s); err != nil {
		return nil, fmt.Errorf("key set: %w", err)
	}
	for _, k := range s.Keys {
		if kid == "" || k.ID != kid || len(k.Certificates) == 0 {
			continue
		}
		cert, err := x509.ParseCertificate(k.Certificates[0])
		if err != nil {
			return nil, fmt.Errorf("key set: %w", err)
		}
		key, ok := cert.PublicKey.(*rsa.PublicKey)
		if !ok || key.N.BitLen() < 2048 {
			return nil, fmt.Errorf("key set: %q is no RSA key of 2048 bits", kid)
		}
		return key, nil
	}
	return nil, fmt.Errorf("key %q is not one of the provider's", kid)
}
