package keyservicev1

import "encoding/binary"

// Protocol is the version of this API that this program speaks: with attempts and
// leases. A caller or a service that says less is older.
const Protocol = 2

// VerdictHeader is in the header of each answer to a renewal that asks for a verdict, so that
// a refusal is told from the one of a service that does not know the question.
const VerdictHeader = "keyagent-verdict"

// SealInfo encodes everything that a sealed DEK stands for, unambiguously: each
// field behind its length as a 32-bit big-endian number. Both sides compute it;
// a response of which any part was changed does not open. Specified in
// docs/spec/attested-tls.md, section Sealing.
func SealInfo(volumeID string, op Operation, r *GetKeyResponse) []byte {
	label := "keyagent sealed DEK v1"
	if r.GetProtocol() >= Protocol {
		label = "keyagent sealed DEK v2"
	}
	out := sealField(nil,
		[]byte(label),
		[]byte(volumeID),
		u64(uint64(op)),
		u64(uint64(r.GetState())),
		u64(r.GetGeneration()),
		u64(uint64(r.GetKeyVersion())),
		[]byte(r.GetLuksUuid()),
		r.GetHeaderMac(),
	)
	if r.GetProtocol() < Protocol {
		return out
	}
	var lease []byte // empty where there is none
	if l := r.GetLease(); l != nil {
		bound := uint64(0)
		if l.GetBound() {
			bound = 1
		}
		lease = sealField(nil, l.GetId(), u64(l.GetTermMs()), u64(bound))
	}
	out = sealField(out,
		u64(uint64(r.GetProtocol())),
		sealField(nil, r.GetCopyMacs()...),
		u64(uint64(r.GetWriters())),
		lease,
		r.GetAttempt(),
	)
	if o := r.GetOffline(); o != nil {
		var pcrs []byte
		for _, n := range o.GetPcrs() {
			pcrs = append(pcrs, u64(uint64(n))...)
		}
		out = sealField(out, []byte("offline"),
			sealField(nil, u64(o.GetLimits().GetForMs()), u64(uint64(o.GetLimits().GetBoots())), pcrs, o.GetPcrDigest()))
	}
	return out
}

func u64(n uint64) []byte { return binary.BigEndian.AppendUint64(nil, n) }

func sealField(to []byte, fields ...[]byte) []byte {
	for _, f := range fields {
		to = append(binary.BigEndian.AppendUint32(to, uint32(len(f))), f...)
	}
	return to
}
