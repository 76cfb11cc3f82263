// Package toy is a kind of evidence for tests: a key signs the binder and a number. It
// shows all that a kind needs, and has no place in any program.
package toy

import (
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"slices"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/facts"
	"github.com/keyagent/keyagent/attestation/kinds"
	"github.com/keyagent/keyagent/attestation/policy"
)

// Name of the kind.
const Name attestation.Kind = "toy"

// Level is the number that the key signed.
const Level facts.Fact[uint64] = "toy_level"

// Kind describes it. A machine has it if key is not nil.
func Kind(key ed25519.PrivateKey, level byte) kinds.Kind {
	return kinds.Kind{
		Kind: policy.Kind{
			Name:      Name,
			Trust:     func() policy.Trust { return &trust{} },
			Section:   func() policy.Section { return &profile{} },
			Reference: reference,
		},
		Detect: func(context.Context, kinds.IssuerOptions) (string, error) {
			if key == nil {
				return "", fmt.Errorf("%w: no key", attestation.ErrNoDevice)
			}
			return "it has a key", nil
		},
		Issuer: func(kinds.IssuerOptions) (attestation.Issuer, error) { return issuer{key, level}, nil },
		Verifier: func(m *kinds.Maker) (attestation.Verifier, error) {
			return verifier{func() []string { t, _ := m.Policy().Trust().Of(Name).(*trust); return t.keys() }}, nil
		},
		Summarize: func(x kinds.Exchange) (kinds.Summary, error) {
			c, err := read(x.Evidence)
			return summary(c), err
		},
		Claims: func(x kinds.Exchange) ([]attestation.Claims, error) {
			c, err := read(x.Evidence)
			return []attestation.Claims{c}, err
		},
	}
}

// Evidence is the public key, the number and the signature over binder and number.
const size = ed25519.PublicKeySize + 1 + ed25519.SignatureSize

type issuer struct {
	key   ed25519.PrivateKey
	level byte
}

func (issuer) Kind() attestation.Kind                               { return Name }
func (i issuer) Begin(context.Context) (attestation.Attempt, error) { return i, nil }
func (issuer) Offer() []byte                                        { return nil }
func (issuer) Close() error                                         { return nil }
func signed(binder attestation.Binder, level byte) (message []byte) { return append(binder[:], level) }

func (i issuer) Evidence(_ context.Context, _ []byte, binder attestation.Binder) ([]byte, error) {
	out := append([]byte(i.key.Public().(ed25519.PublicKey)), i.level)
	return append(out, ed25519.Sign(i.key, signed(binder, i.level))...), nil
}

type verifier struct{ keys func() []string }

func (verifier) Kind() attestation.Kind                                        { return Name }
func (v verifier) Begin(context.Context, []byte) (attestation.Question, error) { return v, nil }
func (verifier) Ask() []byte                                                   { return nil }
func (v verifier) Verify(_ context.Context, e []byte, b attestation.Binder) ([]attestation.Claims, error) {
	c, err := read(e)
	if err != nil {
		return nil, err
	}
	public, level := ed25519.PublicKey(e[:ed25519.PublicKeySize]), e[ed25519.PublicKeySize]
	if !slices.Contains(v.keys(), c.Identity) || !ed25519.Verify(public, signed(b, level), e[ed25519.PublicKeySize+1:]) {
		return nil, fmt.Errorf("%w: nobody vouches for the toy", attestation.ErrRefused)
	}
	c.Trust = "key:" + c.Identity
	return []attestation.Claims{c}, nil
}

// read says what evidence says. Nothing is verified.
func read(e []byte) (attestation.Claims, error) {
	if len(e) != size {
		return attestation.Claims{}, fmt.Errorf("%w: a toy of %d bytes", attestation.ErrRefused, len(e))
	}
	c := attestation.Claims{Kind: Name, Identity: hex.EncodeToString(e[:ed25519.PublicKeySize]), Facts: map[string]any{}, EvidenceDigest: sha256.Sum256(e)}
	Level.Put(c.Facts, uint64(e[ed25519.PublicKeySize]))
	return c, nil
}

type summary attestation.Claims

// Print implements kinds.Summary.
func (s summary) Print(w io.Writer) {
	level, _ := Level.Of(attestation.Claims(s))
	fmt.Fprintf(w, "toy           %s, level %d\n", s.Identity, level)
}

// trust is the policy's part about who vouches.
type trust struct {
	Keys []string `yaml:"keys"`
}

func (t *trust) keys() []string {
	if t == nil {
		return nil
	}
	return t.Keys
}

func (t *trust) Check(c *policy.Checker, at policy.Path) {
	c.Hexes(t.Keys, ed25519.PublicKeySize, at.To("keys"))
}
func (t *trust) Vouchers() int { return len(t.Keys) }
func (t *trust) Raw() [][]byte { return nil }

// profile is its section of a profile.
type profile struct {
	MinLevel *uint64 `yaml:"min_level"`
}

func (p *profile) Check(c *policy.Checker, _ *policy.Profile, at policy.Path) {
	c.Set(p.MinLevel, 255, at.To("min_level"))
}

func (p *profile) Compare(d *policy.Differences, _ attestation.Claims) {
	d.AtLeast("toy.level", Level, *p.MinLevel)
}

func reference(c attestation.Claims, _ string) (policy.Section, error) {
	level, _ := Level.Of(c)
	return &profile{&level}, nil
}
