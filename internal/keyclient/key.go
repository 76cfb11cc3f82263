package keyclient

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	keyservicev1 "github.com/keyagent/keyagent/api/keyagent/keyservice/v1"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/proof"
	"github.com/keyagent/keyagent/internal/secret"
)

// State is how far the key service's record of a volume is.
type State int

// The states in which a key is released. The zero value is none of them.
const (
	Pending   State = iota + 1 // no header was ever written, as far as is known
	Formatted                  // the header stands, the filesystem may not
	Active                     // the volume holds data
)

// Writers is who may write a volume.
type Writers int

// The zero value is a service that knows no leases.
const (
	WritersUnknown Writers = iota
	WritersOne
	WritersMany
	WritersNone
)

// AttemptSize is the size of an attempt's name in bytes.
const AttemptSize = 16

// MACs authenticate a header: as a whole, and each of its two copies. Copies of
// zeros are those of a header of version 1.
type MACs struct {
	Header [32]byte
	Copies [2][32]byte
}

func (m MACs) copies() [][]byte { return [][]byte{m.Copies[0][:], m.Copies[1][:]} }

// Lease is the right to write a volume. Until counts as [Boottime] does.
type Lease struct {
	ID    []byte
	Term  time.Duration
	Until time.Duration
	Bound bool // the holder stops writing before Until unless it renewed the lease
	// Rotate says, after a renewal, that the volume's key is to be changed.
	Rotate bool
}

// Key is what the key service released for one volume. Close wipes the DEK.
type Key struct {
	DEK           *secret.Bytes
	State         State
	Volume        string
	UUID          string
	Generation    uint64
	KeyVersion    uint32
	MACs          MACs // zero while pending
	Writers       Writers
	Lease         *Lease   // nil where there is none
	Attempt       []byte   // of a volume that is being created
	Offline       *Offline // what it may be kept for; nil: it may not
	OfflineWhy    string   // why not, if it was asked for
	CorrelationID string
	Expires       time.Time // of the verdict under which it was released

	session *session // the key service ties the first format to it
	release func()
}

// Close wipes the DEK, and ends the session that brought it unless another key is
// open.
func (k *Key) Close() error {
	err := k.DEK.Close()
	if k.release != nil {
		k.release()
	}
	return err
}

// proof shows that this side has the DEK, on the connection that brought it.
func (k *Key) proof(step string, attempt []byte, m MACs) ([]byte, error) {
	binder := k.session.channel.Binder()
	sum, err := proof.Of(k.DEK, proof.Input{Volume: k.Volume, Generation: k.Generation, Binder: binder[:],
		Step: step, Attempt: attempt, HeaderMAC: m.Header[:], CopyMACs: m.copies()})
	return sum[:], err
}

// inSession runs one call of a first format, which has the one session that
// brought the key. If that ended, the caller asks for the key again.
func (k *Key) inSession(ctx context.Context, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if err := fromStatus(f(ctx)); err != nil {
		return withContext(classify(err), k.session.address)
	}
	return nil
}

func openKey(s *session, req *keyservicev1.GetKeyRequest, resp *keyservicev1.GetKeyResponse, sent time.Duration) (*Key, error) {
	k := &Key{
		Volume: req.GetVolumeId(), UUID: resp.GetLuksUuid(), Generation: resp.GetGeneration(),
		KeyVersion: resp.GetKeyVersion(), CorrelationID: resp.GetCorrelationId(),
		Expires: s.channel.Verdict().Expires, Writers: writersOf(resp.GetWriters()), session: s,
	}
	var err error
	if err = k.read(req, resp); err == nil {
		k.Lease, err = leaseOf(resp.GetLease(), sent)
	}
	if err == nil {
		k.Offline, err = offlineOf(req, resp)
		k.OfflineWhy = printable(resp.GetOfflineRefused())
	}
	if err != nil {
		return nil, failure.New(failure.State, fmt.Errorf("the key service's answer makes no sense: %w", err), "are node and key service of the same release?")
	}
	if k.DEK, err = s.channel.Open(keyservicev1.SealInfo(req.GetVolumeId(), req.GetOperation(), resp), resp.GetSealedDek()); err != nil {
		return nil, failure.New(failure.WrongKey, fmt.Errorf("sealed key: %w", err), "")
	}
	if want := int(req.GetLength()); want != 0 && k.DEK.Len() != want {
		return nil, errors.Join(failure.Newf(failure.State, "upgrade the key service: one of before knows keys of 32 bytes alone",
			"the key service gave a key of %d bytes, asked for were %d", k.DEK.Len(), want), k.DEK.Close())
	}
	return k, nil
}

// read takes over the fields that depend on the state, and refuses what no state
// has.
func (k *Key) read(req *keyservicev1.GetKeyRequest, resp *keyservicev1.GetKeyResponse) error {
	format := req.GetOperation() == keyservicev1.Operation_OPERATION_FORMAT
	if resp.GetProtocol() < protocol && (resp.GetLease() != nil || len(resp.GetCopyMacs()) > 0) {
		return fmt.Errorf("fields of a later protocol than %d", resp.GetProtocol())
	}
	switch resp.GetState() {
	case keyservicev1.VolumeState_VOLUME_STATE_PENDING:
		k.State = Pending
		if !format || len(resp.GetHeaderMac()) > 0 {
			return fmt.Errorf("a pending volume, header MAC of %d bytes", len(resp.GetHeaderMac()))
		}
		if resp.GetProtocol() < protocol {
			return failure.Newf(failure.State, "upgrade the key service first", "the key service is older than this node, and cannot tell two nodes that create one volume apart")
		}
		return nil
	case keyservicev1.VolumeState_VOLUME_STATE_FORMATTED:
		k.State, k.Attempt = Formatted, resp.GetAttempt()
		if !format || len(k.Attempt) != AttemptSize {
			return fmt.Errorf("a volume that is being created, attempt of %d bytes", len(k.Attempt))
		}
	case keyservicev1.VolumeState_VOLUME_STATE_ACTIVE:
		k.State = Active
		if rotates(req) && len(resp.GetHeaderMac())+len(resp.GetCopyMacs()) == 0 {
			return nil // no header was made under it yet
		}
	default:
		return fmt.Errorf("state %v", resp.GetState())
	}
	return k.readMACs(resp)
}

func (k *Key) readMACs(resp *keyservicev1.GetKeyResponse) error {
	if len(resp.GetHeaderMac()) != len(k.MACs.Header) {
		return fmt.Errorf("header MAC of %d bytes", len(resp.GetHeaderMac()))
	}
	copy(k.MACs.Header[:], resp.GetHeaderMac())
	if n := len(resp.GetCopyMacs()); n != 0 && n != len(k.MACs.Copies) {
		return fmt.Errorf("MACs of %d copies", n)
	}
	for i, m := range resp.GetCopyMacs() {
		if len(m) != len(k.MACs.Copies[i]) || bytes.Equal(m, make([]byte, len(m))) {
			return fmt.Errorf("MAC %d of a copy has %d bytes, or is zero", i, len(m))
		}
		copy(k.MACs.Copies[i][:], m)
	}
	return nil
}

func writersOf(w keyservicev1.Writers) Writers {
	switch w {
	case keyservicev1.Writers_WRITERS_ONE:
		return WritersOne
	case keyservicev1.Writers_WRITERS_MANY:
		return WritersMany
	case keyservicev1.Writers_WRITERS_NONE:
		return WritersNone
	}
	return WritersUnknown
}

// maxTerm bounds what a lease may promise.
const maxTerm = 24 * time.Hour

func leaseOf(l *keyservicev1.Lease, sent time.Duration) (*Lease, error) {
	if l == nil {
		return nil, nil
	}
	term := time.Duration(min(l.GetTermMs(), uint64(maxTerm/time.Millisecond))) * time.Millisecond
	if len(l.GetId()) != AttemptSize || term <= 0 {
		return nil, fmt.Errorf("a lease with an ID of %d bytes, for %s", len(l.GetId()), term)
	}
	return &Lease{ID: l.GetId(), Term: term, Until: sent + term, Bound: l.GetBound()}, nil
}

// Boottime is the time since this machine started, as CLOCK_BOOTTIME counts it: it
// goes on while the machine is suspended, and nobody sets it.
func Boottime() time.Duration { return bootTime() }

func bootTime() time.Duration {
	var ts unix.Timespec
	// The clock is always there, and the address is good.
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts)
	return time.Duration(ts.Nano())
}
