package keyservice

import (
	"bytes"
	"context"
	"crypto/hpke"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/atls"
	"github.com/keyagent/keyagent/test/sim/swtpm"
)

// floodLimit is what the service may take, as a process, whatever strangers send.
const floodLimit = 256 << 20

// residentOf returns the resident memory of a process.
func residentOf(pid int) uint64 {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if err != nil {
		return 0
	}
	var size, pages uint64
	_, _ = fmt.Sscan(string(text), &size, &pages)
	return pages * uint64(os.Getpagesize())
}

// body is field n of a Frame.
func body(n protowire.Number, data []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(nil, n, protowire.BytesType), data)
}

func announced(size int, data []byte) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(size)), data...)
}

func whole(data []byte) []byte { return announced(len(data), data) }

func encoded(t testing.TB, f *attestv1.Frame) []byte {
	t.Helper()
	data, err := proto.Marshal(f)
	if err != nil {
		t.Fatal(err)
	}
	return whole(data)
}

// Cases 16 and 80: as many strangers as are let in, each with a frame that is as
// expensive as its kind can be, all at once. The service stays small, and an honest
// machine is served.
func TestStrangersWithFramesOfEveryKindTakeLittleMemory(t *testing.T) {
	w := newWorld(t)
	pid := w.process("tpm: {device: " + swtpm.New(t, w.tpm.Authority).Device + "}")
	attempt, err := w.issuer.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	offer := attempt.Offer()
	if err := attempt.Close(); err != nil {
		t.Fatal(err)
	}
	key, err := hpke.MLKEM768X25519().GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	open := encoded(t, &attestv1.Frame{Body: &attestv1.Frame_Open{Open: &attestv1.Open{Version: 1, HasEvidence: true}}})
	mutual := encoded(t, &attestv1.Frame{Body: &attestv1.Frame_Open{Open: &attestv1.Open{Version: 1, HasEvidence: true, WantsEvidence: true}}})
	hello := encoded(t, &attestv1.Frame{Body: &attestv1.Frame_Hello{Hello: &attestv1.Hello{
		HpkePublicKey: key.PublicKey().Bytes(), Offers: []*attestv1.Item{{Kind: string(attestation.TPM), Data: offer}},
	}}})
	const full = atls.MaxFrame - 8
	empty := bytes.Repeat([]byte{0x0a, 0}, full/2)
	values := protowire.AppendBytes([]byte{0x0a, 3, 't', 'p', 'm', 0x12}, bytes.Repeat([]byte{0x1a, 0}, (full-32)/2))
	log := protowire.AppendBytes([]byte{0x0a, 3, 't', 'p', 'm', 0x12}, protowire.AppendBytes([]byte{0x2a}, make([]byte, 512<<10)))
	item := func(data []byte) []byte { return body(4, protowire.AppendBytes([]byte{0x0a}, data)) }
	for _, tt := range []struct {
		name  string
		steps [][]byte // each answered by one frame
		last  []byte
	}{
		{"opens of unknown fields", nil, whole(bytes.Repeat([]byte{0x7a, 0}, full/2))},
		{"an open that is half there", nil, announced(64, make([]byte, 63))},
		{"hellos of empty offers", [][]byte{open}, whole(body(2, empty))},
		{"hellos of empty offers, of their size", [][]byte{open}, whole(body(2, empty[:60<<10]))},
		{"hellos that are half there", [][]byte{open}, announced(64<<10, make([]byte, 64<<10-1))},
		{"challenges of empty asks", [][]byte{mutual}, whole(body(3, bytes.Repeat([]byte{0x12, 0}, 30<<10)))},
		{"challenges that are half there", [][]byte{mutual}, announced(64<<10, make([]byte, 64<<10-1))},
		{"verdicts out of turn", [][]byte{open}, whole(body(5, make([]byte, 60<<10)))},
		{"evidence of empty items", [][]byte{open, hello}, whole(body(4, empty))},
		{"evidence of empty values", [][]byte{open, hello}, whole(item(values))},
		{"evidence with an empty log", [][]byte{open, hello}, whole(item(log))},
		{"evidence that is half there", [][]byte{open, hello}, announced(atls.MaxFrame, make([]byte, atls.MaxFrame-1))},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var peak atomic.Uint64
			ctx, cancel := context.WithCancel(t.Context())
			var watch, all sync.WaitGroup
			watch.Go(func() {
				tick := time.NewTicker(5 * time.Millisecond)
				defer tick.Stop()
				for ctx.Err() == nil {
					peak.Store(max(peak.Load(), residentOf(pid)))
					<-tick.C
				}
			})
			var arrived atomic.Int64
			sent := make(chan struct{}, defaultMaxUnattested)
			dialing := make(chan struct{}, 32)
			for range defaultMaxUnattested {
				all.Go(func() {
					dialing <- struct{}{}
					c, err := w.encrypted()
					<-dialing
					if err != nil {
						sent <- struct{}{}
						return
					}
					defer c.Close()
					if w.hostile(c, tt.steps, tt.last) {
						arrived.Add(1)
					}
					sent <- struct{}{}
					<-ctx.Done()
				})
			}
			for range defaultMaxUnattested {
				<-sent
			}
			w.honest(1)
			cancel()
			all.Wait()
			watch.Wait()
			t.Logf("%d of %d got to their frame; at most %d MiB resident", arrived.Load(), defaultMaxUnattested, peak.Load()>>20)
			if peak.Load() > floodLimit {
				t.Errorf("%d MiB", peak.Load()>>20)
			}
			if arrived.Load() < defaultMaxUnattested/2 {
				t.Errorf("only %d got to their frame", arrived.Load())
			}
		})
	}
}

// hostile takes the steps, each of which is answered, and then sends the last frame.
func (w *world) hostile(c *tls.Conn, steps [][]byte, last []byte) bool {
	for _, s := range steps {
		if _, err := c.Write(s); err != nil {
			return false
		}
		var head [4]byte
		if _, err := io.ReadFull(c, head[:]); err != nil {
			return false
		}
		if _, err := io.CopyN(io.Discard, c, int64(binary.BigEndian.Uint32(head[:]))); err != nil {
			return false
		}
	}
	_, _ = c.Write(last) // the service may hang up in the middle
	return true
}
