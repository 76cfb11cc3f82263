package azure

import (
	"context"
	"crypto/sha256"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"google.golang.org/protobuf/proto"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
	synthetic "github.com/keyagent/keyagent/test/sim/azurehcl"
)

const provider = "https://shared.example.attest.azure.net"

// TestATokenIsBelievedOnlyForThisMachineNow: wrong issuers, keys, times, nonces and
// machines.
func TestATokenIsBelievedOnlyForThisMachineNow(t *testing.T) {
	m := newVM(t, attestation.SNP)
	maa := must[*synthetic.Attestation](t)(synthetic.NewAttestation(provider))
	stranger := must[*synthetic.Attestation](t)(synthetic.NewAttestation(provider))
	v := verifier(t, func(o *VerifierOptions) {
		o.Token = func() *TokenOptions {
			return &TokenOptions{Issuer: provider, JWKS: func(context.Context) ([]byte, error) { return maa.JWKS() }}
		}
	})
	m.opts.Token = func(_ context.Context, nonce []byte) (string, error) {
		return maa.Sign(maa.Claims(m.Machine, nonce, time.Now()))
	}
	genuine := m.evidence(v)
	all, err := verify(t, v, genuine)
	if err != nil {
		t.Fatal(err)
	}
	facts := all[0].Facts
	if facts["token_verified"] != true || facts["token_issuer"] != provider || facts["token_compliance"] != "azure-compliant-cvm" || facts["token_policy_hash"] == "" {
		t.Errorf("%+v", facts)
	}

	nonce := sha256.Sum256(binder[:])
	fresh := func() jwt.MapClaims { return maa.Claims(m.Machine, nonce[:], time.Now()) }
	with := func(change func(c jwt.MapClaims)) string {
		c := fresh()
		change(c)
		return must[string](t)(maa.Sign(c))
	}
	isolation := func(c jwt.MapClaims) map[string]any { return c["x-ms-isolation-tee"].(map[string]any) }
	unsigned := jwt.NewWithClaims(jwt.SigningMethodNone, fresh())
	unsigned.Header["kid"] = maa.Kid
	symmetric := jwt.NewWithClaims(jwt.SigningMethodHS256, fresh())
	symmetric.Header["kid"] = maa.Kid
	unnamed := jwt.NewWithClaims(jwt.SigningMethodRS256, fresh())
	pss := jwt.NewWithClaims(jwt.SigningMethodPS256, fresh())
	pss.Header["kid"] = maa.Kid
	parts := strings.Split(genuine.Token, ".")
	for name, raw := range map[string]string{
		"another issuer":     with(func(c jwt.MapClaims) { c["iss"] = "https://evil.example" }),
		"no issuer":          with(func(c jwt.MapClaims) { delete(c, "iss") }),
		"expired":            with(func(c jwt.MapClaims) { c["exp"] = time.Now().Add(-time.Hour).Unix() }),
		"no end":             with(func(c jwt.MapClaims) { delete(c, "exp") }),
		"not yet":            with(func(c jwt.MapClaims) { c["nbf"] = time.Now().Add(time.Hour).Unix() }),
		"of the future":      with(func(c jwt.MapClaims) { c["iat"] = time.Now().Add(time.Hour).Unix() }),
		"another nonce":      must[string](t)(maa.Sign(maa.Claims(m.Machine, make([]byte, 32), time.Now()))),
		"no nonce":           with(func(c jwt.MapClaims) { delete(c, "x-ms-runtime") }),
		"another hardware":   with(func(c jwt.MapClaims) { isolation(c)["x-ms-attestation-type"] = "tdxvm" }),
		"another type":       with(func(c jwt.MapClaims) { c["x-ms-attestation-type"] = "sgx" }),
		"no hardware":        with(func(c jwt.MapClaims) { delete(c, "x-ms-isolation-tee") }),
		"another VM":         with(func(c jwt.MapClaims) { o := *m.Machine; o.ID = "other"; isolation(c)["x-ms-runtime"] = o.Runtime(m.AK) }),
		"another AK":         with(func(c jwt.MapClaims) { isolation(c)["x-ms-runtime"] = m.Runtime(&stranger.Key.PublicKey) }),
		"another key's":      must[string](t)(stranger.Sign(fresh())),
		"no signature":       must[string](t)(unsigned.SignedString(jwt.UnsafeAllowNoneSignatureType)),
		"a MAC by the key":   must[string](t)(symmetric.SignedString(maa.Key.N.Bytes())),
		"no name of the key": must[string](t)(unnamed.SignedString(maa.Key)),
		"another algorithm":  must[string](t)(pss.SignedString(maa.Key)),
		"other claims":       parts[0] + "." + strings.Split(with(func(c jwt.MapClaims) { c["x"] = 1 }), ".")[1] + "." + parts[2],
		"no JWT":             "token",
		"too large":          strings.Repeat("x", maxToken+1),
	} {
		e := proto.Clone(genuine).(*attestv1.AzureEvidence)
		e.Token = raw
		_, err := verify(t, v, e)
		t.Run(name, func(t *testing.T) { wantErr(t, err, ErrToken) })
	}

	// Without one, the policy decides.
	e := proto.Clone(genuine).(*attestv1.AzureEvidence)
	e.Token = ""
	if all, err := verify(t, v, e); err != nil || all[0].Facts["token_verified"] != false {
		t.Errorf("%v", err)
	}
	// Nobody asked, so nobody looks.
	if all, err := verify(t, verifier(t), genuine); err != nil || all[0].Facts["token_verified"] != false || all[0].Facts["token_issuer"] != nil {
		t.Errorf("%v", err)
	}
	away := verifier(t, func(o *VerifierOptions) {
		o.Token = func() *TokenOptions {
			return &TokenOptions{Issuer: provider, JWKS: func(context.Context) ([]byte, error) { return nil, errors.New("outage") }}
		}
	})
	_, err = verify(t, away, genuine)
	wantErr(t, err, ErrToken)
	// Attack 37: a clock ten years ahead, and the error says so.
	late := verifier(t, func(o *VerifierOptions) {
		o.Token = v.opts.Token
		o.Now = func() time.Time { return time.Now().AddDate(10, 0, 0) }
	})
	_, err = verify(t, late, genuine)
	wantErr(t, err, ErrToken)
	if !strings.Contains(err.Error(), time.Now().AddDate(10, 0, 0).Format("2006-01")) {
		t.Error(err)
	}

	// An attestation service that is away costs the token alone.
	m.opts.Token = func(context.Context, []byte) (string, error) { return "half", errors.New("outage") }
	if e := m.evidence(v); e.Token != "" {
		t.Error(e.Token)
	}
}
