package replica

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"

	replicav1 "github.com/keyagent/keyagent/api/keyagent/replica/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/atls"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/lab/pki"
	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/internal/volume"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// hardware signs nothing: its evidence is what it has to cover. That peers prove themselves is
// tested where they do.
type hardware struct{}

func (hardware) Kind() attestation.Kind                             { return "none" }
func (hardware) Begin(context.Context) (attestation.Attempt, error) { return hardware{}, nil }
func (hardware) Offer() []byte                                      { return nil }
func (hardware) Close() error                                       { return nil }
func (hardware) Appraise(context.Context, *attestation.Verified) (time.Duration, error) {
	return time.Hour, nil
}

func (hardware) Evidence(_ context.Context, _ []byte, b attestation.Binder) ([]byte, error) {
	return b[:], nil
}

type verifier struct{ hardware }

func (verifier) Begin(context.Context, []byte) (attestation.Question, error) { return verifier{}, nil }
func (verifier) Ask() []byte                                                 { return nil }
func (verifier) Verify(_ context.Context, e []byte, b attestation.Binder) ([]attestation.Claims, error) {
	if !bytes.Equal(e, b[:]) {
		return nil, attestation.ErrRefused
	}
	return []attestation.Claims{{Kind: "none", Identity: "somebody"}}, nil
}

// peer is a key service that proved itself, and answers as it likes.
type peer struct {
	replicav1.UnimplementedReplicaServer
	join func(context.Context, *atls.Channel) (*replicav1.JoinResponse, error)
	seen func(context.Context, *replicav1.SeenRequest) (*replicav1.SeenResponse, error)
}

func (p *peer) Join(ctx context.Context, r *replicav1.JoinRequest) (*replicav1.JoinResponse, error) {
	if p.join == nil {
		return p.UnimplementedReplicaServer.Join(ctx, r)
	}
	ch, _ := atls.FromContext(ctx)
	return p.join(ctx, ch)
}

func (p *peer) Seen(ctx context.Context, r *replicav1.SeenRequest) (*replicav1.SeenResponse, error) {
	return p.seen(ctx, r)
}

func (p *peer) session(t *testing.T) *Session {
	t.Helper()
	ca := pki.New(t)
	cert, err := ca.Server("127.0.0.1")
	must(t, err)
	both := &atls.Peers{Verifiers: []attestation.Verifier{verifier{}}, Appraiser: hardware{}}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	g := grpc.NewServer(grpc.Creds(atls.NewServerCredentials(&atls.ServerConfig{
		Certificate: func() (*tls.Certificate, error) { return &cert, nil }, Clients: both, Issuers: []attestation.Issuer{hardware{}}})))
	replicav1.RegisterReplicaServer(g, p)
	done := make(chan error, 1)
	go func() { done <- g.Serve(l) }()
	id, err := atls.NewIdentity()
	must(t, err)
	s, err := Dial(t.Context(), l.Addr().String(), &atls.ClientConfig{ServerName: "127.0.0.1", RootCAs: ca.Pool(), Identity: id, Issuers: []attestation.Issuer{hardware{}}, Server: both})
	must(t, err)
	t.Cleanup(func() {
		s.Close()
		g.Stop()
		<-done
	})
	return s
}

func sealedWith(t *testing.T, ch *atls.Channel, info []byte, size int) (*replicav1.JoinResponse, error) {
	m, err := secret.From(bytes.Repeat([]byte{7}, size))
	if err != nil {
		return nil, err
	}
	defer m.Close()
	sealed, err := ch.Seal(info, m)
	return &replicav1.JoinResponse{SealedMaster: sealed}, err
}

// What comes back is refused unless it is a master secret that was sealed for this.
func TestAPeerThatTalksNonsenseIsRefused(t *testing.T) {
	for name, tt := range map[string]struct {
		join  func(context.Context, *atls.Channel) (*replicav1.JoinResponse, error)
		class failure.Class // "" for a secret
	}{
		"a secret": {func(_ context.Context, ch *atls.Channel) (*replicav1.JoinResponse, error) {
			return sealedWith(t, ch, SealInfo, 32)
		}, ""},
		"nothing": {func(context.Context, *atls.Channel) (*replicav1.JoinResponse, error) {
			return &replicav1.JoinResponse{}, nil
		}, failure.WrongKey},
		"in the clear": {func(context.Context, *atls.Channel) (*replicav1.JoinResponse, error) {
			return &replicav1.JoinResponse{SealedMaster: make([]byte, 32)}, nil
		}, failure.WrongKey},
		"for another use": {func(_ context.Context, ch *atls.Channel) (*replicav1.JoinResponse, error) {
			return sealedWith(t, ch, []byte("keyagent unseal share v1"), 32)
		}, failure.WrongKey},
		"too short": {func(_ context.Context, ch *atls.Channel) (*replicav1.JoinResponse, error) {
			return sealedWith(t, ch, SealInfo, minMaster-1)
		}, failure.WrongKey},
		"too long": {func(_ context.Context, ch *atls.Channel) (*replicav1.JoinResponse, error) {
			return sealedWith(t, ch, SealInfo, maxMaster+1)
		}, failure.WrongKey},
		"megabytes": {func(context.Context, *atls.Channel) (*replicav1.JoinResponse, error) {
			return &replicav1.JoinResponse{SealedMaster: make([]byte, 2<<20)}, nil
		}, failure.Unreachable},
		"of before": {nil, failure.State},
	} {
		t.Run(name, func(t *testing.T) {
			master, err := (&peer{join: tt.join}).session(t).Join(t.Context())
			if err == nil {
				defer master.Close()
			}
			if (err == nil) != (tt.class == "") || err != nil && failure.Of(err).Class != tt.class {
				t.Errorf("%v, %q", err, failure.Of(err).Class)
			}
		})
	}
}

// One that never answers is left when the time is up.
func TestAPeerThatNeverAnswersIsLeft(t *testing.T) {
	s := (&peer{join: func(ctx context.Context, _ *atls.Channel) (*replicav1.JoinResponse, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	}}).session(t)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := s.Join(ctx); err == nil || failure.Of(err).Class != failure.Unreachable {
		t.Error(err)
	}
}

// book is what this side has seen.
type book struct {
	pages []volume.Seen
	noted []volume.Sighting
}

func (*book) RecordKey() (string, error) { return "key", nil }

func (b *book) Since(position uint64) volume.Seen {
	if position < uint64(len(b.pages)) {
		return b.pages[position]
	}
	return volume.Seen{Next: position}
}

func (b *book) Note(_ context.Context, _ string, _ uint64, page []volume.Sighting) error {
	b.noted = append(b.noted, page...)
	return nil
}

func TestAnExchangeGoesOnWhereItWas(t *testing.T) {
	var got []string
	s := (&peer{seen: func(_ context.Context, r *replicav1.SeenRequest) (*replicav1.SeenResponse, error) {
		got = append(got, string(r.GetPage()))
		if r.GetRecordKey() != "key" {
			t.Errorf("of the records %q", r.GetRecordKey())
		}
		switch r.GetAfter() {
		case 0:
			return &replicav1.SeenResponse{Page: []byte("a 1\n"), Position: 5, More: true}, nil
		case 5:
			return &replicav1.SeenResponse{Page: []byte("b 2\n"), Position: 9}, nil
		}
		return &replicav1.SeenResponse{Position: r.GetAfter()}, nil
	}}).session(t)
	b := &book{pages: []volume.Seen{{Volumes: []volume.Sighting{{Volume: "x", Revision: 1}}, Next: 1, More: true}, {Volumes: []volume.Sighting{{Volume: "y", Revision: 2}}, Next: 2}}}
	must(t, s.Exchange(t.Context(), b))
	must(t, s.Exchange(t.Context(), b))
	if text := strings.Join(got, "|"); text != "x 1\n|y 2\n|" {
		t.Errorf("it was told %q", text)
	}
	if len(b.noted) != 2 || b.noted[1] != (volume.Sighting{Volume: "b", Revision: 2}) {
		t.Errorf("it told %v", b.noted)
	}
}

func TestNonsenseIsNotNoted(t *testing.T) {
	position := uint64(0)
	for name, resp := range map[string]func() *replicav1.SeenResponse{
		"a page that is none": func() *replicav1.SeenResponse { return &replicav1.SeenResponse{Page: []byte("a")} },
		"no way to go on":     func() *replicav1.SeenResponse { return &replicav1.SeenResponse{Page: []byte("a 1\n"), More: true} },
		"an epoch of its own": func() *replicav1.SeenResponse {
			return &replicav1.SeenResponse{Page: []byte("a 1\n"), Epoch: MaxEpoch + 1}
		},
		"pages without an end": func() *replicav1.SeenResponse {
			position++
			return &replicav1.SeenResponse{Position: position, More: true}
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := &book{}
			err := (&peer{seen: func(context.Context, *replicav1.SeenRequest) (*replicav1.SeenResponse, error) { return resp(), nil }}).session(t).Exchange(t.Context(), b)
			if !errors.Is(err, ErrAnswer) || len(b.noted) != 0 {
				t.Errorf("%v, noted %v", err, b.noted)
			}
		})
	}
}

// Neither side is left without the other's proof.
func TestBothSidesMustProveThemselves(t *testing.T) {
	for _, cfg := range []*atls.ClientConfig{{Issuers: []attestation.Issuer{hardware{}}}, {Server: &atls.Peers{}}} {
		if _, err := Dial(t.Context(), "127.0.0.1:1", cfg); !errors.Is(err, atls.ErrConfiguration) {
			t.Error(err)
		}
	}
}
