package keyclient

import (
	"context"
	"log/slog"
	"testing"

	"google.golang.org/grpc"

	keyservicev1 "github.com/keyagent/keyagent/api/keyagent/keyservice/v1"
	"github.com/keyagent/keyagent/internal/failure"
)

// forger is a key service that shows a checkpoint which nobody signed.
type forger struct {
	keyservicev1.KeyServiceClient
}

func (forger) GetKey(context.Context, *keyservicev1.GetKeyRequest, ...grpc.CallOption) (*keyservicev1.GetKeyResponse, error) {
	return &keyservicev1.GetKeyResponse{Checkpoint: []byte("keyagent-audit-00\n1\nAAAA\n"), CheckpointKey: make([]byte, 32)}, nil
}

// Case 104: the node looks itself, and takes no key from a service whose log is not what it
// was.
func TestAKeyComesWithACheckpointOrNotAtAll(t *testing.T) {
	c, err := New(Options{Servers: []Server{{Address: "127.0.0.1:1"}}, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	c.keys.connect = func(context.Context, *endpoint) (*session, error) {
		s := connected(t)
		s.service = forger{}
		return s, nil
	}
	if _, err := c.GetKey(t.Context(), Request{Volume: "data-1"}); failure.Of(err).Class != failure.Tampered {
		t.Errorf("got %v", err)
	}
}
