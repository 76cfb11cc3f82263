package keyservicev1

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"testing"
)

func fill(b byte, n int) []byte { return bytes.Repeat([]byte{b}, n) }

func response() *GetKeyResponse {
	return &GetKeyResponse{
		State: VolumeState_VOLUME_STATE_ACTIVE, Generation: 3, KeyVersion: 4, LuksUuid: "11111111-2222-3333-4444-555555555555",
		HeaderMac: fill(0x11, 32), Protocol: 2, CopyMacs: [][]byte{fill(0x22, 32), fill(0x33, 32)}, Writers: Writers_WRITERS_ONE,
		Lease: &Lease{Id: fill(0xbb, 16), TermMs: 120_000, Bound: true}, Attempt: fill(0xaa, 16),
	}
}

func grant() *OfflineGrant {
	return &OfflineGrant{Limits: &OfflineLimits{ForMs: 86_400_000, Boots: 3}, Pcrs: []uint32{4, 11}, PcrDigest: fill(0xcc, 32)}
}

// The digests were computed a second time, from the specification, by another
// program.
func TestWhatIsSealedHasItsVectors(t *testing.T) {
	for name, tt := range map[string]struct {
		change func(*GetKeyResponse)
		want   string
	}{
		"with a lease": {func(*GetKeyResponse) {}, "5754edfa496bd856e7a84a1800f0b480287b6f5238b78dfa631188a9a6251b24"},
		"offline":      {func(r *GetKeyResponse) { r.Offline = grant() }, "313428d8a9aba87bf4b32ee7fe49f46e8cba488ebb5b0878020cf57e7690db3c"},
		"without one":  {func(r *GetKeyResponse) { r.Lease = nil }, "b28b0db19afbd045b967ff629134c5fe55af8acf9e418881c869eb13876cb4da"},
	} {
		r := response()
		tt.change(r)
		sum := sha256.Sum256(SealInfo("data-1", Operation_OPERATION_OPEN, r))
		if got := hex.EncodeToString(sum[:]); got != tt.want {
			t.Errorf("%s: %s", name, got)
		}
	}
}

// Case 31: no field of an answer can be changed under the sealed key, the version of
// the protocol among them.
func TestEveryFieldOfAnAnswerIsSealed(t *testing.T) {
	info := func(r *GetKeyResponse) string { return string(SealInfo("data-1", Operation_OPERATION_OPEN, r)) }
	seen := map[string]string{info(response()): "the answer"}
	for name, change := range map[string]func(*GetKeyResponse){
		"state":            func(r *GetKeyResponse) { r.State++ },
		"generation":       func(r *GetKeyResponse) { r.Generation++ },
		"key version":      func(r *GetKeyResponse) { r.KeyVersion++ },
		"uuid":             func(r *GetKeyResponse) { r.LuksUuid = "x" },
		"header mac":       func(r *GetKeyResponse) { r.HeaderMac = nil },
		"older protocol":   func(r *GetKeyResponse) { r.Protocol = 1 },
		"no protocol":      func(r *GetKeyResponse) { r.Protocol, r.Generation = 0, 9 },
		"later protocol":   func(r *GetKeyResponse) { r.Protocol = 3 },
		"no copies":        func(r *GetKeyResponse) { r.CopyMacs = nil },
		"one copy":         func(r *GetKeyResponse) { r.CopyMacs = r.CopyMacs[:1] },
		"copies exchanged": func(r *GetKeyResponse) { r.CopyMacs[0], r.CopyMacs[1] = r.CopyMacs[1], r.CopyMacs[0] },
		"copies as one":    func(r *GetKeyResponse) { r.CopyMacs = [][]byte{append(r.CopyMacs[0], r.CopyMacs[1]...)} },
		"writers":          func(r *GetKeyResponse) { r.Writers++ },
		"no lease":         func(r *GetKeyResponse) { r.Lease = nil },
		"an empty lease":   func(r *GetKeyResponse) { r.Lease = &Lease{} },
		"lease id":         func(r *GetKeyResponse) { r.Lease.Id = fill(1, 16) },
		"lease term":       func(r *GetKeyResponse) { r.Lease.TermMs++ },
		"lease unbound":    func(r *GetKeyResponse) { r.Lease.Bound = false },
		"attempt":          func(r *GetKeyResponse) { r.Attempt = nil },
		"offline":          func(r *GetKeyResponse) { r.Offline = grant() },
		"offline, empty":   func(r *GetKeyResponse) { r.Offline = &OfflineGrant{} },
		"offline for":      func(r *GetKeyResponse) { r.Offline = grant(); r.Offline.Limits.ForMs++ },
		"offline boots":    func(r *GetKeyResponse) { r.Offline = grant(); r.Offline.Limits.Boots++ },
		"offline pcrs":     func(r *GetKeyResponse) { r.Offline = grant(); r.Offline.Pcrs = r.Offline.Pcrs[1:] },
		"offline digest":   func(r *GetKeyResponse) { r.Offline = grant(); r.Offline.PcrDigest = nil },
	} {
		r := response()
		change(r)
		if other, ok := seen[info(r)]; ok {
			t.Errorf("%s says the same as %s", name, other)
		}
		seen[info(r)] = name
	}
	// What is not of the answer's meaning is not in it.
	r := response()
	r.CorrelationId, r.SealedDek, r.OfflineRefused = "x", []byte("y"), "z"
	if info(r) != info(response()) {
		t.Error("the correlation ID is sealed")
	}
	// A field that is added later must be sealed, or be named here.
	// The checkpoint has a signature of its own, by a key that the node keeps.
	if n := (&GetKeyResponse{}).ProtoReflect().Descriptor().Fields().Len(); n != 14+3 {
		t.Errorf("the answer has %d fields: seal the new one", n)
	}
	if n := (&Lease{}).ProtoReflect().Descriptor().Fields().Len(); n != 3 {
		t.Errorf("a lease has %d fields: seal the new one", n)
	}
}
