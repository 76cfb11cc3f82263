package keyservicev1

import "encoding/binary"

// SealInfo encodes everything that a sealed DEK stands for, unambiguously: each
// field behind its length as a 32-bit big-endian number. Both sides compute it;
// a response of which any part was changed does not open. Specified in
// docs/spec/attested-tls.md, section Sealing.
func SealInfo(volumeID string, op Operation, r *GetKeyResponse) []byte {
	u64 := func(n uint64) []byte { return binary.BigEndian.AppendUint64(nil, n) }
	var out []byte
	for _, field := range [][]byte{
		[]byte("keyagent sealed DEK v1"),
		[]byte(volumeID),
		u64(uint64(op)),
		u64(uint64(r.GetState())),
		u64(r.GetGeneration()),
		u64(uint64(r.GetKeyVersion())),
		[]byte(r.GetLuksUuid()),
		r.GetHeaderMac(),
	} {
		out = append(binary.BigEndian.AppendUint32(out, uint32(len(field))), field...)
	}
	return out
}
