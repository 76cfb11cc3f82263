package wire

import (
	"bytes"
	"errors"
	"runtime"
	"testing"

	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
)

// nested puts data into field n of another message, for each n.
func nested(data []byte, numbers ...protowire.Number) []byte {
	for _, n := range numbers {
		data = protowire.AppendBytes(protowire.AppendTag(nil, n, protowire.BytesType), data)
	}
	return data
}

// Whatever a message is filled with, refusing it costs less than its own size.
func TestAMessageOfEmptyPiecesCostsNothing(t *testing.T) {
	const size = 1 << 20
	empty := bytes.Repeat([]byte{0x0a, 0}, size/2) // field 1, of length 0
	for name, tt := range map[string]struct {
		data []byte
		into proto.Message
	}{
		"offers of a hello":         {nested(empty, 2), &attestv1.Frame{}},
		"items of evidence":         {nested(empty, 4), &attestv1.Frame{}},
		"asks of a challenge":       {nested(bytes.Repeat([]byte{0x12, 0}, size/2), 3), &attestv1.Frame{}},
		"hellos of a frame":         {bytes.Repeat([]byte{0x12, 0}, size/2), &attestv1.Frame{}},
		"unknown fields":            {bytes.Repeat([]byte{0x7a, 0}, size/2), &attestv1.Frame{}},
		"fields of an item":         {nested(empty, 1, 2), &attestv1.Frame{}},
		"intermediates of an offer": {bytes.Repeat([]byte{0x22, 0}, size/2), &attestv1.TPMOffer{}},
		"values of registers":       {bytes.Repeat([]byte{0x1a, 0}, size/2), &attestv1.TPMEvidence{}},
		"registers, packed":         {nested(make([]byte, size), 4), &attestv1.TPMAsk{}},
		"registers, one by one":     {bytes.Repeat([]byte{0x20, 0}, size/2), &attestv1.TPMAsk{}},
		"a quote in an offer":       {nested(bytes.Repeat([]byte{0x22, 0}, size/2), 1), &attestv1.SVSMOffer{}},
	} {
		t.Run(name, func(t *testing.T) {
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			err := Unmarshal(tt.data, tt.into)
			runtime.ReadMemStats(&after)
			if !errors.Is(err, ErrFields) {
				t.Errorf("got %v", err)
			}
			if n := after.TotalAlloc - before.TotalAlloc; n > size/4 {
				t.Errorf("%d bytes allocated for %d", n, len(tt.data))
			}
		})
	}
}

func TestAnHonestMessageIsDecoded(t *testing.T) {
	want := &attestv1.SVSMEvidence{
		Snp: &attestv1.SNPEvidence{Report: make([]byte, 1184)},
		Tpm: &attestv1.TPMEvidence{PcrValues: make([][]byte, 24), EventLog: make([]byte, 512<<10)},
	}
	data, err := proto.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	got := &attestv1.SVSMEvidence{}
	if err := Unmarshal(data, got); err != nil || !proto.Equal(got, want) {
		t.Error(err)
	}
	if err := Unmarshal(data[:len(data)-1], got); err == nil || errors.Is(err, ErrFields) {
		t.Errorf("one byte short: %v", err)
	}
	ask := &attestv1.TPMAsk{Pcrs: []uint32{0, 1, 2, 3, 4, 7, 9, 11, 12, 13, 14}}
	if data, err = proto.Marshal(ask); err != nil {
		t.Fatal(err)
	}
	if err := Unmarshal(data, &attestv1.TPMAsk{}); err != nil {
		t.Error(err)
	}
}

func TestTheCodecCountsToo(t *testing.T) {
	into := &attestv1.Frame{}
	bad := mem.BufferSlice{mem.SliceBuffer(bytes.Repeat([]byte{0x12, 0}, MaxFields+1))}
	if err := Codec().Unmarshal(bad, into); !errors.Is(err, ErrFields) {
		t.Errorf("got %v", err)
	}
	out, err := Codec().Marshal(&attestv1.Frame{Body: &attestv1.Frame_Open{Open: &attestv1.Open{Version: 1}}})
	if err != nil {
		t.Fatal(err)
	}
	if err := Codec().Unmarshal(out, into); err != nil || into.GetOpen().GetVersion() != 1 {
		t.Errorf("%v, %v", into, err)
	}
}

// FuzzUnmarshal: what is decoded has no more fields than may be, and what the count
// refuses as malformed the decoder refuses too.
func FuzzUnmarshal(f *testing.F) {
	seed, err := proto.Marshal(&attestv1.Frame{Body: &attestv1.Frame_Challenge{Challenge: &attestv1.Challenge{
		Nonce: make([]byte, 32), Asks: []*attestv1.Item{{Kind: "tpm", Data: []byte{1}}},
	}}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(seed)
	f.Add(bytes.Repeat([]byte{0x0a, 0}, 300))
	f.Add(nested(nil, 1, 2, 3, 4, 1, 1, 1, 1, 1))
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, m := range []proto.Message{&attestv1.Frame{}, &attestv1.TPMAsk{}, &attestv1.AzureEvidence{}} {
			err := Unmarshal(data, m)
			if err != nil && !errors.Is(err, ErrFields) && proto.Unmarshal(data, m) == nil {
				t.Fatalf("%x: %v", data, err)
			}
			if again, marshalErr := proto.Marshal(m); err == nil && marshalErr == nil {
				if err := Check(again, m.ProtoReflect().Descriptor()); err != nil {
					t.Fatalf("%x: decoded, and then %v", data, err)
				}
			}
		}
	})
}
