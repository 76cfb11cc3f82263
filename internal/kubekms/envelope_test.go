package kubekms

import (
	"bytes"
	"errors"
	"log/slog"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	"k8s.io/kms/apis/v2"
)

func TestAnEnvelopeOpensOnlyAsItWasSealed(t *testing.T) {
	k := counting(t, 32)
	blob, err := k.seal(purposeV2, []byte("0123456789abcdef0123456789abcdef"))
	if err != nil {
		t.Fatal(err)
	}
	for i := range blob {
		for _, bit := range []byte{1, 0x80} {
			changed := bytes.Clone(blob)
			changed[i] ^= bit
			if plain, err := k.open(purposeV2, changed); !errors.Is(err, ErrDecrypt) || plain != nil {
				t.Fatalf("byte %d changed: %q, %v", i, plain, err)
			}
		}
	}
	for n := range blob {
		if _, err := k.open(purposeV2, blob[:n]); !errors.Is(err, ErrDecrypt) {
			t.Fatalf("cut to %d bytes: %v", n, err)
		}
	}
	if _, err := k.open(purposeV2, append(bytes.Clone(blob), 0)); !errors.Is(err, ErrDecrypt) {
		t.Errorf("with one byte more: %v", err)
	}
	if _, err := counting(t, 16).open(purposeV2, blob); !errors.Is(err, ErrDecrypt) {
		t.Errorf("under another KEK: %v", err)
	}
	again, err := k.seal(purposeV2, []byte("0123456789abcdef0123456789abcdef"))
	if err != nil || bytes.Equal(blob, again) || bytes.Equal(blob[17:33], again[17:33]) {
		t.Errorf("two messages share their salt: %v", err)
	}
}

// TestIVOnlyAndEmptyCiphertexts: the daemon of 2018 panicked (case 44).
func TestIVOnlyAndEmptyCiphertexts(t *testing.T) {
	keys := []*key{counting(t, 32)}
	iv := strings.Repeat("i", 16)
	var first string
	for _, blob := range []string{"", ":ck:aescbc:v1", legacyPrefix, legacyPrefix + "short", legacyPrefix + iv,
		legacyPrefix + iv + "not a block", legacyPrefix + iv + strings.Repeat("b", 17), legacyPrefix + iv + strings.Repeat("b", 16)} {
		plain, err := openLegacy(keys, []byte(blob))
		if !errors.Is(err, ErrDecrypt) || plain != nil {
			t.Errorf("%q: %q, %v", blob, plain, err)
			continue
		}
		if first == "" {
			first = err.Error()
		}
		if err.Error() != first {
			t.Errorf("%q has an error of its own: %v", blob, err)
		}
	}
}

// TestAPaddingOracleIsNotThere asks about every last byte of a block before the last,
// as the attack does: the answers to all wrong paddings are one.
func TestAPaddingOracleIsNotThere(t *testing.T) {
	k := counting(t, 32)
	blob, err := k.sealLegacy([]byte("0123456789abcdef0123456789abcdef"))
	if err != nil {
		t.Fatal(err)
	}
	valid := 0
	for b := range 256 {
		changed := bytes.Clone(blob)
		changed[len(changed)-17] = byte(b)
		plain, err := openLegacy([]*key{k}, changed)
		switch {
		case err == nil:
			valid++ // a right padding gives a plaintext: the format has no more to offer
		case err != ErrDecrypt || plain != nil:
			t.Fatalf("%d: %q, %v", b, plain, err)
		}
	}
	if valid == 0 || valid > 2 {
		t.Errorf("%d of 256 paddings are right", valid)
	}
}

func TestPaddingsFitExactly(t *testing.T) {
	for pad := range 256 {
		block := bytes.Repeat([]byte{byte(pad)}, 16)
		if want := pad >= 1 && pad <= 16; (paddingFits(block) == 1) != want {
			t.Errorf("a block of %d: %d", pad, paddingFits(block))
		}
		for i := range 16 {
			changed := bytes.Clone(block)
			changed[i] ^= 1
			inside := i >= 16-pad
			if pad >= 1 && pad <= 16 && i < 15 && (paddingFits(changed) == 1) == inside {
				t.Errorf("a padding of %d with byte %d changed: %d", pad, i, paddingFits(changed))
			}
		}
	}
}

// TestAmongSeveralKEKsThe2018FormatFindsItsOwn: it does not say which it is under.
func TestAmongSeveralKEKsThe2018FormatFindsItsOwn(t *testing.T) {
	keys := []*key{counting(t, 16), counting(t, 24), counting(t, 32)}
	wrong := 0
	for i := range 3000 {
		own := keys[i%3]
		plain := "0123456789abcdef0123456789abcdef"
		blob, err := own.sealLegacy([]byte(plain))
		if err != nil {
			t.Fatal(err)
		}
		if got, err := openLegacy(keys, blob); err != nil || string(got) != plain {
			t.Fatalf("a key of kube-apiserver: %q, %v", got, err)
		}
		blob, err = own.sealLegacy([]byte("odd"))
		if err != nil {
			t.Fatal(err)
		}
		switch got, err := openLegacy(keys, blob); {
		case errors.Is(err, ErrDecrypt):
			wrong++ // two paddings are right by chance: it is not guessed
		case err != nil || string(got) != "odd":
			t.Fatalf("%q, %v", got, err)
		}
	}
	if wrong > 100 {
		t.Errorf("%d of 3000 are ambiguous", wrong)
	}
}

func FuzzEnvelope(f *testing.F) {
	k := counting(f, 32)
	good, _ := k.seal(purposeV2, []byte("0123456789abcdef0123456789abcdef"))
	f.Add(good)
	f.Add(good[:61])
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, blob []byte) {
		plain, err := k.open(purposeV2, blob)
		// Each process of the fuzzer seals anew.
		if err == nil && string(plain) != "0123456789abcdef0123456789abcdef" {
			t.Errorf("a forged envelope opens: %x", plain)
		}
		if err != nil && !errors.Is(err, ErrDecrypt) {
			t.Error(err)
		}
	})
}

func FuzzLegacy(f *testing.F) {
	keys := []*key{counting(f, 32), counting(f, 16)}
	good, _ := keys[0].sealLegacy([]byte("0123456789abcdef"))
	f.Add(good)
	f.Add(good[:len(legacyPrefix)+16])
	f.Add([]byte(legacyPrefix))
	f.Fuzz(func(t *testing.T, blob []byte) {
		plain, err := openLegacy(keys, blob)
		if err != nil && !errors.Is(err, ErrDecrypt) {
			t.Error(err)
		}
		if err == nil && (len(plain) >= len(blob)-len(legacyPrefix)-16 || !isLegacy(blob)) {
			t.Errorf("%d bytes give %d", len(blob), len(plain))
		}
	})
}

// FuzzAnnotations decodes requests as they come in.
func FuzzAnnotations(f *testing.F) {
	r := ringOf(f, AESGCM, kekA)
	good, id, err := r.encrypt(purposeV2, []byte(kekB))
	if err != nil {
		f.Fatal(err)
	}
	s := &serviceV2{requests: &requests{ring: r, log: slog.New(slog.DiscardHandler)}}
	for _, annotations := range []map[string][]byte{nil, {"": nil}, {"a.example": []byte("x")}} {
		wire, err := proto.Marshal(&v2.DecryptRequest{Ciphertext: good, KeyId: id, Uid: "u", Annotations: annotations})
		if err != nil {
			f.Fatal(err)
		}
		f.Add(wire)
	}
	f.Fuzz(func(t *testing.T, wire []byte) {
		var req v2.DecryptRequest
		if proto.Unmarshal(wire, &req) != nil {
			return
		}
		resp, err := s.Decrypt(t.Context(), &req)
		if err == nil && (len(req.GetAnnotations()) != 0 || req.GetKeyId() != id || string(resp.GetPlaintext()) != kekB) {
			t.Errorf("%v is answered", &req)
		}
	})
}
