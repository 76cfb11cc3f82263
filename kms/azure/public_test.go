package azure

import (
	"context"
	"net/http"
	"testing"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"

	"github.com/keyagent/keyagent/kms"
)

// Case 41: what Public says holds for every key that opens, also for one that was
// wrapped under an older version of another kind.
func TestUnderASymmetricKeyNothingOpensThatAnybodyCouldWrap(t *testing.T) {
	b := newBed(t, "oct-HSM")
	create(t, b.Vault, "kek", "RSA-HSM")
	k := open(t, b.options("kek"))
	key, byRSA := wrapped(t, k)
	if !kms.Public(k) {
		t.Error("an RSA key has no public half")
	}
	opens(t, k, byRSA, key)
	create(t, b.Vault, "kek", "oct-HSM")
	k = open(t, b.options("kek"))
	if kms.Public(k) {
		t.Error("a symmetric key has a public half")
	}
	fails(t, k, byRSA, kms.ErrWrongKey)
	key, bySymmetric := wrapped(t, k)
	opens(t, k, bySymmetric, key)
}

// An endpoint that lies does not choose what the tokens that it is shown are for.
func TestAnEndpointDoesNotChooseWhatTokensAreFor(t *testing.T) {
	b := newBed(t, "RSA")
	for resource, allowed := range map[string]bool{
		"https://vault.azure.net": true, "https://management.azure.com": false, "https://0.0.1": true, "http://vault.azure.net": false,
		"https://evil-vault.azure.net": false, "": false,
	} {
		b.proxy.Answer(func(w http.ResponseWriter, r *http.Request) bool {
			if r.Header.Get("Authorization") != "" {
				return false
			}
			w.Header().Set("WWW-Authenticate", `Bearer authorization="https://login.example/tenant", resource="`+resource+`"`)
			w.WriteHeader(http.StatusUnauthorized)
			return true
		})
		asked := &scopes{}
		opts := b.options("kek")
		opts.Credential = asked
		k, err := New(t.Context(), opts)
		if (err == nil) != allowed || (len(asked.seen) > 0) != allowed {
			t.Errorf("%q: %v, tokens for %q", resource, err, asked.seen)
		}
		if err == nil {
			k.Close()
		}
	}
}

// scopes is a credential that notes what it is asked for.
type scopes struct{ seen []string }

func (s *scopes) GetToken(ctx context.Context, o policy.TokenRequestOptions) (azcore.AccessToken, error) {
	s.seen = append(s.seen, o.Scopes...)
	return tokens(token).GetToken(ctx, o)
}
