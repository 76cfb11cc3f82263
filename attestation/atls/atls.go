// Package atls is attested TLS: a TLS 1.3 connection whose ends prove, before
// the first application byte, what machines they are.
//
// [Client] and [Server] wrap a net.Conn as crypto/tls does, and
// [NewClientCredentials] and [NewServerCredentials] are the same for gRPC. Right
// after the TLS handshake the two sides exchange length-prefixed frames:
//
//	Open → Open, then for each side that attests itself:
//	Hello → Challenge → Evidence → Verdict
//
// The evidence covers a [attestation.Binder], a digest over the attester's role,
// an exporter value of exactly this TLS connection with the challenge as its
// context, both sides' public keys, the verifier's nonce and the attester's HPKE
// key. Evidence that was made for another connection, another role or another
// challenge therefore does not verify, and a key that is sealed to the HPKE key
// ([Channel.Seal]) can be opened by the attested machine alone.
//
// What this package promises: TLS 1.3 only, hybrid X25519MLKEM768 key exchange
// only, no session tickets and no resumption; the server is authenticated before
// the client sends anything; every frame is bounded in size and the exchange in
// time; a verdict ends, and the channel with it unless [Channel.Reattest] renews
// it. Encodings and vectors are in docs/spec/attested-tls.md.
package atls

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"time"

	"github.com/keyagent/keyagent/attestation"
)

// DefaultTimeout bounds the TLS handshake and the exchange together. A slow
// discrete TPM needs seconds for its part.
const DefaultTimeout = 60 * time.Second

// What can go wrong, for errors.Is. Errors of verifiers and appraisers are wrapped as
// they are.
var (
	// ErrConfiguration means that something that must be set is not: unset means refused.
	ErrConfiguration = errors.New("attested TLS is not configured")
	// ErrServerUntrusted means that the server's certificate is not the configured one.
	ErrServerUntrusted = errors.New("server is not trusted")
	// ErrCertificateTime means that the server's certificate is the right one but is
	// not valid at this time. Check both clocks.
	ErrCertificateTime = fmt.Errorf("%w: certificate is outside its validity", ErrServerUntrusted)
	// ErrHandshake means that the TLS handshake failed for another reason.
	ErrHandshake = errors.New("TLS handshake failed")
	// ErrConnectionState means that the connection is not a fresh TLS 1.3 session with
	// a hybrid key exchange and certificates on both sides.
	ErrConnectionState = errors.New("connection is unfit for attestation")
	// ErrExporter means that the connection's exporter cannot be used.
	ErrExporter = errors.New("TLS exporter failed")
	// ErrFrame means that a frame is malformed, out of turn or too large.
	ErrFrame = errors.New("bad attestation frame")
	// ErrPeerUnattested means that this side demands evidence and the peer has none.
	ErrPeerUnattested = errors.New("peer does not attest itself")
	// ErrNoEvidence means that the peer demands evidence and this side has none.
	ErrNoEvidence = errors.New("peer demands evidence, none can be given here")
	// ErrExpired means that the verdict on the peer has ended: by its time, or because
	// a renewal was refused.
	ErrExpired = errors.New("attestation has expired")
	// ErrEpoch means that the peer was reset, or is another machine, since the
	// channel's first attestation.
	ErrEpoch = fmt.Errorf("%w: machine changed while the channel lived", attestation.ErrRefused)
	// ErrLate means that the evidence came later than an exchange may take. It was
	// fresh when it was asked for, and says nothing of the machine as it is now.
	ErrLate = fmt.Errorf("%w: evidence came too late", attestation.ErrRefused)
	// ErrSealed means that a sealed message was not made for this channel.
	ErrSealed = errors.New("sealed message is not for this channel")
)

// RefusalClass is all that a refused peer learns of why. An appraiser's error may have
// a class of its own, by a method RefusalClass() string.
type RefusalClass string

// The classes of this package. They are what stands on the wire.
const (
	// RefusedEvidence means that the evidence is not accepted.
	RefusedEvidence RefusalClass = "evidence refused"
	// RefusedUnendorsed means that what a vendor says of the hardware is missing now.
	RefusedUnendorsed RefusalClass = "endorsements missing"
	// RefusedExchange means that this side broke the rules of the exchange.
	RefusedExchange RefusalClass = "malformed exchange"
	// RefusedByFault means that the verifier failed, and not the evidence.
	RefusedByFault RefusalClass = "verifier's fault"
)

// Refusal is the peer's verdict that this side's evidence is not accepted. It
// carries no more than the peer's policy lets this side see.
type Refusal struct {
	Class         RefusalClass
	CorrelationID string // stands in the peer's log as well
	Detail        string // often empty
}

func (r *Refusal) Error() string {
	s := fmt.Sprintf("%s by the peer (correlation id %s)", r.Class, r.CorrelationID)
	if r.Detail != "" {
		s += ": " + r.Detail
	}
	return s
}

// Appraiser decides on evidence that verified. It is safe for concurrent use.
type Appraiser interface {
	// Appraise returns how long the verdict holds. An error refuses the peer;
	// one that has a method PeerDetail() string shows that text to it.
	Appraise(ctx context.Context, v *attestation.Verified) (lifetime time.Duration, err error)
}

// Peers says what a side demands of its peer.
type Peers struct {
	// Verifiers by kind. The peer must give evidence for every one that is
	// demanded: composite evidence is demanded by naming several kinds.
	Verifiers []attestation.Verifier
	// Demand chooses from the kinds that a peer offers those that it must give
	// evidence of. Nil demands all of Verifiers' kinds. An error refuses the peer.
	// Evidence of a chosen kind that is refused counts as not offered: Appraiser
	// sees the rest.
	Demand func(offered []attestation.Kind) ([]attestation.Kind, error)
	// Appraiser decides after all of them accepted.
	Appraiser Appraiser
}

func (p *Peers) check() error {
	if len(p.Verifiers) == 0 || p.Appraiser == nil {
		return fmt.Errorf("%w: evidence is demanded, but no verifier or no appraiser is set", ErrConfiguration)
	}
	return oneOfEachKind(p.Verifiers)
}

// demanded returns the verifiers of what a peer with this offer must prove.
func (p *Peers) demanded(offered []attestation.Kind) ([]attestation.Verifier, error) {
	if p.Demand == nil {
		for _, v := range p.Verifiers {
			if !slices.Contains(offered, v.Kind()) {
				return nil, fmt.Errorf("%w: %w: no %s evidence on offer", attestation.ErrRefused, ErrPeerUnattested, v.Kind())
			}
		}
		return p.Verifiers, nil
	}
	kinds, err := p.Demand(offered)
	if err != nil {
		return nil, err
	}
	var out []attestation.Verifier
	for _, k := range kinds {
		n := slices.IndexFunc(p.Verifiers, func(v attestation.Verifier) bool { return v.Kind() == k })
		if n < 0 {
			return nil, fmt.Errorf("%w: %s evidence is demanded, and there is no verifier of it", ErrConfiguration, k)
		}
		out = append(out, p.Verifiers[n])
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("%w: no evidence is demanded", ErrConfiguration)
	}
	return out, nil
}

func oneOfEachKind[T interface{ Kind() attestation.Kind }](list []T) error {
	seen := map[attestation.Kind]bool{}
	for _, x := range list {
		if seen[x.Kind()] {
			return fmt.Errorf("%w: kind %q is set twice", ErrConfiguration, x.Kind())
		}
		seen[x.Kind()] = true
	}
	return nil
}

// ClientConfig configures the side that dials.
type ClientConfig struct {
	// ServerName is verified against the certificate if RootCAs is set.
	ServerName string
	// RootCAs authenticate the server. Either RootCAs or PinnedSPKI must be
	// set; with both, both must hold. The system's roots are never used.
	RootCAs *x509.CertPool
	// PinnedSPKI are SHA-256 digests of accepted public keys (PKIX DER).
	PinnedSPKI [][32]byte
	// Identity is this process's key pair, see NewIdentity. Required.
	Identity *Identity
	// Issuers give this side's evidence, one of each kind.
	Issuers []attestation.Issuer
	// Server, if set, demands the server's own evidence.
	Server *Peers
	// Timeout bounds handshake and exchange. Default DefaultTimeout.
	Timeout time.Duration
	// Now is the clock for certificates and verdicts. Default time.Now.
	Now func() time.Time
	// CertificateTime is the clock for certificates, if it is another one.
	CertificateTime func() time.Time
}

// ServerConfig configures the side that listens.
type ServerConfig struct {
	// Certificate returns the certificate in force. Required.
	Certificate func() (*tls.Certificate, error)
	// Clients is what every client must prove. Required, unless Anyone is set.
	Clients *Peers
	// Anyone lets clients in that prove nothing. Clients is nil then: what is served must
	// be for everybody, or have proofs of its own.
	Anyone bool
	// Issuers, if set, give the server's own evidence to clients that ask.
	Issuers []attestation.Issuer
	// Observe, if set, is called once for each exchange with its outcome, in
	// the goroutine of the exchange.
	Observe func(Outcome)
	// Timeout bounds handshake and exchange. Default DefaultTimeout.
	Timeout time.Duration
	// Now is the clock for certificates and verdicts. Default time.Now.
	Now func() time.Time
}

// Outcome is what a server observes of one exchange.
type Outcome struct {
	CorrelationID string
	Remote        string
	Peer          *attestation.Verified // nil if the evidence did not verify
	Dropped       []error               // of kinds that were refused, and not needed
	Err           error                 // nil if accepted
	Ended         bool                  // the connection ended before there was a verdict
}

// Identity is a key pair that lives as long as the process and says nothing
// about who holds it: the evidence does.
type Identity struct {
	certificate tls.Certificate
}

// NewIdentity makes a key pair with a self-signed certificate.
func NewIdentity() (*Identity, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		// The certificate is a container for the key; its dates are looked at by
		// nobody, so that a wrong clock at boot does not matter.
		NotBefore: time.Unix(0, 0),
		NotAfter:  time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	return &Identity{tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}}, nil
}
