// Package saved keeps evidence in files: what a machine would prove, with the
// questions that it asked itself, so that anybody can appraise it later and
// without a network.
//
// A file holds its own challenge and therefore proves no freshness. It shows what
// the machine would prove, and that it did so to anyone who trusts how the file came
// about.
package saved

import (
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"os"

	"google.golang.org/protobuf/encoding/protojson"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
)

// MaxFile bounds a file of evidence in bytes.
const MaxFile = 8 << 20

const (
	version  = 1
	maxItems = 8
)

// ErrMalformed means that a file is not one of evidence.
var ErrMalformed = fmt.Errorf("%w: malformed file of evidence", attestation.ErrRefused)

// asker is an attempt whose verifier asks something that depends on the offer.
type asker interface {
	// SelfAsk returns what a verifier would ask, and the secret that it would
	// keep for itself.
	SelfAsk(pcrs []uint32) (ask, secret []byte, err error)
}

// restorer is a verifier that can ask a question of a file once more.
type restorer interface {
	Restore(ctx context.Context, offer, ask, secret []byte) (attestation.Question, error)
}

// Collect makes evidence of each issuer's kind over one binder.
func Collect(ctx context.Context, issuers []attestation.Issuer, pcrs []uint32) (*attestv1.Saved, error) {
	var binder attestation.Binder
	rand.Read(binder[:])
	s := &attestv1.Saved{Version: version, Binder: binder[:]}
	for _, i := range issuers {
		if err := collect(ctx, i, pcrs, binder, s); err != nil {
			return nil, fmt.Errorf("%s evidence: %w", i.Kind(), err)
		}
	}
	return s, nil
}

func collect(ctx context.Context, i attestation.Issuer, pcrs []uint32, binder attestation.Binder, s *attestv1.Saved) error {
	a, err := i.Begin(ctx)
	if err != nil {
		return err
	}
	defer a.Close()
	var ask, secret []byte
	if asks, ok := a.(asker); ok {
		if ask, secret, err = asks.SelfAsk(pcrs); err != nil {
			return err
		}
	}
	evidence, err := a.Evidence(ctx, ask, binder)
	if err != nil {
		return err
	}
	kind := string(i.Kind())
	s.Offers = append(s.Offers, &attestv1.Item{Kind: kind, Data: a.Offer()})
	s.Asks = append(s.Asks, &attestv1.Item{Kind: kind, Data: ask})
	s.Items = append(s.Items, &attestv1.Item{Kind: kind, Data: evidence})
	s.CredentialSecrets = append(s.CredentialSecrets, secret)
	return nil
}

// Of wraps one piece of evidence that came without an exchange, such as a report
// that another tool saved, over the data that it covers.
func Of(kind attestation.Kind, evidence []byte, binder attestation.Binder) *attestv1.Saved {
	item := func(data []byte) []*attestv1.Item { return []*attestv1.Item{{Kind: string(kind), Data: data}} }
	return &attestv1.Saved{Version: version, Binder: binder[:], Offers: item(nil), Asks: item(nil), Items: item(evidence),
		CredentialSecrets: [][]byte{nil}}
}

// Check says whether a file is whole: for each kind an offer, a question, an
// answer and a secret.
func Check(s *attestv1.Saved) error {
	n := len(s.GetItems())
	if s.GetVersion() != version || len(s.GetBinder()) != attestation.BinderSize || n == 0 || n > maxItems ||
		len(s.GetOffers()) != n || len(s.GetAsks()) != n || len(s.GetCredentialSecrets()) != n {
		return fmt.Errorf("%w: not a whole exchange of version %d", ErrMalformed, version)
	}
	seen := map[string]bool{}
	for i, item := range s.GetItems() {
		kind := item.GetKind()
		if s.GetOffers()[i].GetKind() != kind || s.GetAsks()[i].GetKind() != kind || seen[kind] {
			return fmt.Errorf("%w: kind %q", ErrMalformed, kind)
		}
		seen[kind] = true
	}
	return nil
}

// Kinds returns the kinds of evidence in a file that [Check] accepts.
func Kinds(s *attestv1.Saved) []attestation.Kind {
	var kinds []attestation.Kind
	for _, i := range s.GetItems() {
		kinds = append(kinds, attestation.Kind(i.GetKind()))
	}
	return kinds
}

// Verify checks a file's evidence of the verifiers' kinds as a connection's is
// checked, with the challenge that the file itself holds. Evidence of other kinds
// is left alone.
func Verify(ctx context.Context, verifiers []attestation.Verifier, s *attestv1.Saved) ([]attestation.Claims, error) {
	if err := Check(s); err != nil {
		return nil, err
	}
	var all []attestation.Claims
	for _, v := range verifiers {
		claims, err := verify(ctx, v, s)
		if err != nil {
			return nil, err
		}
		all = append(all, claims...)
	}
	return all, nil
}

func verify(ctx context.Context, v attestation.Verifier, s *attestv1.Saved) ([]attestation.Claims, error) {
	for i, item := range s.GetItems() {
		if item.GetKind() != string(v.Kind()) {
			continue
		}
		q, err := begin(ctx, v, s.GetOffers()[i].GetData(), s.GetAsks()[i].GetData(), s.GetCredentialSecrets()[i])
		if err != nil {
			return nil, err
		}
		return q.Verify(ctx, item.GetData(), attestation.Binder(s.GetBinder()))
	}
	return nil, fmt.Errorf("%w: no %s evidence in the file", attestation.ErrRefused, v.Kind())
}

func begin(ctx context.Context, v attestation.Verifier, offer, ask, secret []byte) (attestation.Question, error) {
	if r, ok := v.(restorer); ok {
		return r.Restore(ctx, offer, ask, secret)
	}
	return v.Begin(ctx, offer)
}

// Write saves evidence to a file.
func Write(path string, s *attestv1.Saved) error {
	data, err := protojson.MarshalOptions{Multiline: true}.Marshal(s)
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(data, '\n'), 0o644)
}

// Read reads a file that [Write] made.
func Read(path string) (*attestv1.Saved, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, MaxFile+1))
	if err != nil {
		return nil, err
	}
	return Parse(data)
}

// Parse parses the contents of such a file.
func Parse(data []byte) (*attestv1.Saved, error) {
	s := &attestv1.Saved{}
	if len(data) > MaxFile {
		return nil, fmt.Errorf("%w: more than %d bytes", ErrMalformed, MaxFile)
	}
	if err := protojson.Unmarshal(data, s); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	return s, Check(s)
}
