package tdx

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/google/go-configfs-tsm/configfs/configfsi"
	"google.golang.org/protobuf/proto"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/endorsement"
)

const (
	// DefaultDevice is the TDX guest driver's device.
	DefaultDevice = "/dev/tdx_guest"
	// DefaultEventLog is where the kernel shows the firmware's event log. Only
	// root may read it.
	DefaultEventLog = "/sys/firmware/acpi/tables/data/CCEL"
	// maxLogArea bounds the firmware's buffer, of which the log fills a part.
	maxLogArea = 4 << 20
)

// IssuerOptions configure [NewIssuer]. Unset fields take the stated default.
type IssuerOptions struct {
	// Endorsements is where collateral comes from. Nil: none is carried, and the
	// verifier must get it.
	Endorsements endorsement.Source
	// TSM is the configfs interface for reports. Default the kernel's.
	TSM configfsi.Client
	// Device is used where the kernel has no such interface. Default
	// DefaultDevice.
	Device string
	// EventLog is the path of the event log. Default DefaultEventLog. A file
	// that does not exist is left out; the verifier's policy decides.
	EventLog string
	// Log is told what is left out of evidence and why. Nil: nobody is.
	Log func(what string, err error)
}

func (o IssuerOptions) withDefaults() IssuerOptions {
	if o.Device == "" {
		o.Device = DefaultDevice
	}
	if o.EventLog == "" {
		o.EventLog = DefaultEventLog
	}
	if o.Log == nil {
		o.Log = func(string, error) {}
	}
	return o
}

// Issuer makes evidence with the TDX module of this machine.
type Issuer struct {
	opts IssuerOptions
}

var _ attestation.Issuer = (*Issuer)(nil)

// NewIssuer returns an issuer. It does not touch the hardware.
func NewIssuer(opts IssuerOptions) (*Issuer, error) {
	return &Issuer{opts.withDefaults()}, nil
}

// Kind implements attestation.Issuer.
func (*Issuer) Kind() attestation.Kind { return attestation.TDX }

// Begin implements attestation.Issuer. A machine that is no TD gives an error
// that wraps [attestation.ErrNoDevice].
func (i *Issuer) Begin(ctx context.Context) (attestation.Attempt, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	get, _, err := i.opts.detect()
	if err != nil {
		return nil, err
	}
	return &attempt{i.opts, get}, nil
}

type attempt struct {
	opts IssuerOptions
	get  quoter
}

// Offer implements attestation.Attempt: there is nothing to say before the ask.
func (*attempt) Offer() []byte { return nil }

// Close implements attestation.Attempt.
func (*attempt) Close() error { return nil }

// Evidence implements attestation.Attempt. Collateral that is not to be had is
// left out: the verifier may have it.
func (a *attempt) Evidence(ctx context.Context, ask []byte, binder attestation.Binder) ([]byte, error) {
	if len(ask) > 0 {
		return nil, fmt.Errorf("verifier asks in %d bytes, nothing can be asked of a TD", len(ask))
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	quote, err := a.get(binder)
	if err != nil {
		return nil, fmt.Errorf("quote: %w", err)
	}
	q, err := Parse(quote)
	if err != nil {
		return nil, fmt.Errorf("the machine's own quote: %v", err)
	}
	if q.ReportData != binder {
		return nil, errors.New("the machine's own quote covers other report data (hint: does something else use the same configfs entry?)")
	}
	ev := &attestv1.TDXEvidence{Quote: q.raw}
	if a.opts.Endorsements != nil {
		if ev.Collateral, err = Endorse(ctx, a.opts.Endorsements, quote); err != nil {
			a.opts.Log("tdx collateral", err)
		}
	}
	if ev.EventLog, err = readEventLog(a.opts.EventLog); err != nil {
		return nil, err
	}
	return proto.Marshal(ev)
}

// Endorse gets the collateral for a quote. What is not to be had is left out, and
// named in the error beside what was.
func Endorse(ctx context.Context, source endorsement.Source, quote []byte) (*attestv1.TDXCollateral, error) {
	requests, err := EndorsementRequests(quote)
	if err != nil {
		return nil, err
	}
	docs := make([]endorsement.Document, len(requests))
	var failed []error
	for n, r := range requests {
		if docs[n], err = source.Get(ctx, r); err != nil {
			docs[n] = endorsement.Document{}
			failed = append(failed, fmt.Errorf("%s: %w", docNames[n], err))
		}
	}
	c, err := collateralOf(docs)
	return c, errors.Join(append(failed, err)...)
}

func readEventLog(path string) ([]byte, error) {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("event log: %w", err)
	}
	defer f.Close()
	area, err := io.ReadAll(io.LimitReader(f, maxLogArea))
	if err != nil {
		return nil, fmt.Errorf("event log: %w", err)
	}
	log := trimEventLog(area)
	if len(log) > maxEventLog {
		return nil, fmt.Errorf("event log %s is larger than %d bytes", path, maxEventLog)
	}
	return log, nil
}
