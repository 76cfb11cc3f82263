package atls

import (
	"bytes"
	"errors"
	"io"
	"testing"

	"google.golang.org/protobuf/proto"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
)

// recorded returns the frames of one honest exchange, as they are on the wire.
func recorded(t testing.TB) [][]byte {
	t.Helper()
	var out [][]byte
	c := newCouple(node())
	record := func(f *attestv1.Frame) (*attestv1.Frame, error) {
		out = append(out, frameBytes(t, f))
		return f, nil
	}
	c.fromClient = record
	c.mustRun(t)
	c.fromClient, c.fromServer = nil, record
	c.mustRun(t)
	return out
}

// FuzzFrame: whatever comes, a frame is read whole or refused, and one that is
// read is sent again as bytes that give the same frame.
func FuzzFrame(f *testing.F) {
	for _, frame := range recorded(f) {
		f.Add(frame)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		frame, err := byteFrames{rw: readWriter{bytes.NewReader(data), io.Discard}}.Recv()
		if err != nil {
			if !errors.Is(err, ErrFrame) && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Fatalf("a nameless error: %v", err)
			}
			return
		}
		var wire bytes.Buffer
		if err := (byteFrames{rw: readWriter{nil, &wire}}).Send(frame); err != nil {
			if errors.Is(err, ErrFrame) || proto.Size(frame) == 0 {
				return
			}
			t.Fatal(err)
		}
		again, err := byteFrames{rw: readWriter{&wire, io.Discard}}.Recv()
		if proto.Size(frame) > 0 && (err != nil || !proto.Equal(frame, again)) {
			t.Fatalf("%v became %v, %v", frame, again, err)
		}
	})
}

// FuzzPeer: a peer that says anything at all is refused, and nothing else
// happens. Without hardware there is no way to be accepted.
func FuzzPeer(f *testing.F) {
	f.Add(bytes.Join(recorded(f), nil))
	f.Fuzz(func(t *testing.T, data []byte) {
		c := newCouple(node())
		err := c.server.run(t.Context(), byteFrames{rw: readWriter{bytes.NewReader(data), io.Discard}})
		if err == nil {
			t.Fatal("accepted")
		}
		if _, _, err := c.server.Peer(); !errors.Is(err, ErrPeerUnattested) {
			t.Fatalf("the peer counts as attested: %v", err)
		}
		// The machine's side only must not fall over.
		_ = newCouple(node()).client.run(t.Context(), byteFrames{rw: readWriter{bytes.NewReader(data), io.Discard}})
	})
}
