// Package attestation is the vocabulary of keyagent's attestation, in the terms
// of RFC 9334 (RATS): evidence, claims, issuer, verifier.
//
// Three steps are three types, so that no step can be left out:
//
//	[]byte            from a peer. Nothing is known of them.
//	Verified          what signatures cover: the claims of all evidence of one
//	                  exchange, after each verifier accepted its own.
//	policy.Appraisal  what the reference values say of a Verified.
//
// One kind of evidence is one package below this one, with an [Issuer] that
// runs where the hardware is and a [Verifier] that runs at the relying party.
// This package knows none of them.
package attestation

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"
)

// Kind names one kind of evidence.
type Kind string

// The kinds. A kind that no configured verifier handles is refused.
const (
	// TPM is a quote of a TPM 2.0 whose maker, cloud or operator vouches for it.
	TPM Kind = "tpm"
	// SNP is an SEV-SNP report over the binder.
	SNP Kind = "snp"
	// TDX is a TDX quote over the binder.
	TDX Kind = "tdx"
	// Azure is what a confidential VM of Azure has: an SNP report or a TDX quote
	// that covers the vTPM's attestation key, and a quote by that key over the
	// binder. It gives claims of three kinds.
	Azure Kind = "azure"
	// SVSM is an SNP report at VMPL 0 that covers the binder and the manifest of
	// a vTPM, and that vTPM's quote over the binder. It gives claims of three kinds.
	SVSM Kind = "svsm"
	// Nitro is an attestation document of AWS NitroTPM over the binder.
	Nitro Kind = "nitro"
)

// BinderSize is the size of a [Binder]: a SHA-512 digest, which is also the size
// of the report data of SEV-SNP and TDX.
const BinderSize = 64

// Binder ties evidence to one connection, one role and one challenge. Its
// encoding is specified in docs/spec/attested-tls.md.
type Binder [BinderSize]byte

// Issuer produces evidence of one kind on the machine that it runs on.
//
// It is safe for concurrent use.
type Issuer interface {
	Kind() Kind
	// Begin prepares one exchange. The caller closes the Attempt.
	Begin(ctx context.Context) (Attempt, error)
}

// Attempt is the issuer's half of one exchange. It is used by one goroutine.
type Attempt interface {
	// Offer returns the material that a verifier needs before it can ask.
	Offer() []byte
	// Evidence answers ask, covering binder.
	Evidence(ctx context.Context, ask []byte, binder Binder) ([]byte, error)
	Close() error
}

// Verifier checks evidence of one kind: signatures, chains, freshness. It
// compares nothing with reference values; that is the policy's part.
//
// It is safe for concurrent use. Whatever it refuses is an error that wraps
// [ErrRefused].
type Verifier interface {
	Kind() Kind
	// Begin checks an offer and prepares the question.
	Begin(ctx context.Context, offer []byte) (Question, error)
}

// Question is the verifier's half of one exchange. It is used by one goroutine
// and answers for exactly one piece of evidence.
type Question interface {
	// Ask returns what the attester must answer.
	Ask() []byte
	// Verify checks the answer and returns what it proves: claims of the
	// verifier's kind first. Evidence in which one piece of hardware vouches for
	// another gives claims of those kinds as well, with Via set.
	Verify(ctx context.Context, evidence []byte, binder Binder) ([]Claims, error)
}

// Claims is what one verified piece of evidence says. All of it is covered by a
// signature of the attesting hardware or by a chain to a configured root.
type Claims struct {
	Kind Kind
	// Via is the kind of the evidence that these claims came in, if that is
	// another: a report inside Azure's evidence covers an attestation key and not
	// the binder, and never stands for one that covers the binder.
	Via Kind
	// Identity is stable for one machine: for a TPM, the SHA-256 of its EK.
	Identity string
	// Trust names the entry of the policy's trust section that vouches for the
	// hardware, for example "root:lab".
	Trust string
	// Measurements by register name: for a TPM "pcr0" to "pcr23", for SNP
	// "measurement", for TDX "mrtd" and "rtmr0" to "rtmr3".
	Measurements map[string]Measurement
	// Facts are further claims, by name, for the policy's expressions. Values
	// are string, bool, int64, uint64 or []string.
	Facts map[string]any
	// Epoch must not change while a channel lives: a machine that was reset in
	// between is another machine. For a TPM, its reset and restart counts.
	Epoch string
	// Until is when the first of the certificates and lists ends that these claims rest
	// on. A verdict does not outlive it. Zero: none ends.
	Until time.Time
	// EvidenceDigest is the SHA-256 of the evidence bytes, for the audit log.
	EvidenceDigest [32]byte
}

// Measurement is the value of one register and the events that led to it.
type Measurement struct {
	Value []byte
	// Events replay to Value. Empty when no event log came or none covers the
	// register; never events that do not replay.
	Events []Event
	// Unexplained says why an event log that came does not lead to Value. It takes
	// nothing from Value, which hardware signed.
	Unexplained string
}

// Event is one entry of a measured-boot log whose digest was replayed.
type Event struct {
	// Seq is the entry's place in the log.
	Seq int `yaml:"-" json:"seq"`
	// Type is the TCG name, for example "EV_EFI_VARIABLE_DRIVER_CONFIG".
	Type string `yaml:"type" json:"type"`
	// Name says in a person's words what was measured.
	Name string `yaml:"name" json:"name"`
	// Digest is what extended the register, in lower-case hex.
	Digest string `yaml:"digest" json:"digest"`
	// Detail is shown to people and decides nothing, since only some events
	// have a digest of their data.
	Detail string `yaml:"detail,omitempty" json:"detail,omitempty"`
}

// Verified holds the claims of one exchange, all of them verified and bound to
// the same connection. The zero value holds none.
type Verified struct {
	claims []Claims
	binder Binder
	at     time.Time
}

// NewVerified records that all evidence of one exchange passed its verifiers. Only
// code that ran those verifiers calls it: attestation/atls for a connection,
// the offline appraisal of a saved file, and tests. An import-rules test holds
// the list.
func NewVerified(binder Binder, at time.Time, claims ...Claims) (*Verified, error) {
	if len(claims) == 0 {
		return nil, fmt.Errorf("%w: no claims", ErrRefused)
	}
	seen := map[Kind]bool{}
	for _, c := range claims {
		if c.Kind == "" || seen[c.Kind] {
			return nil, fmt.Errorf("%w: two pieces of evidence of kind %q", ErrRefused, c.Kind)
		}
		seen[c.Kind] = true
	}
	return &Verified{claims: claims, binder: binder, at: at}, nil
}

// Claims returns the claims of one kind.
func (v *Verified) Claims(kind Kind) (Claims, bool) {
	for _, c := range v.claims {
		if c.Kind == kind {
			return c, true
		}
	}
	return Claims{}, false
}

// All returns the claims in the order of the exchange.
func (v *Verified) All() []Claims { return v.claims }

// Binder returns what the evidence covered.
func (v *Verified) Binder() Binder { return v.binder }

// At returns when the evidence was verified, by the verifier's clock.
func (v *Verified) At() time.Time { return v.at }

// Until returns when the first of the claims loses what it rests on, zero if none does.
func (v *Verified) Until() (until time.Time) {
	for _, c := range v.claims {
		if !c.Until.IsZero() && (until.IsZero() || c.Until.Before(until)) {
			until = c.Until
		}
	}
	return until
}

// Identity names the attester in logs: the identities of its claims.
func (v *Verified) Identity() string { return strings.Join(v.Identities(), "+") }

// Identities are those of its claims, each as KIND:IDENTITY.
func (v *Verified) Identities() []string {
	ids := make([]string, 0, len(v.claims))
	for _, c := range v.claims {
		ids = append(ids, string(c.Kind)+":"+c.Identity)
	}
	return ids
}

// ErrRefused means that evidence is refused, whatever the reason. An error of a
// verifier that does not wrap it is a fault of the verifier's own side.
var ErrRefused = errors.New("evidence refused")

// ErrUnendorsed means that vendor collateral (certificates, revocation lists, TCB
// levels) was neither in the evidence nor available now. The evidence itself was
// not found wanting: asking again later may help, and a verdict that still holds is
// not taken back for it.
var ErrUnendorsed = fmt.Errorf("%w: not endorsed", ErrRefused)

// ErrLocal means that this machine's own issuers failed: it cannot prove itself,
// whatever the peer is.
var ErrLocal = errors.New("this machine cannot attest itself")

// ErrNoDevice means that an issuer found no hardware of its kind.
var ErrNoDevice = errors.New("no attestation device")
