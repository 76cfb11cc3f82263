package atls

import (
	"crypto/sha256"
	"crypto/sha512"
	"encoding/binary"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
)

// Domain strings. A change of any encoding below changes its version.
const (
	binderDomain    = "keyagent attested TLS binder v1"
	challengeDomain = "keyagent attested TLS challenge v1"
	exporterLabel   = "EXPORTER-keyagent-attestation-v1"
	exporterSize    = 32
)

// role of the attester: evidence of one role is never accepted for the other.
type role string

const (
	clientRole role = "client"
	serverRole role = "server"
)

func (r role) peer() role {
	if r == clientRole {
		return serverRole
	}
	return clientRole
}

// fields encodes byte strings unambiguously: each one behind its length as a
// 32-bit big-endian number.
type fields []byte

func (f fields) add(b []byte) fields {
	return append(binary.BigEndian.AppendUint32(f, uint32(len(b))), b...)
}

// exporterContext covers what was offered and what was asked.
func exporterContext(h *attestv1.Hello, c *attestv1.Challenge) []byte {
	f := fields(nil).add([]byte(challengeDomain)).add(h.GetHpkePublicKey()).add(c.GetNonce())
	for _, items := range [][]*attestv1.Item{h.GetOffers(), c.GetAsks()} {
		part := fields(nil)
		for _, i := range items {
			part = part.add([]byte(i.GetKind())).add(i.GetData())
		}
		f = f.add(part)
	}
	sum := sha256.Sum256(f)
	return sum[:]
}

// binderInput is what a binder is the SHA-512 digest of.
type binderInput struct {
	role       role
	exporter   []byte
	clientSPKI []byte
	serverSPKI []byte
	nonce      []byte
	hpkeKey    []byte
}

func (b binderInput) binder() attestation.Binder {
	return sha512.Sum512(fields(nil).
		add([]byte(binderDomain)).
		add([]byte(b.role)).
		add(b.exporter).
		add(b.clientSPKI).
		add(b.serverSPKI).
		add(b.nonce).
		add(b.hpkeKey))
}
