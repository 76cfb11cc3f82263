package atls

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"google.golang.org/protobuf/proto"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
)

// MaxFrame bounds a frame in bytes. Only evidence, with its event log and
// certificates, comes near.
const MaxFrame = 1 << 20

// maxItems bounds how many kinds of evidence one frame names.
const maxItems = 8

// Frames carries the frames of an exchange: a byte stream for the first one,
// and any ordered message stream, such as a gRPC stream, for a renewal.
type Frames interface {
	Send(*attestv1.Frame) error
	Recv() (*attestv1.Frame, error)
}

// byteFrames puts each frame behind its length as a 32-bit big-endian number.
type byteFrames struct {
	rw io.ReadWriter
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

func (b byteFrames) Recv() (*attestv1.Frame, error) {
	var head [4]byte
	if _, err := io.ReadFull(b.rw, head[:]); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(head[:])
	if n == 0 || n > MaxFrame {
		return nil, fmt.Errorf("%w: %d bytes, at most %d", ErrFrame, n, MaxFrame)
	}
	// The buffer grows with what arrives, not with what the peer announces.
	var data bytes.Buffer
	if _, err := io.CopyN(&data, b.rw, int64(n)); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return nil, err
	}
	f := &attestv1.Frame{}
	if err := proto.Unmarshal(data.Bytes(), f); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrFrame, err)
	}
	return f, nil
}

// recv takes the next frame and demands that it has the body B.
func recv[B any](fr Frames, body func(*attestv1.Frame) (B, bool)) (B, error) {
	var none B
	f, err := fr.Recv()
	if err != nil {
		return none, err
	}
	b, ok := body(f)
	if !ok {
		return none, fmt.Errorf("%w: %T is out of turn", ErrFrame, f.GetBody())
	}
	return b, nil
}

func openOf(f *attestv1.Frame) (*attestv1.Open, bool) { return f.GetOpen(), f.GetOpen() != nil }

func helloOf(f *attestv1.Frame) (*attestv1.Hello, bool) { return f.GetHello(), f.GetHello() != nil }

func evidenceOf(f *attestv1.Frame) (*attestv1.Evidence, bool) {
	return f.GetEvidence(), f.GetEvidence() != nil
}

func verdictOf(f *attestv1.Frame) (*attestv1.Verdict, bool) {
	return f.GetVerdict(), f.GetVerdict() != nil
}
