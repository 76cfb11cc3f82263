package atls

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"runtime"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
)

// framed puts data behind its length.
func framed(data []byte) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(data))), data...)
}

func frameBytes(t testing.TB, f *attestv1.Frame) []byte {
	t.Helper()
	data, err := proto.Marshal(f)
	if err != nil {
		t.Fatal(err)
	}
	return framed(data)
}

func openFrame(version uint32, has bool) *attestv1.Frame {
	return &attestv1.Frame{Body: &attestv1.Frame_Open{Open: &attestv1.Open{Version: version, HasEvidence: has}}}
}

func helloFrame(h *attestv1.Hello) *attestv1.Frame {
	return &attestv1.Frame{Body: &attestv1.Frame_Hello{Hello: h}}
}

// Case 16, seen from the service: whatever comes instead of a frame ends the
// exchange by a named error.
func TestAFrameThatIsNoneIsRefused(t *testing.T) {
	good := frameBytes(t, openFrame(protocolVersion, true))
	items := make([]*attestv1.Item, maxItems+1)
	for i := range items {
		items[i] = &attestv1.Item{Kind: "fake"}
	}
	for name, tt := range map[string]struct {
		sent []byte
		want error
	}{
		"no byte":                {nil, io.EOF},
		"half a length":          {[]byte{0, 0}, io.ErrUnexpectedEOF},
		"length 0":               {[]byte{0, 0, 0, 0}, ErrFrame},
		"length 2^31":            {[]byte{0x80, 0, 0, 0}, ErrFrame},
		"length 2^32-1":          {[]byte{0xff, 0xff, 0xff, 0xff}, ErrFrame},
		"one more than allowed":  {binary.BigEndian.AppendUint32(nil, MaxFrame+1), ErrFrame},
		"one byte short":         {good[:len(good)-1], io.ErrUnexpectedEOF},
		"no protobuf":            {framed([]byte{0xff, 0xff, 0xff}), ErrFrame},
		"a body that is unknown": {framed([]byte{0x7a, 0x00}), ErrFrame},
		"an unknown version":     {frameBytes(t, openFrame(protocolVersion+1, true)), ErrFrame},
		"version 0":              {frameBytes(t, openFrame(0, true)), ErrFrame},
		"Hello first":            {frameBytes(t, helloFrame(&attestv1.Hello{})), ErrFrame},
		"Open twice":             {bytes.Repeat(good, 2), ErrFrame},
		"endless Opens":          {bytes.Repeat(good, 10_000), ErrFrame},
		"Verdict instead of Hello": {append(bytes.Clone(good), frameBytes(t, &attestv1.Frame{Body: &attestv1.Frame_Verdict{
			Verdict: &attestv1.Verdict{Accepted: true}}})...), ErrFrame},
		"Hello without an HPKE key": {append(bytes.Clone(good), frameBytes(t, helloFrame(&attestv1.Hello{}))...), ErrFrame},
		"Hello with a short HPKE key": {append(bytes.Clone(good),
			frameBytes(t, helloFrame(&attestv1.Hello{HpkePublicKey: make([]byte, 32)}))...), ErrFrame},
		"Hello with too many offers": {append(bytes.Clone(good), frameBytes(t, helloFrame(&attestv1.Hello{Offers: items}))...), ErrFrame},
	} {
		t.Run(name, func(t *testing.T) {
			c, result := newWorld(t).rawTLS(t, nil)
			if err := c.HandshakeContext(t.Context()); err != nil {
				t.Fatal(err)
			}
			go io.Copy(io.Discard, c)
			_, _ = c.Write(tt.sent)
			_ = c.CloseWrite()
			got := <-result
			wantErr(t, got.err, tt.want)
			if got.conn != nil {
				t.Error("the connection was accepted")
			}
			c.Close()
		})
	}
}

// Case 16, seen from the machine.
func TestAChallengeThatIsNoneIsRefused(t *testing.T) {
	for name, f := range map[string]func(*attestv1.Challenge){
		"no nonce":      func(c *attestv1.Challenge) { c.Nonce = nil },
		"a short nonce": func(c *attestv1.Challenge) { c.Nonce = c.Nonce[1:] },
		"a long nonce":  func(c *attestv1.Challenge) { c.Nonce = append(c.Nonce, 0) },
		"no ask":        func(c *attestv1.Challenge) { c.Asks = nil },
		"too many asks": func(c *attestv1.Challenge) {
			for len(c.Asks) <= maxItems {
				c.Asks = append(c.Asks, c.Asks[0])
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := newCouple(node())
			c.fromServer = change(challengeOf, f)
			client, _ := c.run()
			wantErr(t, client, ErrFrame)
		})
	}
	t.Run("evidence of a kind that was not offered", func(t *testing.T) {
		c := newCouple(node())
		c.fromServer = change(challengeOf, func(c *attestv1.Challenge) { c.Asks[0].Kind = "other" })
		client, _ := c.run()
		wantErr(t, client, ErrNoEvidence)
	})
	t.Run("a verdict that accepts before there is evidence", func(t *testing.T) {
		c := newCouple(node())
		c.fromServer = func(f *attestv1.Frame) (*attestv1.Frame, error) {
			if f.GetChallenge() != nil {
				f.Body = &attestv1.Frame_Verdict{Verdict: &attestv1.Verdict{Accepted: true}}
			}
			return f, nil
		}
		client, _ := c.run()
		wantErr(t, client, ErrFrame)
	})
}

// A verdict's text comes from the peer and ends in this side's log.
func TestARefusalIsCutToAReadableSize(t *testing.T) {
	c := newCouple(&machine{kind: "fake", identity: "stranger"})
	c.fromServer = change(verdictOf, func(v *attestv1.Verdict) {
		v.RefusalClass, v.CorrelationId, v.Detail = strings.Repeat("a", 1<<20), strings.Repeat("b", 1<<20), strings.Repeat("c", 1<<20)
	})
	client, server := c.run()
	wantErr(t, server, errStranger)
	var r *Refusal
	if !errors.As(client, &r) || len(r.Error()) > 5000 {
		t.Errorf("%d bytes", len(client.Error()))
	}
}

func TestAnAnnouncedFrameTakesNoMemoryUntilItArrives(t *testing.T) {
	one := append(binary.BigEndian.AppendUint32(nil, MaxFrame), 1)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for range 100 {
		_, err := byteFrames{rw: readWriter{bytes.NewReader(one), io.Discard}}.Recv()
		wantErr(t, err, io.ErrUnexpectedEOF)
	}
	runtime.ReadMemStats(&after)
	if n := (after.TotalAlloc - before.TotalAlloc) / 100; n > 64<<10 {
		t.Errorf("%d bytes for a frame of one byte", n)
	}
}

type readWriter struct {
	io.Reader
	io.Writer
}

func TestAFrameThatIsTooLargeIsNotSent(t *testing.T) {
	var out bytes.Buffer
	err := byteFrames{rw: readWriter{nil, &out}}.Send(helloFrame(&attestv1.Hello{HpkePublicKey: make([]byte, MaxFrame)}))
	wantErr(t, err, ErrFrame)
	if out.Len() != 0 {
		t.Errorf("%d bytes were sent", out.Len())
	}
}

// Composite evidence: each kind that is demanded must come, once, in its place.
func TestCompositeEvidenceIsWhole(t *testing.T) {
	two := func() (*machine, *machine) {
		return &machine{kind: "fake", identity: "node", epoch: "1"}, &machine{kind: "other", identity: "chip", epoch: "1"}
	}
	items := func(f func(*attestv1.Evidence)) func(*couple) {
		return func(c *couple) { c.fromClient = change(evidenceOf, f) }
	}
	for name, tt := range map[string]struct {
		tamper func(*couple)
		want   error
	}{
		"one kind is not on offer": {func(c *couple) { c.client.issuers = c.client.issuers[:1] }, ErrPeerUnattested},
		"its offer was taken away": {func(c *couple) {
			c.fromClient = change(helloOf, func(h *attestv1.Hello) { h.Offers = h.Offers[:1] })
		}, ErrPeerUnattested},
		"another order": {items(func(e *attestv1.Evidence) { e.Items[0], e.Items[1] = e.Items[1], e.Items[0] }), ErrFrame},
		"one too few":   {items(func(e *attestv1.Evidence) { e.Items = e.Items[:1] }), ErrFrame},
		"none":          {items(func(e *attestv1.Evidence) { e.Items = nil }), ErrFrame},
		"one too many":  {items(func(e *attestv1.Evidence) { e.Items = append(e.Items, e.Items[0]) }), ErrFrame},
		"one twice":     {items(func(e *attestv1.Evidence) { e.Items[1] = e.Items[0] }), ErrFrame},
		"another kind":  {items(func(e *attestv1.Evidence) { e.Items[1].Kind = "third" }), ErrFrame},
		"one under the other's name": {items(func(e *attestv1.Evidence) {
			e.Items[0].Data, e.Items[1].Data = e.Items[1].Data, e.Items[0].Data
		}), errStale},
		"one empty": {items(func(e *attestv1.Evidence) { e.Items[1].Data = nil }), errForged},
	} {
		t.Run(name, func(t *testing.T) {
			a, b := two()
			c := newCouple(a, b)
			tt.tamper(c)
			c.wantRefusal(t, tt.want)
		})
	}
	a, b := two()
	c := newCouple(b, a) // the client's own order is its own affair
	c.server.peers = demand("fake", "other")
	c.mustRun(t)
	if v, _, err := c.server.Peer(); err != nil || v.Identity() != "fake:node+other:chip" {
		t.Errorf("%v, %v", v, err)
	}
	if a.open+b.open != 0 {
		t.Errorf("%d attempts are still open", a.open+b.open)
	}
}
