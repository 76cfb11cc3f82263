package proof

import (
	"bytes"
	"encoding/hex"
	"errors"
	"testing"

	"github.com/keyagent/keyagent/internal/secret"
)

func fill(b byte, n int) []byte { return bytes.Repeat([]byte{b}, n) }

func counting(n int) []byte {
	out := make([]byte, n)
	for i := range out {
		out[i] = byte(i)
	}
	return out
}

func good() Input {
	return Input{
		Volume: "data-1", Generation: 1, Binder: counting(64), Step: Begin, Attempt: fill(0xaa, 16),
		HeaderMAC: fill(0x11, 32), CopyMACs: [][]byte{fill(0x22, 32), fill(0x33, 32)},
	}
}

func key(t testing.TB, b []byte) *secret.Bytes {
	t.Helper()
	k, err := secret.From(b)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.Close() })
	return k
}

// The vectors were computed a second time, from the specification, by another
// program. They stand in docs/spec/volume-record.md.
func TestTheProofHasItsVectors(t *testing.T) {
	dek := key(t, counting(32))
	for step, want := range map[string]string{
		Begin:        "c932f6641beac2e846aa9d370c178b5cb9834c2473412d75874c98378b7e3b6d",
		Stands:       "7e7a1c3d9749fcceeef2ad90268c0a7b864e0b377e2b61f60d9b9e007c7e6a29",
		RotateBegin:  "e9385ac30f5d2a3da3fc96b89b54d9e2688d37ce2ff19242b312e67e24861ca9",
		RotateStands: "d15442d56145a5d7eb80fa2e06214b6dbfa494b00690c4b893a90416d7f06a0d",
		RotateDone:   "76fb799371b7e3170808b184dda3dd01e421f5ce196e3e01cc2713bb08cf3d6b",
	} {
		in := good()
		in.Step = step
		got, err := Of(dek, in)
		if err != nil || hex.EncodeToString(got[:]) != want {
			t.Errorf("%s: %x, %v", step, got, err)
		}
		if ok, err := Verify(dek, in, got[:]); err != nil || !ok {
			t.Errorf("%s: it does not verify: %v", step, err)
		}
	}
}

// Case 47: a proof is worth nothing for anything else.
func TestAProofIsOfOneThingOnly(t *testing.T) {
	dek := key(t, counting(32))
	proof, err := Of(dek, good())
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*Input){
		"another volume":      func(i *Input) { i.Volume = "data-2" },
		"another generation":  func(i *Input) { i.Generation = 2 },
		"another connection":  func(i *Input) { i.Binder = fill(1, 64) },
		"another step":        func(i *Input) { i.Step = Stands },
		"another attempt":     func(i *Input) { i.Attempt = fill(0xab, 16) },
		"another header":      func(i *Input) { i.HeaderMAC = fill(0x12, 32) },
		"another first copy":  func(i *Input) { i.CopyMACs[0] = fill(0x12, 32) },
		"another second copy": func(i *Input) { i.CopyMACs[1] = fill(0x12, 32) },
		"copies exchanged":    func(i *Input) { i.CopyMACs[0], i.CopyMACs[1] = i.CopyMACs[1], i.CopyMACs[0] },
	} {
		in := good()
		change(&in)
		if ok, err := Verify(dek, in, proof[:]); ok || err != nil {
			t.Errorf("%s: %v, %v", name, ok, err)
		}
	}
	if ok, _ := Verify(key(t, fill(9, 32)), good(), proof[:]); ok {
		t.Error("another DEK")
	}
	for _, short := range [][]byte{nil, {}, proof[:31], append(proof[:], 0)} {
		if ok, _ := Verify(dek, good(), short); ok {
			t.Errorf("%d bytes", len(short))
		}
	}
}

// Case 47: what nobody filled in is proved by nobody.
func TestThereIsNoProofOfNothing(t *testing.T) {
	dek := key(t, counting(32))
	for name, change := range map[string]func(*Input){
		"no volume":            func(i *Input) { i.Volume = "" },
		"no generation":        func(i *Input) { i.Generation = 0 },
		"no binder":            func(i *Input) { i.Binder = nil },
		"a binder of zeros":    func(i *Input) { i.Binder = make([]byte, 64) },
		"no step":              func(i *Input) { i.Step = "" },
		"an unknown step":      func(i *Input) { i.Step = "ends" },
		"no attempt":           func(i *Input) { i.Attempt = nil },
		"an attempt of zeros":  func(i *Input) { i.Attempt = make([]byte, 16) },
		"a long attempt":       func(i *Input) { i.Attempt = fill(1, 17) },
		"no MAC":               func(i *Input) { i.HeaderMAC = nil },
		"a MAC of zeros":       func(i *Input) { i.HeaderMAC = make([]byte, 32) },
		"no copies":            func(i *Input) { i.CopyMACs = nil },
		"one copy":             func(i *Input) { i.CopyMACs = i.CopyMACs[:1] },
		"three copies":         func(i *Input) { i.CopyMACs = append(i.CopyMACs, fill(1, 32)) },
		"a copy's MAC is zero": func(i *Input) { i.CopyMACs[1] = make([]byte, 32) },
		"a copy's MAC is long": func(i *Input) { i.CopyMACs[0] = fill(1, 33) },
	} {
		in := good()
		change(&in)
		if _, err := Of(dek, in); !errors.Is(err, ErrInput) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
