package keyclient

import (
	"context"
	"crypto/rand"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	keyservicev1 "github.com/keyagent/keyagent/api/keyagent/keyservice/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/atls"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/internal/witness"
)

// protocol is the version of the API that this client speaks. An older service
// ignores it, and says so by leaving it out of its answer.
const protocol = 2

// Progress is told what is going on, for systemd and for the log, and how much
// longer it may take.
type Progress func(step string, took time.Duration)

// Client is the key service. It is safe for concurrent use.
type Client struct {
	retry    Retry
	log      *slog.Logger
	progress Progress
	node     string
	witness  *witness.Witness
	wait     func(ctx context.Context, d time.Duration) error

	keys   *link
	leases *link

	reports reports
}

// Options configure [New].
type Options struct {
	Servers []Server // at least one
	Retry   Retry    // zero: DefaultRetry
	// Issuers returns this machine's evidence, for each connection anew: a driver
	// may come late, and a connection shows what is there then. Required.
	Issuers func(context.Context) ([]attestation.Issuer, error)
	Server  *atls.Peers // nil unless the service must attest itself
	Log     *slog.Logger
	// Node is what people call this machine. It decides nothing.
	Node     string
	Progress Progress
	// FloorFile keeps the earliest time that it can be over a restart of this process.
	// It is in memory, as /run is: what it says counts since the machine's start. Empty
	// keeps nothing.
	FloorFile string
	// Witness remembers the key service's audit logs. Nil: for as long as the client is there.
	// The client closes it.
	Witness *witness.Witness
	// Timeout bounds one handshake with its attestation. Default
	// atls.DefaultTimeout.
	Timeout time.Duration
}

// New connects to nothing yet. The caller closes the client.
func New(opts Options) (*Client, error) {
	if len(opts.Servers) == 0 {
		return nil, fmt.Errorf("%w: no server", atls.ErrConfiguration)
	}
	if opts.Progress == nil {
		opts.Progress = func(string, time.Duration) {}
	}
	if opts.Witness == nil {
		opts.Witness = witness.New(witness.Options{Log: opts.Log})
	}
	if opts.Retry == (Retry{}) {
		opts.Retry = DefaultRetry
	}
	c := &Client{retry: opts.Retry, witness: opts.Witness, log: opts.Log, progress: opts.Progress, wait: wait, node: opts.Node[:min(len(opts.Node), 64)]}
	earliest := newFloor(opts.FloorFile, opts.Log)
	for _, l := range []**link{&c.keys, &c.leases} {
		id, err := atls.NewIdentity()
		if err != nil {
			return nil, err
		}
		var all []*endpoint
		for _, s := range opts.Servers {
			all = append(all, &endpoint{address: s.Address, log: opts.Log, issuers: opts.Issuers, floor: earliest, cfg: &atls.ClientConfig{
				CertificateTime: earliest.Now,
				ServerName:      s.Name, RootCAs: s.Roots, PinnedSPKI: s.Pins,
				Identity: id, Server: opts.Server, Timeout: opts.Timeout,
			}})
		}
		*l = newLink(all, opts.Progress)
	}
	return c, nil
}

// Close closes the connections.
func (c *Client) Close() error {
	c.keys.close()
	c.leases.close()
	return c.witness.Close()
}

// Hold keeps the session on which keys travel until the returned function is
// called. When nobody holds it the session ends, and what opens its recorded
// traffic is erased.
func (c *Client) Hold() (release func()) {
	c.keys.enter()
	return func() {
		if c.keys.leave() {
			secret.Forget()
		}
	}
}

// Request is what a key is asked for.
type Request struct {
	Volume string
	// Format asks for the key of a volume that may not exist yet.
	Format bool
	// Clone asks for the key of a volume to make another volume of a copy of its disk. It
	// takes no lease, and does not disturb the node that holds one.
	Clone bool
	// Rotate asks for the key that an open volume is to have, and has one made unless its
	// key is being changed already. Next asks for it only if it is.
	Rotate, Next bool
	ReadOnly     bool
	Diskless     bool
	LeaseID      []byte // of a lease that this machine may still have
	// Left is for how much longer the verdict on this machine must hold when the key
	// comes: it is renewed first if it would end before. A verdict that is shorter than
	// that from the start will do.
	Left time.Duration
	// Length of the key in bytes. 0 is the key service's choice.
	Length int
	// Offline is what this machine would keep the key for, while no key service answers.
	// Zero: nothing.
	Offline OfflineLimits
}

// GetKey returns the key of a volume. The caller closes it.
func (c *Client) GetKey(ctx context.Context, r Request) (*Key, error) {
	req := &keyservicev1.GetKeyRequest{
		VolumeId: r.Volume, Operation: keyservicev1.Operation_OPERATION_OPEN, Protocol: protocol,
		ReadOnly: r.ReadOnly, Node: c.node, LeaseId: r.LeaseID, Diskless: r.Diskless, Length: uint32(r.Length),
	}
	if r.Offline != (OfflineLimits{}) {
		req.Offline = r.Offline.proto()
	}
	switch {
	case r.Format:
		req.Operation = keyservicev1.Operation_OPERATION_FORMAT
	case r.Clone:
		req.Operation = keyservicev1.Operation_OPERATION_CLONE
	case r.Rotate:
		req.Operation = keyservicev1.Operation_OPERATION_ROTATE
	case r.Next:
		req.Operation = keyservicev1.Operation_OPERATION_NEXT
	}
	// A first format goes on in the session that brought the key: it is held until
	// the key is closed.
	release := sync.OnceFunc(c.Hold())
	var key *Key
	err := c.try(ctx, func(ctx context.Context) error {
		return c.keys.callWith(ctx, r.Left, func(ctx context.Context, s *session) error {
			seen := c.witness.Ask()
			req.Checkpoints = seen.Notes()
			sent := bootTime()
			var said func(error)
			req.OpenedOffline, said = c.reports.of(r.Volume)
			resp, err := s.service.GetKey(ctx, req)
			err = fromStatus(err)
			said(err)
			if err != nil {
				return err
			}
			if err := seen.Hear(witness.Answer{Key: resp.GetCheckpointKey(), Note: resp.GetCheckpoint(), Consistency: resp.GetConsistency()}); err != nil {
				return err
			}
			key, err = openKey(s, req, resp, sent)
			return err
		})
	})
	if err != nil {
		release()
		if f := failure.Of(err); f.Class == failure.Usage && rotates(req) {
			return nil, &failure.Error{Class: failure.State, CorrelationID: f.CorrelationID, Err: err,
				Hint: "upgrade the key service: one of before does not know that keys are changed"}
		}
		return nil, err
	}
	key.release = release
	return key, nil
}

// BeginFormat tells the key service which header is about to be written. Until is
// the moment, by [Boottime], after which nothing may be written any more.
func (c *Client) BeginFormat(ctx context.Context, k *Key, m MACs) (until time.Duration, err error) {
	attempt := make([]byte, AttemptSize)
	rand.Read(attempt) // never fails
	proof, err := k.proof("begin", attempt, m)
	if err != nil {
		return 0, err
	}
	var resp *keyservicev1.BeginFormatResponse
	sent := bootTime()
	err = k.inSession(ctx, func(ctx context.Context) (err error) {
		resp, err = k.session.service.BeginFormat(ctx, &keyservicev1.BeginFormatRequest{
			VolumeId: k.Volume, Generation: k.Generation, KeyVersion: k.KeyVersion, Attempt: attempt,
			HeaderMac: m.Header[:], CopyMacs: m.copies(), Proof: proof, Node: c.node,
		})
		return err
	})
	if err != nil {
		return 0, err
	}
	k.Attempt, k.MACs = attempt, m
	return sent + time.Duration(resp.GetTermMs())*time.Millisecond, nil
}

// HeaderStands tells the key service that the header of the attempt is on the
// disk. From here on this machine may write data, as long as k.Lease says.
func (c *Client) HeaderStands(ctx context.Context, k *Key) error {
	proof, err := k.proof("stands", k.Attempt, k.MACs)
	if err != nil {
		return err
	}
	var resp *keyservicev1.HeaderStandsResponse
	sent := bootTime()
	if err := k.inSession(ctx, func(ctx context.Context) (err error) {
		resp, err = k.session.service.HeaderStands(ctx, &keyservicev1.HeaderStandsRequest{VolumeId: k.Volume, Attempt: k.Attempt, Proof: proof})
		return err
	}); err != nil {
		return err
	}
	k.State, k.Writers = Formatted, writersOf(resp.GetWriters())
	k.Lease, err = leaseOf(resp.GetLease(), sent)
	return err
}

// Confirm makes the volume active: its header and its filesystem stand. Any
// session will do, and repeating it is fine.
func (c *Client) Confirm(ctx context.Context, k *Key) error {
	return c.try(ctx, func(ctx context.Context) error {
		return c.leases.call(ctx, func(ctx context.Context, s *session) error {
			_, err := s.service.ConfirmVolume(ctx, &keyservicev1.ConfirmVolumeRequest{
				VolumeId: k.Volume, Generation: k.Generation, KeyVersion: k.KeyVersion, HeaderMac: k.MACs.Header[:], Attempt: k.Attempt,
			})
			return fromStatus(err)
		})
	})
}

// Renew extends a lease, trying once. A refusal means that another node has the
// volume, or an operator took it away. No lease and no error mean that the policy
// asks for none any more.
func (c *Client) Renew(ctx context.Context, volume string, id []byte) (*Lease, error) {
	var lease *Lease
	err := c.leases.call(ctx, func(ctx context.Context, s *session) error {
		sent := bootTime()
		report, said := c.reports.of(volume)
		resp, err := s.service.RenewLease(ctx, &keyservicev1.RenewLeaseRequest{VolumeId: volume, LeaseId: id, Node: c.node, OpenedOffline: report})
		err = fromStatus(err)
		said(err)
		if err != nil {
			return err
		}
		if lease, err = leaseOf(resp.GetLease(), sent); lease != nil {
			lease.Rotate = resp.GetRotate()
		}
		return err
	})
	return lease, err
}

// Verdict asks whether this machine may still have a volume open of which it has no lease. Nil
// is yes, and what a key service of the release before says, which does not know the question
// and looks for a lease.
func (c *Client) Verdict(ctx context.Context, volume string, readOnly bool) error {
	return c.leases.call(ctx, func(ctx context.Context, s *session) error {
		var header metadata.MD
		_, err := s.service.RenewLease(ctx, &keyservicev1.RenewLeaseRequest{VolumeId: volume, Node: c.node, Verdict: true, ReadOnly: readOnly}, grpc.Header(&header))
		if err = fromStatus(err); err != nil && len(header.Get(keyservicev1.VerdictHeader)) == 0 {
			switch failure.Of(err).Class {
			case failure.Held, failure.PolicyDenied, failure.State, failure.NotFound:
				return nil
			}
		}
		return err
	})
}

// KeepSession has a session on which leases travel, whose verdict holds for that much
// longer. What is given back later goes on it, also when this machine would be refused by
// then: systemd measures that it shuts down before it unmounts anything. A refusal leaves
// the session that there is.
func (c *Client) KeepSession(ctx context.Context, left time.Duration) error {
	return classify(c.leases.keep(ctx, left))
}

// Release gives a lease back, trying once.
func (c *Client) Release(ctx context.Context, volume string, id []byte) error {
	return c.leases.call(ctx, func(ctx context.Context, s *session) error {
		_, err := s.service.ReleaseLease(ctx, &keyservicev1.ReleaseLeaseRequest{VolumeId: volume, LeaseId: id})
		return fromStatus(err)
	})
}

func fromStatus(err error) error {
	if err == nil {
		return nil
	}
	return failure.FromStatus(err)
}

// CreateDiskless makes the key of a volume that has no disk known to the key
// service as one that is in use. mac stands in the place of a header's.
func (c *Client) CreateDiskless(ctx context.Context, k *Key, mac [32]byte) error {
	if k.State == Pending {
		if _, err := c.BeginFormat(ctx, k, MACs{Header: mac, Copies: [2][32]byte{mac, mac}}); err != nil {
			return err
		}
		if err := c.HeaderStands(ctx, k); err != nil {
			return err
		}
	}
	if err := c.Confirm(ctx, k); err != nil {
		return err
	}
	if k.Lease == nil {
		return nil
	}
	return c.Release(ctx, k.Volume, k.Lease.ID)
}
