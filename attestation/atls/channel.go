package atls

import (
	"context"
	"crypto/hpke"
	"crypto/rand"
	"errors"
	"fmt"
	"sync"
	"time"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/internal/secret"
)

const protocolVersion = 1

// nonceSize of a verifier's nonce, in bytes.
const nonceSize = 32

// Channel is one attested connection: what the TLS handshake gave, and the
// verdicts that hold at the moment. It is safe for concurrent use.
type Channel struct {
	self       role
	exporter   func(label string, context []byte, length int) ([]byte, error)
	clientSPKI []byte
	serverSPKI []byte
	issuers    []attestation.Issuer
	peers      *Peers // nil: the peer need not attest itself
	observe    func(Outcome)
	remote     string
	now        func() time.Time
	limit      time.Duration // of one exchange, and from a nonce to its verdict; 0 is DefaultTimeout
	judged     func()        // called after each verdict on the peer that stands

	exchange sync.Mutex // one exchange at a time

	mu      sync.Mutex
	peer    peerState
	own     []ownKey // newest first; one before stays for answers under way
	verdict Verdict  // the peer's on this side
	// first is the binder under which the client proved itself when the connection
	// began.
	first attestation.Binder
}

// peerState is what this side knows of its peer.
type peerState struct {
	verified *attestation.Verified
	key      hpke.PublicKey
	expires  time.Time
	id       string
	refused  bool // a renewal was: what was accepted before no longer counts
	dropped  []error
}

// ownKey is an HPKE key that this side's evidence covered.
type ownKey struct {
	private hpke.PrivateKey
	binder  attestation.Binder
}

// Verdict is the peer's on this side.
type Verdict struct {
	CorrelationID string
	Expires       time.Time
}

// Reattest runs the exchange again over fr, with fresh keys and nonces. Both
// sides call it, on the two ends of one ordered stream. The caller ends the stream
// when ctx ends: evidence that comes later than the exchange may take is refused.
func (c *Channel) Reattest(ctx context.Context, fr Frames) error { return c.run(ctx, fr) }

// bound of one exchange.
func (c *Channel) bound() time.Duration {
	if c.limit == 0 {
		return DefaultTimeout
	}
	return c.limit
}

// run is the whole exchange: who attests, then the server's half, then the
// client's. The server goes first, so that a client that demands the server's
// evidence has it before it shows its own.
func (c *Channel) run(ctx context.Context, fr Frames) error {
	c.exchange.Lock()
	defer c.exchange.Unlock()
	ctx, cancel := context.WithTimeout(ctx, c.bound())
	defer cancel()
	mine := &attestv1.Open{Version: protocolVersion, WantsEvidence: c.peers != nil, HasEvidence: len(c.issuers) > 0}
	theirs, err := c.opening(fr, mine)
	if err != nil {
		if c.observe != nil {
			c.observe(Outcome{CorrelationID: newCorrelationID(), Remote: c.remote, Err: err, Ended: isTransport(err)})
		}
		return err
	}
	for _, attester := range []role{serverRole, clientRole} {
		var err error
		switch {
		case attester == c.self && theirs.GetWantsEvidence():
			err = c.attest(ctx, fr)
		case attester != c.self && mine.WantsEvidence:
			err = c.verify(ctx, fr)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// opening exchanges the Open frames, the client's first.
func (c *Channel) opening(fr Frames, mine *attestv1.Open) (theirs *attestv1.Open, err error) {
	say := func() error { return send(fr, &attestv1.Frame{Body: &attestv1.Frame_Open{Open: mine}}) }
	receive := func() (err error) { theirs, err = expect(fr, maxOpen, openOf); return err }
	steps := []func() error{say, receive}
	if c.self == serverRole {
		steps = []func() error{receive, say}
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return nil, err
		}
	}
	switch {
	case theirs.GetVersion() != protocolVersion:
		return nil, fmt.Errorf("%w: peer speaks version %d, this side %d", ErrFrame, theirs.GetVersion(), protocolVersion)
	case mine.WantsEvidence && !theirs.GetHasEvidence():
		return nil, ErrPeerUnattested
	case theirs.GetWantsEvidence() && !mine.HasEvidence:
		return nil, ErrNoEvidence
	}
	return theirs, nil
}

// binder computes what the evidence of one half of the exchange covers.
func (c *Channel) binder(attester role, h *attestv1.Hello, ch *attestv1.Challenge) (attestation.Binder, error) {
	value, err := c.exporter(exporterLabel, exporterContext(h, ch), exporterSize)
	if err != nil {
		return attestation.Binder{}, fmt.Errorf("%w: %w", ErrExporter, err)
	}
	if len(value) != exporterSize {
		return attestation.Binder{}, fmt.Errorf("%w: %d bytes", ErrExporter, len(value))
	}
	return binderInput{
		role: attester, exporter: value, clientSPKI: c.clientSPKI, serverSPKI: c.serverSPKI,
		nonce: ch.GetNonce(), hpkeKey: h.GetHpkePublicKey(),
	}.binder(), nil
}

// localFault marks an error of this machine's own hardware, unless the exchange
// was ended from outside.
func localFault(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return err
	}
	return fmt.Errorf("%w: %w", attestation.ErrLocal, err)
}

// attest is the attester's half.
func (c *Channel) attest(ctx context.Context, fr Frames) error {
	key, err := hpke.MLKEM768X25519().GenerateKey()
	if err != nil {
		return err
	}
	hello := &attestv1.Hello{HpkePublicKey: key.PublicKey().Bytes()}
	attempts := make(map[attestation.Kind]attestation.Attempt, len(c.issuers))
	defer func() {
		for _, a := range attempts {
			_ = a.Close()
		}
	}()
	for _, i := range c.issuers {
		a, err := i.Begin(ctx)
		if err != nil {
			return localFault(ctx, fmt.Errorf("begin %s attestation: %w", i.Kind(), err))
		}
		attempts[i.Kind()] = a
		hello.Offers = append(hello.Offers, &attestv1.Item{Kind: string(i.Kind()), Data: a.Offer()})
	}
	if err := send(fr, &attestv1.Frame{Body: &attestv1.Frame_Hello{Hello: hello}}); err != nil {
		return err
	}
	challenge, err := c.recvChallenge(fr)
	if err != nil {
		return err
	}
	binder, err := c.binder(c.self, hello, challenge)
	if err != nil {
		return err
	}
	evidence := &attestv1.Evidence{}
	for _, ask := range challenge.GetAsks() {
		a, ok := attempts[attestation.Kind(ask.GetKind())]
		if !ok {
			return fmt.Errorf("%w: peer asks for %q evidence", ErrNoEvidence, ask.GetKind())
		}
		data, err := a.Evidence(ctx, ask.GetData(), binder)
		if err != nil {
			return localFault(ctx, fmt.Errorf("make %s evidence: %w", ask.GetKind(), err))
		}
		evidence.Items = append(evidence.Items, &attestv1.Item{Kind: ask.GetKind(), Data: data})
	}
	// The key can be used from here on: on another stream, an answer that is
	// sealed to it may overtake the verdict.
	c.mu.Lock()
	before := c.own
	c.own = append([]ownKey{{key, binder}}, before...)
	c.mu.Unlock()
	verdict, err := exchangeEvidence(fr, evidence)
	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil {
		c.own = before
		return err
	}
	c.own = c.own[:min(2, len(c.own))]
	c.began(clientRole == c.self, binder)
	c.verdict = Verdict{verdict.GetCorrelationId(), c.now().Add(time.Duration(verdict.GetLifetimeSeconds()) * time.Second)}
	return nil
}

func exchangeEvidence(fr Frames, e *attestv1.Evidence) (*attestv1.Verdict, error) {
	if err := send(fr, &attestv1.Frame{Body: &attestv1.Frame_Evidence{Evidence: e}}); err != nil {
		return nil, err
	}
	verdict, err := expect(fr, maxVerdict, verdictOf)
	if err == nil && !verdict.GetAccepted() {
		err = refusalOf(verdict)
	}
	return verdict, err
}

// recvChallenge also takes a verdict: a verifier may refuse the offer itself.
func (c *Channel) recvChallenge(fr Frames) (*attestv1.Challenge, error) {
	f, err := recv(fr, maxChallenge)
	if err != nil {
		return nil, err
	}
	if v := f.GetVerdict(); v != nil && !v.GetAccepted() {
		return nil, refusalOf(v)
	}
	ch := f.GetChallenge()
	if ch == nil {
		return nil, fmt.Errorf("%w: %T is out of turn", ErrFrame, f.GetBody())
	}
	if len(ch.GetNonce()) != nonceSize || len(ch.GetAsks()) == 0 || len(ch.GetAsks()) > maxItems {
		return nil, fmt.Errorf("%w: challenge with a nonce of %d bytes and %d asks", ErrFrame, len(ch.GetNonce()), len(ch.GetAsks()))
	}
	return ch, nil
}

func refusalOf(v *attestv1.Verdict) error {
	return &Refusal{Class: RefusalClass(cut(v.GetRefusalClass(), 64)), CorrelationID: cut(v.GetCorrelationId(), 64), Detail: cut(v.GetDetail(), maxDetail)}
}

// maxDetail bounds what a refused peer is told, in bytes.
const maxDetail = 4096

func cut(s string, n int) string { return s[:min(n, len(s))] }

// verify is the verifier's half.
func (c *Channel) verify(ctx context.Context, fr Frames) error {
	id := newCorrelationID()
	state, lifetime, err := c.examine(ctx, fr)
	if err != nil && !isTransport(err) && !errors.Is(err, attestation.ErrUnendorsed) {
		c.mu.Lock()
		c.peer.refused = true
		c.mu.Unlock()
	}
	// First here and then to the peer: anyone who asks for a correlation ID finds it.
	if c.observe != nil {
		c.observe(Outcome{CorrelationID: id, Remote: c.remote, Peer: state.verified, Dropped: state.dropped, Err: err, Ended: err != nil && isTransport(err)})
	}
	if err != nil && !isTransport(err) {
		// Best effort: the refusal stands whether or not the peer hears of it.
		_ = send(fr, &attestv1.Frame{Body: &attestv1.Frame_Verdict{Verdict: &attestv1.Verdict{
			CorrelationId: id, RefusalClass: string(classOf(err)), Detail: peerDetail(err),
		}}})
	}
	if err != nil {
		return fmt.Errorf("%w (correlation id %s)", err, id)
	}
	state.id = id
	c.mu.Lock()
	c.peer = state
	c.began(serverRole == c.self, state.verified.Binder())
	c.mu.Unlock()
	// The verdict stands, whether or not the peer hears of it.
	if c.judged != nil {
		c.judged()
	}
	return send(fr, &attestv1.Frame{Body: &attestv1.Frame_Verdict{Verdict: &attestv1.Verdict{
		Accepted: true, CorrelationId: id, LifetimeSeconds: uint32(lifetime / time.Second),
	}}})
}

func (c *Channel) examine(ctx context.Context, fr Frames) (peerState, time.Duration, error) {
	var state peerState
	hello, err := expect(fr, maxHello, helloOf)
	if err != nil {
		return state, 0, err
	}
	if len(hello.GetOffers()) > maxItems {
		return state, 0, fmt.Errorf("%w: %d offers", ErrFrame, len(hello.GetOffers()))
	}
	if state.key, err = hpke.MLKEM768X25519().NewPublicKey(hello.GetHpkePublicKey()); err != nil {
		return state, 0, fmt.Errorf("%w: HPKE key: %w", ErrFrame, err)
	}
	challenge := &attestv1.Challenge{Nonce: make([]byte, nonceSize)}
	rand.Read(challenge.Nonce)
	began := c.now()
	var asked *asked
	if err := inTurn(ctx, func() (err error) { asked, err = c.peers.ask(ctx, hello.GetOffers()); return err }); err != nil {
		return state, 0, err
	}
	challenge.Asks = asked.items()
	if err := send(fr, &attestv1.Frame{Body: &attestv1.Frame_Challenge{Challenge: challenge}}); err != nil {
		return state, 0, err
	}
	evidence, err := expect(fr, maxEvidence, evidenceOf)
	if err != nil {
		return state, 0, err
	}
	binder, err := c.binder(c.self.peer(), hello, challenge)
	if err != nil {
		return state, 0, err
	}
	var claims []attestation.Claims
	if err := inTurn(ctx, func() (err error) { claims, err = asked.prove(ctx, evidence.GetItems(), binder); return err }); err != nil {
		return state, 0, err
	}
	state.dropped = asked.refused
	if state.verified, err = attestation.NewVerified(binder, c.now(), claims...); err != nil {
		return state, 0, err
	}
	if err := c.sameMachine(state.verified); err != nil {
		return state, 0, err
	}
	lifetime, err := c.peers.Appraiser.Appraise(ctx, state.verified)
	if err != nil {
		return state, 0, asked.because(err)
	}
	if lifetime < time.Second {
		return state, 0, fmt.Errorf("%w: a verdict's lifetime of %s", ErrConfiguration, lifetime)
	}
	// By the clock, and not by ctx alone: who holds evidence back must not gain by it.
	if took := c.now().Sub(began); took > c.bound() {
		return state, 0, fmt.Errorf("%w: %s after it was asked for, at most %s", ErrLate, took.Round(time.Second), c.bound())
	}
	state.expires = c.now().Add(lifetime)
	return state, lifetime, nil
}

// inTurn runs what takes memory and time at a stranger's will, together with few
// others at a time.
func inTurn(ctx context.Context, f func() error) error {
	select {
	case judging <- struct{}{}:
		defer func() { <-judging }()
		return f()
	case <-ctx.Done():
		return ctx.Err()
	}
}

// sameMachine demands that a renewal comes from the machine, and the boot, that
// the channel began with.
func (c *Channel) sameMachine(v *attestation.Verified) error {
	c.mu.Lock()
	before := c.peer.verified
	c.mu.Unlock()
	if before == nil {
		return nil
	}
	for _, old := range before.All() {
		fresh, ok := v.Claims(old.Kind)
		if !ok || fresh.Identity != old.Identity || fresh.Epoch != old.Epoch {
			return fmt.Errorf("%w: %s %s, %s; before %s, %s", ErrEpoch, old.Kind, fresh.Identity, fresh.Epoch, old.Identity, old.Epoch)
		}
	}
	return nil
}

func kindsOf(items []*attestv1.Item) []attestation.Kind {
	kinds := make([]attestation.Kind, len(items))
	for n, i := range items {
		kinds[n] = attestation.Kind(cut(i.GetKind(), 32))
	}
	return kinds
}

func findItem(items []*attestv1.Item, kind attestation.Kind) ([]byte, bool) {
	for _, i := range items {
		if i.GetKind() == string(kind) {
			return i.GetData(), true
		}
	}
	return nil, false
}

// Peer returns the verified claims of the other side and the correlation ID of
// the exchange that gave them. [ErrExpired] once the verdict has ended, and
// [ErrPeerUnattested] if the peer never attested itself.
func (c *Channel) Peer() (*attestation.Verified, string, error) {
	p, err := c.accepted()
	return p.verified, p.id, err
}

// accepted returns the peer's state while its verdict holds.
func (c *Channel) accepted() (peerState, error) {
	c.mu.Lock()
	p := c.peer
	c.mu.Unlock()
	switch {
	case p.verified == nil:
		return peerState{}, ErrPeerUnattested
	case p.refused:
		return peerState{}, fmt.Errorf("%w: its renewal was refused", ErrExpired)
	}
	if err := c.expired(p.expires); err != nil {
		return peerState{}, err
	}
	return p, nil
}

// began keeps the binder of the client's first evidence. The lock is held.
func (c *Channel) began(client bool, b attestation.Binder) {
	if client && c.first == (attestation.Binder{}) {
		c.first = b
	}
}

// Binder names the connection, by the binder of the evidence with which its client
// began. Both sides have the same one, and it stays the same when the client attests
// itself again. It is zero if the client did not attest itself.
func (c *Channel) Binder() attestation.Binder {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.first
}

func (c *Channel) expired(at time.Time) error {
	if !c.now().Before(at) {
		return fmt.Errorf("%w at %s", ErrExpired, at.Format(time.RFC3339))
	}
	return nil
}

// PeerExpires returns when the verdict on the peer ends.
func (c *Channel) PeerExpires() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.peer.expires
}

// Verdict returns the peer's verdict on this side. It is zero if this side did
// not attest itself.
func (c *Channel) Verdict() Verdict {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.verdict
}

// Secret is what is sealed, in memory that is locked, not dumped, and wiped by Close.
// It has no printable form; Use lends its bytes. It is the same type as a Secret of
// package kms and a Key of package luks.
type Secret = secret.Bytes

// NewSecret moves p into a Secret: p is overwritten with zeros, also on error.
func NewSecret(p []byte) (*Secret, error) { return secret.From(p) }

// Seal encrypts plain to the key that the peer's evidence covers. info says
// what it is and is authenticated, together with the binder of that evidence.
func (c *Channel) Seal(info []byte, plain *Secret) ([]byte, error) {
	// Key and binder are of one exchange, also while another one ends.
	peer, err := c.accepted()
	if err != nil {
		return nil, err
	}
	var sealed []byte
	err = plain.Use(func(p []byte) (err error) {
		secret.Do(func() {
			sealed, err = hpke.Seal(peer.key, hpke.HKDFSHA256(), hpke.AES256GCM(), sealInfo(peer.verified.Binder(), info), p)
		})
		return err
	})
	return sealed, err
}

// Open decrypts what the peer sealed to this side with the same info, else gives
// [ErrSealed]. The caller closes the Secret.
func (c *Channel) Open(info, sealed []byte) (*Secret, error) {
	c.mu.Lock()
	keys := c.own
	c.mu.Unlock()
	for _, k := range keys {
		var plain *Secret
		var err error
		secret.Do(func() {
			var p []byte
			if p, err = hpke.Open(k.private, hpke.HKDFSHA256(), hpke.AES256GCM(), sealInfo(k.binder, info), sealed); err == nil {
				plain, err = secret.From(p)
			}
		})
		if err == nil {
			return plain, nil
		}
	}
	return nil, ErrSealed
}

// sealInfo is specified in docs/spec/attested-tls.md, section Sealing.
func sealInfo(b attestation.Binder, info []byte) []byte {
	return fields(nil).add([]byte("keyagent sealed message v1")).add(b[:]).add(info)
}

// newCorrelationID returns 16 characters that say nothing.
func newCorrelationID() string { return rand.Text()[:16] }

// classOf is all that a refused peer learns.
func classOf(err error) RefusalClass {
	var c interface{ RefusalClass() string }
	switch {
	case errors.As(err, &c):
		return RefusalClass(c.RefusalClass())
	case errors.Is(err, attestation.ErrUnendorsed):
		return RefusedUnendorsed
	case errors.Is(err, attestation.ErrRefused):
		return RefusedEvidence
	case errors.Is(err, ErrFrame):
		return RefusedExchange
	default:
		return RefusedByFault
	}
}

func peerDetail(err error) string {
	var d interface{ PeerDetail() string }
	if errors.As(err, &d) {
		return cut(d.PeerDetail(), maxDetail)
	}
	return ""
}
