// Package failure gives errors the few things that cross a process boundary: a
// class, a hint and a correlation ID. It maps them to gRPC statuses and to exit
// codes, each in one place.
package failure

import (
	"errors"
	"fmt"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
)

// Class is the kind of a failure. Its text stands in refusals, logs and
// metrics; the set is closed.
type Class string

// The classes. docs/exit-codes.md explains each to its reader.
const (
	Internal        Class = "internal error"
	Usage           Class = "usage"
	Configuration   Class = "configuration"
	Unreachable     Class = "service unreachable"
	ServerUntrusted Class = "server not trusted"
	EvidenceRefused Class = "evidence refused"
	PolicyDenied    Class = "policy denied"
	WrongKey        Class = "wrong key"
	HeaderRefused   Class = "header refused"
	DeviceBusy      Class = "device busy"
	NotFound        Class = "not found"
	NotBlank        Class = "device not blank"
	NoDevice        Class = "no attestation device"
	Tampered        Class = "record or log tampered"
	State           Class = "wrong state"
	Held            Class = "volume held"
	NeedsRepair     Class = "filesystem needs repair"
	Revoked         Class = "revoked"
)

// table is the one place that maps classes to numbers.
var table = map[Class]struct {
	exit int
	code codes.Code
}{
	Internal:        {1, codes.Internal},
	Usage:           {2, codes.InvalidArgument},
	Configuration:   {3, codes.FailedPrecondition},
	Unreachable:     {4, codes.Unavailable},
	ServerUntrusted: {5, codes.Unavailable},
	EvidenceRefused: {6, codes.Unauthenticated},
	PolicyDenied:    {7, codes.PermissionDenied},
	WrongKey:        {8, codes.DataLoss},
	HeaderRefused:   {9, codes.DataLoss},
	DeviceBusy:      {10, codes.FailedPrecondition},
	NotFound:        {11, codes.NotFound},
	NotBlank:        {12, codes.FailedPrecondition},
	NoDevice:        {13, codes.FailedPrecondition},
	Tampered:        {14, codes.DataLoss},
	State:           {15, codes.FailedPrecondition},
	Held:            {16, codes.FailedPrecondition},
	NeedsRepair:     {17, codes.DataLoss},
	Revoked:         {18, codes.PermissionDenied},
}

// before is what a keyagent that does not know a class is told in its place.
var before = map[Class]Class{Revoked: PolicyDenied}

// ExitCode returns the exit code of a class.
func ExitCode(c Class) int {
	if row, ok := table[c]; ok {
		return row.exit
	}
	return table[Internal].exit
}

// Error is an error with its class. Err may be nil if only the class crossed a
// boundary.
type Error struct {
	Class         Class
	CorrelationID string
	Hint          string
	Err           error
}

// New gives err a class and, if it is not empty, a hint. An err that has a
// class already keeps it.
func New(c Class, err error, hint string) error {
	var have *Error
	if err == nil || errors.As(err, &have) {
		return err
	}
	return &Error{Class: c, Hint: hint, Err: err}
}

// Newf is New with a formatted error.
func Newf(c Class, hint, format string, args ...any) error {
	return &Error{Class: c, Hint: hint, Err: fmt.Errorf(format, args...)}
}

// WithID adds a correlation ID to an error, which gets the class Internal if it
// has none.
func WithID(err error, id string) error {
	if err == nil {
		return nil
	}
	e := Of(err)
	if e.CorrelationID != "" {
		return err
	}
	return &Error{Class: e.Class, CorrelationID: id, Hint: e.Hint, Err: err}
}

func (e *Error) Error() string {
	if e.Err == nil {
		return string(e.Class)
	}
	return e.Err.Error()
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// RefusalClass is what a refused peer learns.
func (e *Error) RefusalClass() string { return string(e.Class) }

// Of returns the outermost class, hint and correlation ID of err.
func Of(err error) Error {
	var e *Error
	if errors.As(err, &e) {
		return *e
	}
	return Error{Class: Internal, Err: err}
}

// domain of the ErrorInfo in statuses.
const domain = "keyagent"

// Status turns err into a gRPC status error with its class, hint and
// correlation ID. The text is message, which the caller chose to show.
func Status(err error, message string) error {
	e := Of(err)
	info := func(c Class) *errdetails.ErrorInfo {
		return &errdetails.ErrorInfo{Reason: string(c), Domain: domain, Metadata: map[string]string{"correlation_id": e.CorrelationID, "hint": e.Hint}}
	}
	details := []protoadapt.MessageV1{info(e.Class)}
	if c, ok := before[e.Class]; ok {
		details = append(details, info(c)) // the first that is known counts
	}
	st, detailErr := status.New(table[e.Class].code, message).WithDetails(details...)
	if detailErr != nil {
		return status.Error(table[e.Class].code, message)
	}
	return st.Err()
}

// FromStatus turns a gRPC error back into one with a class. A status that a
// keyagent did not make is a failure of transport. Nil stays nil.
func FromStatus(err error) error {
	if err == nil {
		return nil
	}
	st, ok := status.FromError(err)
	if !ok {
		return err
	}
	for _, d := range st.Details() {
		info, ok := d.(*errdetails.ErrorInfo)
		if !ok || info.GetDomain() != domain {
			continue
		}
		if _, known := table[Class(info.GetReason())]; known {
			return &Error{
				Class: Class(info.GetReason()), CorrelationID: info.GetMetadata()["correlation_id"],
				Hint: info.GetMetadata()["hint"], Err: errors.New(st.Message()),
			}
		}
	}
	return &Error{Class: Unreachable, Err: errors.New(st.Message())}
}

// Classes returns how many classes there are.
func Classes() int { return len(table) }
