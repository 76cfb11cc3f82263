package atls

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"google.golang.org/protobuf/proto"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/internal/wire"
)

// MaxFrame bounds a frame in bytes. Only evidence, with its event log and
// certificates, comes near.
const MaxFrame = 1 << 20

// The bounds of each step, in bytes: what is not its turn is not read either.
const (
	maxOpen      = 64
	maxHello     = 64 << 10 // an HPKE key, and offers with certificates
	maxChallenge = 64 << 10
	maxEvidence  = MaxFrame
	maxVerdict   = 16 << 10
)

// judging bounds how many offers and pieces of evidence are decoded and verified at
// the same time in this process, whose memory is one. Connections wait their turn.
var judging = make(chan struct{}, 16)

// maxItems bounds how many kinds of evidence one frame names.
const maxItems = 8

// Frames carries the frames of an exchange: a byte stream for the first one,
// and any ordered message stream, such as a gRPC stream, for a renewal. An error
// that wraps [ErrFrame] is the peer's fault; any other one is the connection's.
type Frames interface {
	Send(*attestv1.Frame) error
	Recv() (*attestv1.Frame, error)
}

// bounded is implemented by Frames that read no further than a step allows.
type bounded interface {
	recv(limit int) (*attestv1.Frame, error)
}

// byteFrames puts each frame behind its length as a 32-bit big-endian number.
type byteFrames struct {
	rw io.ReadWriter
	// hold, if set, is told of memory that a frame takes while it arrives.
	hold func(n int)
}

func (b byteFrames) Send(f *attestv1.Frame) error {
	data, err := proto.Marshal(f)
	if err != nil {
		return err
	}
	if len(data) > MaxFrame {
		return fmt.Errorf("%w: %d bytes to send, at most %d", ErrFrame, len(data), MaxFrame)
	}
	_, err = b.rw.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(data))), data...))
	return err
}

func (b byteFrames) Recv() (*attestv1.Frame, error) { return b.recv(MaxFrame) }

func (b byteFrames) recv(limit int) (*attestv1.Frame, error) {
	var head [4]byte
	if _, err := io.ReadFull(b.rw, head[:]); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(head[:])
	if n == 0 || n > uint32(limit) {
		return nil, fmt.Errorf("%w: %d bytes, at most %d", ErrFrame, n, limit)
	}
	data, err := b.read(int(n))
	if err != nil {
		return nil, err
	}
	f := &attestv1.Frame{}
	if err := wire.Unmarshal(data, f); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrFrame, err)
	}
	return f, nil
}

// read returns the next n bytes. The buffer grows with what arrives, not with what
// the peer announces.
func (b byteFrames) read(n int) ([]byte, error) {
	data := make([]byte, 0, min(n, 4<<10))
	for {
		if b.hold != nil {
			b.hold(cap(data))
		}
		more, err := io.ReadFull(b.rw, data[len(data):cap(data)])
		data = data[:len(data)+more]
		switch {
		case errors.Is(err, io.EOF):
			return nil, io.ErrUnexpectedEOF
		case err != nil:
			return nil, err
		case len(data) == n:
			return data, nil
		}
		data = append(make([]byte, 0, min(n, 2*cap(data))), data...)
	}
}

// recv takes the next frame, of at most limit bytes.
func recv(fr Frames, limit int) (f *attestv1.Frame, err error) {
	if b, ok := fr.(bounded); ok {
		f, err = b.recv(limit)
	} else {
		f, err = fr.Recv()
	}
	switch {
	case err != nil && !errors.Is(err, ErrFrame):
		return nil, &transportError{err}
	case err == nil && f.GetBody() == nil:
		return nil, fmt.Errorf("%w: a frame without a body that is known", ErrFrame)
	}
	return f, err
}

// expect takes the next frame and demands that it has the body B.
func expect[B any](fr Frames, limit int, body func(*attestv1.Frame) (B, bool)) (B, error) {
	var none B
	f, err := recv(fr, limit)
	if err != nil {
		return none, err
	}
	b, ok := body(f)
	if !ok {
		return none, fmt.Errorf("%w: %T is out of turn", ErrFrame, f.GetBody())
	}
	return b, nil
}

// send says of an error that it is the connection's.
func send(fr Frames, f *attestv1.Frame) error {
	err := fr.Send(f)
	if err != nil && !errors.Is(err, ErrFrame) {
		return &transportError{err}
	}
	return err
}

// transportError means that the connection itself failed: there is nobody to send
// a verdict to.
type transportError struct{ err error }

func (e *transportError) Error() string { return e.err.Error() }
func (e *transportError) Unwrap() error { return e.err }

func openOf(f *attestv1.Frame) (*attestv1.Open, bool) { return f.GetOpen(), f.GetOpen() != nil }

func helloOf(f *attestv1.Frame) (*attestv1.Hello, bool) { return f.GetHello(), f.GetHello() != nil }

func evidenceOf(f *attestv1.Frame) (*attestv1.Evidence, bool) {
	return f.GetEvidence(), f.GetEvidence() != nil
}

func verdictOf(f *attestv1.Frame) (*attestv1.Verdict, bool) {
	return f.GetVerdict(), f.GetVerdict() != nil
}
