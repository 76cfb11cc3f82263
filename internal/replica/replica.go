// Package replica is what key services over one storage ask of each other, by mutual
// attestation: the master secret, and what each has seen of volumes. It dials and checks what
// comes back; package keyservice answers. docs/spec/replicas.md specifies the protocol.
package replica

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	replicav1 "github.com/keyagent/keyagent/api/keyagent/replica/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/atls"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/internal/volume"
	"github.com/keyagent/keyagent/internal/wire"
)

// SealInfo is what a master secret that is sealed to a replica is authenticated with.
var SealInfo = []byte("keyagent replica master secret v1")

// The bounds of a master secret in bytes.
const (
	minMaster = 16
	maxMaster = 128
)

const (
	dialTimeout = 10 * time.Second
	callTimeout = 10 * time.Second
	maxMessage  = 256 << 10
	maxPages    = 4096 // of one exchange
)

// ErrAnswer means that a peer which proved itself answers what no key service answers.
var ErrAnswer = errors.New("the peer's answer is refused")

// Session is a connection with a peer that proved what it must.
type Session struct {
	conn    *grpc.ClientConn
	raw     net.Conn // which conn takes over with the first call
	channel *atls.Channel
	client  replicav1.ReplicaClient
	sent    uint64 // position in what this side has seen
	after   uint64 // position in what the peer has
}

// Dial connects to a peer, which must prove what cfg demands before it sees this side's
// evidence. The caller closes the session.
func Dial(ctx context.Context, address string, cfg *atls.ClientConfig) (*Session, error) {
	if cfg.Server == nil || len(cfg.Issuers) == 0 {
		return nil, failure.New(failure.Configuration, fmt.Errorf("%w: replicas prove themselves to each other", atls.ErrConfiguration), "")
	}
	tcp, err := (&net.Dialer{Timeout: dialTimeout}).DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, failure.New(failure.Unreachable, err, "does that key service run, and does this network reach it?")
	}
	conn, err := atls.Client(ctx, tcp, cfg)
	if err != nil {
		return nil, classify(err)
	}
	client, err := atls.NewGRPC(conn, grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage), grpc.ForceCodecV2(wire.Codec())))
	if err != nil {
		return nil, err
	}
	return &Session{conn: client, raw: conn, channel: conn.Channel(), client: replicav1.NewReplicaClient(client)}, nil
}

func classify(err error) error {
	var refusal *atls.Refusal
	switch {
	case errors.As(err, &refusal):
		return &failure.Error{Class: failure.EvidenceRefused, CorrelationID: refusal.CorrelationID, Err: err, Hint: "the peer's log has the details under this correlation id"}
	case errors.Is(err, atls.ErrPeerUnattested):
		return failure.New(failure.ServerUntrusted, err, "evidence: in the peer's configuration lets it prove what it is")
	case errors.Is(err, attestation.ErrUnendorsed):
		return failure.New(failure.Unreachable, err, "vendor collateral for the peer's hardware is not available now; see endorsements in the configuration")
	case errors.Is(err, attestation.ErrRefused):
		return failure.New(failure.ServerUntrusted, err, "its profile has to be listed in replicas, in the policy of this key service")
	case errors.Is(err, atls.ErrServerUntrusted):
		return failure.New(failure.ServerUntrusted, err, "it needs this service's own certificate, or one by the ca of its entry in join")
	case errors.Is(err, attestation.ErrNoDevice), errors.Is(err, attestation.ErrLocal):
		return failure.New(failure.NoDevice, err, "keyagent evidence shows what this machine can prove")
	}
	return failure.New(failure.Unreachable, err, "")
}

// answered gives a failed call its class.
func answered(err error) error {
	if status.Code(err) == codes.Unimplemented {
		return failure.New(failure.State, err, "its policy had no replicas when it started, or it is of a version before")
	}
	return failure.FromStatus(err)
}

// Close ends the connection.
func (s *Session) Close() error {
	defer s.raw.Close() // it is closed already, unless no call was made
	return s.conn.Close()
}

// Peer is what the peer proved: [atls.ErrExpired] once that has ended.
func (s *Session) Peer() (*attestation.Verified, error) {
	v, _, err := s.channel.Peer()
	return v, err
}

// Join receives the master secret. The caller closes it.
func (s *Session) Join(ctx context.Context) (*secret.Bytes, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	resp, err := s.client.Join(ctx, &replicav1.JoinRequest{})
	if err != nil {
		return nil, answered(err)
	}
	master, err := s.channel.Open(SealInfo, resp.GetSealedMaster())
	if err != nil {
		return nil, failure.New(failure.WrongKey, fmt.Errorf("%w: %w", ErrAnswer, err), "")
	}
	if n := master.Len(); n < minMaster || n > maxMaster {
		return nil, errors.Join(failure.Newf(failure.WrongKey, "", "%w: a master secret of %d bytes", ErrAnswer, n), master.Close())
	}
	return master, nil
}

// Book is what this side has seen of volumes.
type Book interface {
	// RecordKey names the key that authenticates the records.
	RecordKey() (string, error)
	// Since returns at most [PageSize] of what changed since a position.
	Since(position uint64) volume.Seen
	// Note takes what the peer has seen in an epoch.
	Note(ctx context.Context, from string, epoch uint64, page []volume.Sighting) error
}

// Exchange tells the peer what this side has seen since the last exchange of this session, and
// learns what the peer has.
func (s *Session) Exchange(ctx context.Context, b Book) error {
	key, err := b.RecordKey()
	if err != nil {
		return err
	}
	peer, err := s.Peer()
	if err != nil {
		return err
	}
	for range maxPages {
		mine := b.Since(s.sent)
		resp, err := s.seen(ctx, &replicav1.SeenRequest{RecordKey: key, Epoch: mine.Epoch, Page: EncodePage(mine.Volumes), After: s.after})
		if err != nil {
			return err
		}
		page, err := ParsePage(resp.GetPage())
		if err == nil && resp.GetMore() && resp.GetPosition() <= s.after {
			err = errors.New("it does not get any further")
		}
		if err == nil && resp.GetEpoch() > MaxEpoch {
			err = fmt.Errorf("epoch %d", resp.GetEpoch())
		}
		if err != nil {
			return failure.New(failure.State, fmt.Errorf("%w: %w", ErrAnswer, err), "")
		}
		if err := b.Note(ctx, peer.Identity(), resp.GetEpoch(), page); err != nil {
			return err
		}
		s.sent, s.after = mine.Next, resp.GetPosition()
		if !mine.More && !resp.GetMore() {
			return nil
		}
	}
	return failure.New(failure.State, fmt.Errorf("%w: it never ends", ErrAnswer), "")
}

func (s *Session) seen(ctx context.Context, r *replicav1.SeenRequest) (*replicav1.SeenResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	resp, err := s.client.Seen(ctx, r)
	if err != nil {
		return nil, answered(err)
	}
	return resp, nil
}
