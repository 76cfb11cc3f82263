package tpm

import (
	"bytes"
	"context"
	"crypto"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"path/filepath"
	"testing"

	"github.com/google/go-tpm-tools/proto/attest"
	pb "github.com/google/go-tpm-tools/proto/tpm"
	"github.com/google/go-tpm-tools/server"
	"github.com/google/go-tpm-tools/simulator"
	legacy "github.com/google/go-tpm/legacy/tpm2"
	"github.com/google/go-tpm/tpm2"
	"google.golang.org/protobuf/proto"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/test/sim/swtpm"
)

// Google's tools are a second opinion: their simulator is Microsoft's reference code,
// which shares nothing with swtpm, and their verifier shares nothing with ours.

// simulated serves the simulator, of which a process has one, as a device.
func simulated(t *testing.T) *swtpm.TPM {
	t.Helper()
	sim, err := simulator.Get()
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(t.TempDir(), "tpm")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan struct{})
	go func() {
		defer close(served)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			serve(c, sim)
		}
	}()
	t.Cleanup(func() { l.Close(); <-served; sim.Close() })
	return &swtpm.TPM{Device: "unix:" + socket}
}

// serve passes whole commands and whole responses.
func serve(c net.Conn, sim io.ReadWriter) {
	defer c.Close()
	head, response := make([]byte, 10), make([]byte, 8192)
	for {
		if _, err := io.ReadFull(c, head); err != nil {
			return
		}
		command := append(bytes.Clone(head), make([]byte, binary.BigEndian.Uint32(head[2:])-10)...)
		if _, err := io.ReadFull(c, command[10:]); err != nil {
			return
		}
		if _, err := sim.Write(command); err != nil {
			return
		}
		n, err := sim.Read(response)
		if err != nil {
			return
		}
		if _, err := c.Write(response[:n]); err != nil {
			return
		}
	}
}

// opinions are those of the two verifiers on one piece of evidence.
func opinions(t *testing.T, offer *attestv1.TPMOffer, e *attestv1.TPMEvidence, pcrs []uint32, binder attestation.Binder) (ours, theirs error) {
	t.Helper()
	ak, err := ParseAK(offer.GetAkPublic())
	if err != nil {
		t.Fatal(err)
	}
	quoted, ours := VerifyQuote(e, ak.Key, binder, pcrs)
	for _, m := range quoted.Measurements {
		// Theirs refuses what ours only leaves without an explanation.
		if m.Unexplained != "" && ours == nil {
			ours = errors.New(m.Unexplained)
		}
	}
	values := map[uint32][]byte{}
	for i, v := range e.GetPcrValues() {
		values[pcrs[i]] = v
	}
	nonce := sha256.Sum256(binder[:])
	_, theirs = server.VerifyAttestation(&attest.Attestation{
		AkPub:    offer.GetAkPublic(),
		EventLog: e.GetEventLog(),
		Quotes: []*pb.Quote{{
			Quote: e.GetAttest(), RawSig: e.GetSignature(),
			Pcrs: &pb.PCRs{Hash: pb.HashAlgo_SHA256, Pcrs: values},
		}},
	}, server.VerifyOpts{Nonce: nonce[:], TrustedAKs: []crypto.PublicKey{ak.Key}, HashAlgo: legacy.AlgSHA256, AllowEFIAppBeforeCallingEvent: true, AllowEmptySBVar: true})
	return ours, theirs
}

// simulatedBoot replays the fixture's boot into the simulator, and has our verifier
// accept it, which knows its endorsement key.
func simulatedBoot(t *testing.T, events []rawEvent, values map[uint32][]byte, pcrs []uint32) (*attestv1.TPMOffer, *attestv1.TPMEvidence) {
	t.Helper()
	p := simulated(t)
	replayInto(t, p, events)
	ctx := context.Background()
	a := must[attestation.Attempt](t)(newIssuer(t, p, IssuerOptions{EventLog: "testdata/ovmf.eventlog"}).Begin(ctx))
	defer a.Close()
	offer, e := &attestv1.TPMOffer{}, &attestv1.TPMEvidence{}
	if err := proto.Unmarshal(a.Offer(), offer); err != nil {
		t.Fatal(err)
	}
	ek := must[*tpm2.TPMTPublic](t)(tpm2.Unmarshal[tpm2.TPMTPublic](offer.GetEkPublic()))
	digest := must[string](t)(EKDigest(must[crypto.PublicKey](t)(tpm2.Pub(*ek))))
	v := newVerifier(t, Trust{Enrolled: []Enrolled{{"simulator", digest}}, PCRs: pcrs})
	q := must[attestation.Question](t)(v.Begin(ctx, a.Offer()))
	evidence := must[[]byte](t)(a.Evidence(ctx, q.Ask(), testBinder))
	claims, err := q.Verify(ctx, evidence, testBinder)
	if err != nil {
		t.Fatalf("our verifier refuses Microsoft's TPM: %v", err)
	}
	if got := claims[0].Measurements["pcr7"].Value; !bytes.Equal(got, values[7]) {
		t.Errorf("pcr7 is %x, want %x", got, values[7])
	}
	if err := proto.Unmarshal(evidence, e); err != nil {
		t.Fatal(err)
	}
	return offer, e
}

func TestGooglesSimulatorAndVerifierAgreeWithUs(t *testing.T) {
	log, values := genuineLog(t)
	_, events := split(t, log)
	pcrs := []uint32{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 14}
	offer, e := simulatedBoot(t, events, values, pcrs)
	other := testBinder
	other[0] ^= 1
	for name, change := range map[string]func(e *attestv1.TPMEvidence, b *attestation.Binder){
		"as it is":               nil,
		"another connection":     func(_ *attestv1.TPMEvidence, b *attestation.Binder) { *b = other },
		"a bit of the quote":     func(e *attestv1.TPMEvidence, _ *attestation.Binder) { e.Attest[len(e.Attest)-1] ^= 1 },
		"the quote's magic":      func(e *attestv1.TPMEvidence, _ *attestation.Binder) { e.Attest[0] ^= 1 },
		"a bit of the signature": func(e *attestv1.TPMEvidence, _ *attestation.Binder) { e.Signature[len(e.Signature)-1] ^= 1 },
		"a PCR's value":          func(e *attestv1.TPMEvidence, _ *attestation.Binder) { e.PcrValues[7][0] ^= 1 },
		"two PCRs exchanged": func(e *attestv1.TPMEvidence, _ *attestation.Binder) {
			e.PcrValues[0], e.PcrValues[7] = e.PcrValues[7], e.PcrValues[0]
		},
		"a digest of the log":      func(e *attestv1.TPMEvidence, _ *attestation.Binder) { flipDigest(t, e, events) },
		"no signature":             func(e *attestv1.TPMEvidence, _ *attestation.Binder) { e.Signature = nil },
		"a value that is too much": func(e *attestv1.TPMEvidence, _ *attestation.Binder) { e.PcrValues[3] = append(e.PcrValues[3], 0) },
	} {
		t.Run(name, func(t *testing.T) {
			changed, binder := proto.Clone(e).(*attestv1.TPMEvidence), testBinder
			if change != nil {
				change(changed, &binder)
			}
			ours, theirs := opinions(t, offer, changed, pcrs, binder)
			if (ours == nil) != (change == nil) || (theirs == nil) != (change == nil) {
				t.Errorf("we say %v, they say %v", ours, theirs)
			}
		})
	}
}

// flipDigest changes the digest of the first event of PCR 7 where it stands in the log.
func flipDigest(t *testing.T, e *attestv1.TPMEvidence, events []rawEvent) {
	t.Helper()
	for _, ev := range events {
		if at := bytes.Index(e.EventLog, ev.digest); ev.pcr == 7 && at >= 0 {
			e.EventLog[at] ^= 1
			return
		}
	}
	t.Fatal("the log has no event of PCR 7")
}
