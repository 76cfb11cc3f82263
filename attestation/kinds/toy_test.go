package kinds_test

import (
	"bytes"
	"crypto/ed25519"
	"encoding/hex"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/kinds"
	"github.com/keyagent/keyagent/attestation/policy"
	"github.com/keyagent/keyagent/attestation/saved"
	"github.com/keyagent/keyagent/test/sim/toy"
)

func ok[T any](t testing.TB) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// A kind is a package and this line.
func withToy(key ed25519.PrivateKey, level byte) kinds.Table {
	return append(kinds.All(), toy.Kind(key, level))
}

const toyPolicy = `version: 1
lifetime: 1h
trust:
  toy: {keys: [KEY]}
profiles:
  - name: box
    toy: {min_level: 3}
grants:
  - {name: all, profiles: [box], volumes: ["*"], operations: [open], when: 'toy.toy_level < uint(9) && kinds == ["toy"] && toy.identity == identity'}
`

// Everything that keyagent does with evidence works for a kind that nothing but the table
// knows: found, made, kept in a file, verified, appraised, shown, and measured into a
// profile.
func TestAKindIsAPackageAndALine(t *testing.T) {
	public, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	text := strings.Replace(toyPolicy, "KEY", hex.EncodeToString(public), 1)

	judge := func(level byte, text string) (*policy.Appraisal, *policy.Policy, error) {
		t.Helper()
		table := withToy(key, level)
		p := ok[*policy.Policy](t)(policy.Parse(table.Policies(), "policy.yaml", []byte(text)))
		issuers, findings, err := table.Issuers(t.Context(), kinds.IssuerOptions{Kinds: ok[[]attestation.Kind](t)(table.Parse([]string{"toy"}))})
		if err != nil || len(findings) != 1 || !findings[0].Used {
			t.Fatalf("%v, %v", findings, err)
		}
		s, err := saved.Collect(t.Context(), issuers, nil)
		if err != nil {
			t.Fatal(err)
		}
		demanded, err := p.Demand(saved.Kinds(s))
		if err != nil || !slices.Equal(demanded, []attestation.Kind{toy.Name}) {
			t.Fatalf("%v, %v", demanded, err)
		}
		verifiers := ok[[]attestation.Verifier](t)(table.Verifiers(kinds.VerifierOptions{Policy: func() *policy.Policy { return p }}))
		verifiers = slices.DeleteFunc(verifiers, func(v attestation.Verifier) bool { return !slices.Contains(demanded, v.Kind()) })
		claims, err := saved.Verify(t.Context(), verifiers, s)
		if err != nil {
			return nil, p, err
		}
		a, err := p.Appraise(ok[*attestation.Verified](t)(attestation.NewVerified(attestation.Binder(s.GetBinder()), time.Now(), claims...)))
		return a, p, err
	}
	authorize := func(p *policy.Policy, a *policy.Appraisal) error {
		_, err := p.Authorize(a, policy.Request{Volume: "v", Operation: policy.Open, Now: time.Now()})
		return err
	}

	a, p, err := judge(3, text)
	if err != nil || a.Profile != "box" || authorize(p, a) != nil {
		t.Fatalf("%+v, %v", a, err)
	}
	var m *policy.MismatchError
	if _, _, err := judge(2, text); !errors.As(err, &m) || m.Mismatches[0].Field != "toy.level" {
		t.Errorf("a low level: %v", err)
	}
	if a, p, err := judge(9, text); err != nil || !errors.Is(authorize(p, a), policy.ErrDenied) {
		t.Errorf("an expression that is false: %v", err)
	}
	if _, _, err := judge(3, strings.Replace(text, hex.EncodeToString(public), strings.Repeat("00", 32), 1)); !errors.Is(err, attestation.ErrRefused) {
		t.Errorf("a key that nobody vouches for: %v", err)
	}

	// Without the line, no policy and no list of kinds speaks of it.
	if _, err := policy.Parse(kinds.All().Policies(), "policy.yaml", []byte(text)); err == nil || !strings.Contains(err.Error(), `"toy"`) {
		t.Errorf("without the line: %v", err)
	}
	if _, err := kinds.All().Parse([]string{"toy"}); err == nil {
		t.Error("without the line its name is known")
	}
	// Its section is read as strictly as any other, and errors have a line.
	for from, want := range map[string]string{"{min_level: 3}": "line 7", "{keys: ": "line 4"} {
		bad := strings.Replace(text, from, strings.Replace(from, "{", "{more: 1, ", 1), 1)
		if _, err := policy.Parse(withToy(key, 3).Policies(), "policy.yaml", []byte(bad)); err == nil || !strings.Contains(err.Error(), `unknown field "more"`) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", from, err)
		}
	}

	// It is found, shown, and measured.
	table := withToy(key, 3)
	_, findings, err := table.Issuers(t.Context(), kinds.IssuerOptions{})
	if n := slices.IndexFunc(findings, func(f kinds.Finding) bool { return f.Kind == toy.Name }); err != nil || n < 0 || !findings[n].Used {
		t.Errorf("%v, %v", findings, err)
	}
	s := ok[[]attestation.Issuer](t)(issuersOf(t, table))
	file, err := saved.Collect(t.Context(), s, nil)
	if err != nil {
		t.Fatal(err)
	}
	var shown bytes.Buffer
	ok[kinds.Summary](t)(table.Summarize(file, toy.Name)).Print(&shown)
	if !strings.Contains(shown.String(), "level 3") {
		t.Error(shown.String())
	}
	profile := ok[*policy.Profile](t)(policy.Reference(table.Policies(), "box", "a test", ok[[]attestation.Claims](t)(table.Claims(file, toy.Name))))
	if got := string(ok[[]byte](t)(yaml.Marshal(profile))); got != "name: box\ntoy:\n    min_level: 3\n" {
		t.Errorf("%s", got)
	}
	if requests, err := table.EndorsementRequests(file, ""); err != nil || len(requests) != 0 {
		t.Errorf("%v, %v", requests, err)
	}
}

func issuersOf(t *testing.T, table kinds.Table) ([]attestation.Issuer, error) {
	issuers, _, err := table.Issuers(t.Context(), kinds.IssuerOptions{Kinds: []attestation.Kind{toy.Name}})
	return issuers, err
}
