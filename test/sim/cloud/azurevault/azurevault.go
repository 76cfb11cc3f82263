// Package azurevault is the part of Azure Key Vault and Azure Managed HSM that
// keyagent uses, for tests: getting a key, wrapKey and unwrapKey over REST, with
// real RSA-OAEP-256 and AES key wrap, versions, disabled keys, permissions, the
// challenge for a token, and error documents of the service's shape.
package azurevault

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
)

// Vault is one vault, or one managed HSM. Its fields are set before it serves.
type Vault struct {
	// Host is how its keys' IDs begin, whatever address it is reached at.
	Host string
	// Authority is the URL of the tenant in its challenge.
	Authority string
	// Accepts decides on a token.
	Accepts func(token string) bool
	// HSM allows symmetric keys.
	HSM bool

	mu     sync.Mutex
	keys   map[string]*key
	denied map[string]string // by operation, the code inside the refusal
}

type key struct {
	kind     string
	versions []*version
}

type version struct {
	id      string
	enabled bool
	ops     []string
	rsa     *rsa.PrivateKey
	aes     []byte
	created int64
}

// CreateKey makes a key, or a new version of it. The kind is RSA, RSA-HSM or
// oct-HSM; without operations it has all.
func (v *Vault) CreateKey(name, kind string, ops ...string) error {
	random := make([]byte, 16+32)
	rand.Read(random)
	made := &version{id: hex.EncodeToString(random[:16]), enabled: true, ops: ops, aes: random[16:], created: time.Now().Unix()}
	if ops == nil {
		made.ops = []string{"encrypt", "decrypt", "wrapKey", "unwrapKey"}
	}
	if strings.HasPrefix(kind, "RSA") {
		var err error
		if made.rsa, err = rsa.GenerateKey(rand.Reader, 2048); err != nil {
			return err
		}
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.keys == nil {
		v.keys = map[string]*key{}
	}
	k := v.keys[strings.ToLower(name)]
	if k == nil {
		k = &key{}
		v.keys[strings.ToLower(name)] = k
	}
	k.kind = kind
	k.versions = append(k.versions, made)
	return nil
}

// Enable enables or disables the latest version of a key.
func (v *Vault) Enable(name string, enabled bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	k := v.keys[strings.ToLower(name)]
	k.versions[len(k.versions)-1].enabled = enabled
}

// Deny refuses get, wrapkey or unwrapkey, with a code such as ForbiddenByRbac
// inside the error.
func (v *Vault) Deny(operation, code string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.denied == nil {
		v.denied = map[string]string{}
	}
	v.denied[operation] = code
}

// failure is an error document of the service.
type failure struct {
	status               int
	code, inner, message string
}

func (f *failure) Error() string { return f.code }

func refuse(status int, code, inner, format string, args ...any) error {
	return &failure{status, code, inner, fmt.Sprintf(format, args...)}
}

// versions of the API that it speaks.
var versions = []string{"7.4", "7.5", "7.6", "2025-07-01"}

// ServeHTTP answers over TLS only: a test puts it behind it.
func (v *Vault) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	answer, err := v.serve(r)
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	var f *failure
	if errors.As(err, &f) {
		if f.status == http.StatusUnauthorized {
			w.Header().Set("WWW-Authenticate", fmt.Sprintf("Bearer authorization=%q, resource=%q", v.Authority, v.Resource()))
		}
		w.WriteHeader(f.status)
		inner := map[string]any{"code": f.code, "message": f.message}
		if f.inner != "" {
			inner["innererror"] = map[string]any{"code": f.inner}
		}
		answer = map[string]any{"error": inner}
	} else if err != nil {
		w.WriteHeader(http.StatusInternalServerError)
		answer = map[string]any{"error": map[string]any{"code": "InternalServerError", "message": err.Error()}}
	}
	_ = json.NewEncoder(w).Encode(answer) // the client may have gone
}

// Resource is what a token must be for.
func (v *Vault) Resource() string {
	_, domain, _ := strings.Cut(v.Host, ".")
	return "https://" + domain
}

func (v *Vault) serve(r *http.Request) (map[string]any, error) {
	token, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if !ok || !v.Accepts(token) {
		return nil, refuse(http.StatusUnauthorized, "Unauthorized", "", "AKV10000: Request is missing a Bearer or PoP token.")
	}
	if !slices.Contains(versions, r.URL.Query().Get("api-version")) {
		return nil, refuse(http.StatusBadRequest, "BadParameter", "", "The specified version (%s) is not recognized.", r.URL.Query().Get("api-version"))
	}
	p := strings.Split(strings.Trim(r.URL.Path, "/"), "/") // keys/NAME[/VERSION][/OPERATION]
	if len(p) < 2 || p[0] != "keys" || len(p) > 4 {
		return nil, refuse(http.StatusNotFound, "NotFound", "", "no such resource")
	}
	operation, number := "get", ""
	if r.Method == http.MethodPost {
		operation = p[len(p)-1]
		p = p[:len(p)-1]
	} else if r.Method != http.MethodGet {
		return nil, refuse(http.StatusMethodNotAllowed, "BadParameter", "", "HTTP %s is not supported", r.Method)
	}
	if len(p) == 3 {
		number = p[2]
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if code := v.denied[operation]; code != "" {
		return nil, refuse(http.StatusForbidden, "Forbidden", code, "Caller is not authorized to perform action on resource.")
	}
	k := v.keys[strings.ToLower(p[1])]
	if k == nil {
		return nil, refuse(http.StatusNotFound, "KeyNotFound", "", "A key with (name/id) %s was not found in this key vault.", p[1])
	}
	at := k.versions[len(k.versions)-1]
	if number != "" {
		i := slices.IndexFunc(k.versions, func(v *version) bool { return v.id == number })
		if i < 0 {
			return nil, refuse(http.StatusNotFound, "KeyNotFound", "", "A key with (name/id) %s/%s was not found in this key vault.", p[1], number)
		}
		at = k.versions[i]
	}
	kid := "https://" + v.Host + "/keys/" + p[1] + "/" + at.id
	if operation == "get" {
		return at.describe(kid, k.kind), nil
	}
	return at.run(operation, kid, r.Body)
}

func encode(p []byte) string { return base64.RawURLEncoding.EncodeToString(p) }

func (v *version) describe(kid, kind string) map[string]any {
	jwk := map[string]any{"kid": kid, "kty": kind, "key_ops": v.ops}
	if v.rsa != nil {
		jwk["n"] = encode(v.rsa.N.Bytes())
		jwk["e"] = encode(big.NewInt(int64(v.rsa.E)).Bytes())
	}
	return map[string]any{"key": jwk, "attributes": map[string]any{
		"enabled": v.enabled, "created": v.created, "updated": v.created, "recoveryLevel": "Recoverable+Purgeable",
		"recoverableDays": 90, "exportable": false,
	}}
}

// run wraps or unwraps.
func (v *version) run(operation, kid string, body io.Reader) (map[string]any, error) {
	name, known := map[string]string{"wrapkey": "wrapKey", "unwrapkey": "unwrapKey"}[operation]
	var in struct{ Alg, Value string }
	d := json.NewDecoder(io.LimitReader(body, 1<<16))
	d.DisallowUnknownFields()
	err := d.Decode(&in)
	value, decodeErr := base64.RawURLEncoding.Strict().DecodeString(in.Value)
	bad := refuse(http.StatusBadRequest, "BadParameter", "", "The parameter is incorrect.")
	switch {
	case !known || err != nil || decodeErr != nil:
		return nil, bad
	case !v.enabled:
		return nil, refuse(http.StatusForbidden, "Forbidden", "KeyDisabled", "Operation %s is not allowed on a disabled key.", name)
	case !slices.Contains(v.ops, name):
		return nil, refuse(http.StatusForbidden, "Forbidden", "KeyOperationForbidden", "Operation %s is not permitted on this key.", name)
	}
	var out []byte
	switch {
	case in.Alg == "RSA-OAEP-256" && v.rsa != nil && name == "wrapKey":
		out, err = rsa.EncryptOAEP(sha256.New(), rand.Reader, &v.rsa.PublicKey, value, nil)
	case in.Alg == "RSA-OAEP-256" && v.rsa != nil:
		out, err = rsa.DecryptOAEP(sha256.New(), nil, v.rsa, value, nil)
	case in.Alg == "A256KW" && v.rsa == nil && name == "wrapKey":
		out, err = wrapAES(v.aes, value)
	case in.Alg == "A256KW" && v.rsa == nil:
		out, err = unwrapAES(v.aes, value)
	default:
		return nil, refuse(http.StatusBadRequest, "BadParameter", "", "Property  has invalid value: %s is not allowed for this key", in.Alg)
	}
	if err != nil {
		return nil, bad
	}
	return map[string]any{"kid": kid, "value": encode(out)}, nil
}
