package nitro

import (
	"context"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"google.golang.org/protobuf/proto"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
)

// DefaultIndex is the NV index that messages are exchanged through. It is of the
// range for owners. Whatever it holds is removed.
const DefaultIndex tpm2.TPMHandle = 0x01805a00

// IssuerOptions configure [NewIssuer]. Unset fields take the stated default.
type IssuerOptions struct {
	// Open opens the instance's TPM, for each exchange. Its errors wrap
	// [attestation.ErrNoDevice] if there is none. Required.
	Open func() (transport.TPMCloser, error)
	// Index is the NV index to use. Default DefaultIndex.
	Index tpm2.TPMHandle
}

// Issuer makes evidence with the NitroTPM of this instance.
type Issuer struct {
	opts IssuerOptions
	turn chan struct{} // the index serves one exchange at a time
}

var _ attestation.Issuer = (*Issuer)(nil)

// NewIssuer returns an issuer. It does not touch the TPM.
func NewIssuer(opts IssuerOptions) (*Issuer, error) {
	if opts.Open == nil {
		return nil, errors.New("nitro issuer has no TPM")
	}
	if opts.Index == 0 {
		opts.Index = DefaultIndex
	}
	if opts.Index>>24 != 0x01 {
		return nil, fmt.Errorf("%#x is no NV index", uint32(opts.Index))
	}
	return &Issuer{opts: opts, turn: make(chan struct{}, 1)}, nil
}

// Kind implements attestation.Issuer.
func (*Issuer) Kind() attestation.Kind { return attestation.Nitro }

// Begin implements attestation.Issuer. A TPM that is not a NitroTPM is found out
// here, since other kinds of evidence may serve such a machine: the error wraps
// [attestation.ErrNoDevice].
func (i *Issuer) Begin(ctx context.Context) (attestation.Attempt, error) {
	return attempt{i}, i.with(ctx, isNitro)
}

// with takes the TPM for as long as f works, and never while a peer is waited for.
func (i *Issuer) with(ctx context.Context, f func(transport.TPM) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	select {
	case i.turn <- struct{}{}:
		defer func() { <-i.turn }()
	case <-ctx.Done():
		return fmt.Errorf("wait for the TPM, which another exchange has: %w", ctx.Err())
	}
	t, err := i.opts.Open()
	if err != nil {
		return err
	}
	return errors.Join(f(t), t.Close())
}

type attempt struct{ issuer *Issuer }

// Offer implements attestation.Attempt.
func (attempt) Offer() []byte { return nil }

// Evidence implements attestation.Attempt.
func (a attempt) Evidence(ctx context.Context, ask []byte, binder attestation.Binder) ([]byte, error) {
	if len(ask) > 0 {
		return nil, errors.New("verifier asks for more than an attestation document")
	}
	var document []byte
	if err := a.issuer.with(ctx, func(t transport.TPM) (err error) {
		document, err = attest(t, a.issuer.opts.Index, binder)
		return err
	}); err != nil {
		return nil, fmt.Errorf("NitroTPM: %w", err)
	}
	return proto.Marshal(&attestv1.NitroEvidence{Document: document})
}

// Close implements attestation.Attempt.
func (attempt) Close() error { return nil }

// isNitro asks for the vendor command among those that the TPM knows.
func isNitro(t transport.TPM) error {
	rsp, err := tpm2.GetCapability{Capability: tpm2.TPMCapCommands, Property: uint32(nsmRequest), PropertyCount: 1}.Execute(t)
	if err != nil {
		return fmt.Errorf("ask the TPM for its commands: %w", err)
	}
	list, err := rsp.CapabilityData.Data.Command()
	if err != nil {
		return fmt.Errorf("ask the TPM for its commands: %w", err)
	}
	// Bits 0 to 15 are the command's index, bit 29 says that it is the vendor's.
	for _, attributes := range list.CommandAttributes {
		if attributes.CommandIndex == uint16(nsmRequest&0xFFFF) && attributes.V {
			return nil
		}
	}
	return fmt.Errorf("%w: this TPM is not a NitroTPM, or not one that attests", attestation.ErrNoDevice)
}
