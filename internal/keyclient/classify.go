package keyclient

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"syscall"
	"time"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/atls"
	"github.com/keyagent/keyagent/internal/failure"
)

// errLate marks hardware that is missing now and may appear: a TPM whose driver is
// still probing is waited for as disks are.
var errLate = errors.New("not there yet")

// classify gives errors of a handshake their class.
func classify(err error) error {
	var refusal *atls.Refusal
	var classed *failure.Error
	switch {
	case err == nil || errors.As(err, &classed):
		return err
	case errors.As(err, &refusal):
		return refused(refusal, err)
	case errors.Is(err, atls.ErrCertificateTime):
		return failure.New(failure.ServerUntrusted, fmt.Errorf("%w; this machine's clock says %s", err, time.Now().UTC().Format(time.RFC3339)), "check the clock, then the server's certificate")
	case errors.Is(err, attestation.ErrUnendorsed):
		return failure.New(failure.Unreachable, err, "vendor collateral for the server's hardware is not available now; see endorsements in the configuration")
	case errors.Is(err, atls.ErrServerUntrusted), errors.Is(err, attestation.ErrRefused), errors.Is(err, atls.ErrPeerUnattested):
		return failure.New(failure.ServerUntrusted, err, "is this the right server? see servers in the configuration")
	case errors.Is(err, attestation.ErrNoDevice), errors.Is(err, attestation.ErrLocal):
		return noDevice(err)
	case errors.Is(err, atls.ErrConfiguration), errors.Is(err, atls.ErrNoEvidence):
		return failure.New(failure.Configuration, err, "")
	case errors.Is(err, context.Canceled):
		return err
	default:
		return failure.New(failure.Unreachable, err, "")
	}
}

// refused tells a decision on this machine's evidence from a verifier that cannot
// decide at the moment.
func refused(r *atls.Refusal, err error) error {
	class := failure.Unreachable
	switch r.Class {
	case atls.RefusedEvidence, atls.RefusedExchange:
		class = failure.EvidenceRefused
	}
	return &failure.Error{Class: class, CorrelationID: r.CorrelationID, Err: err,
		Hint: "the key service's log has the details under this correlation id"}
}

// noDevice marks a device node that does not exist: its driver may be late.
func noDevice(err error) error {
	const hint = "keyagent evidence shows what this machine can prove"
	if errors.Is(err, attestation.ErrNoDevice) || errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENXIO) || errors.Is(err, syscall.ENODEV) {
		err = fmt.Errorf("%w (%w)", err, errLate)
	}
	return failure.New(failure.NoDevice, err, hint)
}

// isAnswer reports that a trusted key service decided: another endpoint of it
// would say the same.
func isAnswer(err error) bool {
	switch failure.Of(err).Class {
	case failure.Unreachable, failure.ServerUntrusted, failure.Internal, failure.NoDevice:
		return false
	}
	return true
}

// withContext says which endpoint an error is of.
func withContext(err error, address string) error {
	f := failure.Of(err)
	return &failure.Error{Class: f.Class, CorrelationID: f.CorrelationID, Hint: f.Hint, Err: fmt.Errorf("key service %s: %w", address, err)}
}

// worst keeps the error that a person most needs to see: a server that is not
// trusted before one that is not there.
func worst(errs []error) error {
	for _, err := range errs {
		if failure.Of(err).Class != failure.Unreachable {
			return err
		}
	}
	return errs[0]
}
