package csiproxy

import (
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/keyagent/keyagent/internal/failure"
)

// ofAgent words an error of the agent for those who read the events of a pod. The code
// stays, except where Kubernetes means something else by it.
func ofAgent(err error) error {
	f := failure.FromStatus(err)
	text, hint := failure.Describe(f)
	if id := failure.Of(f).CorrelationID; id != "" {
		text += " (correlation ID " + id + ")"
	}
	if hint != "" {
		text += "; " + hint
	}
	code := status.Code(err)
	switch code {
	case codes.NotFound, codes.InvalidArgument:
		// The volume exists, and the caller asked well: for kubelet both would be its own
		// doing.
		code = codes.FailedPrecondition
	case codes.Unauthenticated, codes.PermissionDenied, codes.DataLoss:
		code = codes.FailedPrecondition
	}
	return status.Error(code, "keyagent: "+text)
}

// ofNode words an error of this node's own. One that has a code keeps it.
func ofNode(what string, err error) error {
	if _, ok := status.FromError(err); ok {
		return err
	}
	text, hint := failure.Describe(err)
	if hint != "" {
		text += "; " + hint
	}
	return status.Errorf(codes.Internal, "%s: %s", what, text)
}
