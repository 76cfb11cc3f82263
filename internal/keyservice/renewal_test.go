package keyservice

import (
	"context"
	"log/slog"
	"testing"
	"time"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/internal/keyclient"
)

// Case 84: who needs a key for longer than the verdict holds has it renewed first.
func TestAVerdictIsRenewedForWhoNeedsItLonger(t *testing.T) {
	w := newWorld(t)
	client, err := keyclient.New(keyclient.Options{
		Servers: []keyclient.Server{{Address: w.at(), Name: "127.0.0.1", Roots: w.pki.Pool()}},
		Issuers: func(context.Context) ([]attestation.Issuer, error) { return []attestation.Issuer{w.issuer}, nil },
		Log:     slog.New(slog.DiscardHandler), Node: "node-1",
	})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	defer client.Hold()()
	until := func(left time.Duration) time.Time {
		t.Helper()
		k, err := client.GetKey(t.Context(), keyclient.Request{Volume: "data-1", Format: true, Left: left})
		if err != nil {
			t.Fatal(err)
		}
		defer k.Close()
		return k.Expires
	}
	first := until(0)
	if again := until(50 * time.Minute); !again.Equal(first) {
		t.Errorf("renewed although it held for long enough: %s, before %s", again, first)
	}
	if renewed := until(2 * time.Hour); !renewed.After(first) {
		t.Errorf("not renewed: %s, before %s", renewed, first)
	}
}
