// Package entra is the part of Microsoft Entra ID that gives tokens to a client
// with a secret, for tests.
package entra

import (
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"net/http"
	"strings"
	"sync"
	"time"
)

// Authority gives tokens of one tenant to one client. It is served over TLS.
type Authority struct {
	Tenant, Client, Secret string

	mu     sync.Mutex
	tokens map[string]string // token to scope
}

// Accepts reports whether a token is for a resource, such as
// https://vault.azure.net.
func (a *Authority) Accepts(token, resource string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	scope, ok := a.tokens[token]
	return ok && scope == resource+"/.default"
}

// ServeHTTP serves the tenant's metadata and its token endpoint.
func (a *Authority) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	base := "https://" + r.Host + "/" + a.Tenant
	switch r.URL.Path {
	case "/" + a.Tenant + "/v2.0/.well-known/openid-configuration":
		reply(w, http.StatusOK, map[string]any{
			"issuer": base + "/v2.0", "authorization_endpoint": base + "/oauth2/v2.0/authorize", "token_endpoint": base + "/oauth2/v2.0/token",
			"device_authorization_endpoint": base + "/oauth2/v2.0/devicecode", "jwks_uri": base + "/discovery/v2.0/keys",
			"response_types_supported": []string{"code"}, "subject_types_supported": []string{"pairwise"},
			"token_endpoint_auth_methods_supported": []string{"client_secret_post"},
		})
	case "/" + a.Tenant + "/oauth2/v2.0/token":
		a.token(w, r)
	default:
		reply(w, http.StatusNotFound, map[string]any{"error": "invalid_request", "error_description": "AADSTS90002: Tenant not found."})
	}
}

func (a *Authority) token(w http.ResponseWriter, r *http.Request) {
	refuse := func(code, why string) {
		reply(w, http.StatusUnauthorized, map[string]any{"error": code, "error_description": why, "error_codes": []int{7000215}})
	}
	if err := r.ParseForm(); err != nil || r.Method != http.MethodPost || r.PostForm.Get("grant_type") != "client_credentials" {
		refuse("unsupported_grant_type", "AADSTS70003: The app requested an unsupported grant type.")
		return
	}
	if r.PostForm.Get("client_id") != a.Client || r.PostForm.Get("client_secret") != a.Secret {
		refuse("invalid_client", "AADSTS7000215: Invalid client secret provided.")
		return
	}
	var scope string
	for s := range strings.FieldsSeq(r.PostForm.Get("scope")) {
		if strings.HasSuffix(s, "/.default") { // beside those of OpenID
			scope = s
		}
	}
	if scope == "" {
		refuse("invalid_scope", "AADSTS70011: The provided request must include a 'scope' input parameter.")
		return
	}
	token := unsigned(strings.TrimSuffix(scope, "/.default"))
	a.mu.Lock()
	if a.tokens == nil {
		a.tokens = map[string]string{}
	}
	a.tokens[token] = scope
	a.mu.Unlock()
	reply(w, http.StatusOK, map[string]any{"token_type": "Bearer", "expires_in": 3599, "ext_expires_in": 3599, "access_token": token})
}

// unsigned makes a token in the form of the real ones: services in tests read its
// claims, and only this authority knows whether it made it.
func unsigned(audience string) string {
	part := func(fields map[string]any) string {
		data, err := json.Marshal(fields)
		if err != nil {
			panic(err) // maps of strings and numbers can be encoded
		}
		return base64.RawURLEncoding.EncodeToString(data)
	}
	now := time.Now().Unix()
	return part(map[string]any{"alg": "RS256", "typ": "JWT"}) + "." + part(map[string]any{
		"aud": audience, "iss": "https://sts.windows.net/test/", "iat": now - 60, "nbf": now - 60, "exp": now + 3600, "jti": rand.Text(),
	}) + "." + base64.RawURLEncoding.EncodeToString([]byte("not signed"))
}

func reply(w http.ResponseWriter, status int, fields map[string]any) {
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(fields) // the client may have gone
}
