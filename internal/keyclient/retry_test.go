package keyclient

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/atls"
	"github.com/keyagent/keyagent/internal/failure"
)

// tries is a client that never waits, and notes for how long it would have.
func tries(budget time.Duration) (*Client, *[]time.Duration) {
	var pauses []time.Duration
	c := &Client{
		retry:    Retry{Budget: budget, First: 100 * time.Millisecond, Max: time.Second},
		log:      slog.New(slog.DiscardHandler),
		progress: func(string, time.Duration) {},
	}
	c.wait = func(ctx context.Context, d time.Duration) error {
		pauses = append(pauses, d)
		if len(pauses) > 20 {
			return context.DeadlineExceeded
		}
		return ctx.Err()
	}
	return c, &pauses
}

func TestOnlyWhatAnotherTryCanChangeIsTriedAgain(t *testing.T) {
	for _, tt := range []struct {
		name  string
		err   error
		again bool
		class failure.Class
		waits string // for what, if not for the key service
	}{
		{"a service that is not there", failure.New(failure.Unreachable, errors.New("refused"), ""), true, failure.Unreachable, ""},
		{"a connection that broke", errors.New("broken pipe"), true, failure.Unreachable, ""},
		{"a verifier's own fault", &atls.Refusal{Class: atls.RefusedByFault}, true, failure.Unreachable, ""},
		{"a certificate that is not valid yet, as a wrong clock sees it", fmt.Errorf("x: %w", atls.ErrCertificateTime), true, failure.ServerUntrusted, "this machine's clock"},
		{"evidence that was refused", &atls.Refusal{Class: atls.RefusedEvidence, CorrelationID: "ID"}, false, failure.EvidenceRefused, ""},
		{"an exchange that was refused", &atls.Refusal{Class: atls.RefusedExchange}, false, failure.EvidenceRefused, ""},
		{"evidence that lacks what a vendor says", &atls.Refusal{Class: atls.RefusedUnendorsed}, true, failure.Unreachable, ""},
		{"a server whose vendor has an outage", fmt.Errorf("x: %w", attestation.ErrUnendorsed), true, failure.Unreachable, ""},
		{"a denied volume", failure.New(failure.PolicyDenied, errors.New("no"), ""), false, failure.PolicyDenied, ""},
		{"a server with another key", atls.ErrServerUntrusted, false, failure.ServerUntrusted, ""},
		{"a server that cannot attest itself", atls.ErrPeerUnattested, false, failure.ServerUntrusted, ""},
		{"a TPM whose driver is late", attestation.ErrNoDevice, true, failure.NoDevice, "this machine's evidence"},
		{"a TPM that is not the pinned one", fmt.Errorf("x: %w", attestation.ErrLocal), false, failure.NoDevice, ""},
		{"a volume that another node has", failure.New(failure.Held, errors.New("held"), ""), false, failure.Held, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, pauses := tries(time.Minute)
			var log bytes.Buffer
			c.log = slog.New(slog.NewTextHandler(&log, nil))
			status := ""
			c.progress = func(text string, _ time.Duration) { status = text }
			err := c.try(t.Context(), func(context.Context) error { return classify(tt.err) })
			if failure.Of(err).Class != tt.class {
				t.Errorf("class %q, want %q (%v)", failure.Of(err).Class, tt.class, err)
			}
			if (len(*pauses) > 0) != tt.again {
				t.Errorf("tried again %d times", len(*pauses))
			}
			// The log and the unit's status name the side that is waited for, and no other.
			if want := "waiting for " + cmp.Or(tt.waits, "the key service"); tt.again &&
				(!strings.HasPrefix(status, want) || !strings.Contains(log.String(), want) || strings.Contains(log.String(), "did not answer")) {
				t.Errorf("status %q, log %q, want %q", status, log.String(), want)
			}
		})
	}
}

func TestPausesGrowAndAreJittered(t *testing.T) {
	c, pauses := tries(time.Minute)
	_ = c.try(t.Context(), func(context.Context) error {
		return failure.New(failure.Unreachable, errors.New("no"), "")
	})
	limit := 100 * time.Millisecond
	for i, d := range *pauses {
		if d < limit/2 || d > limit {
			t.Errorf("pause %d is %s, want between %s and %s", i, d, limit/2, limit)
		}
		limit = min(2*limit, time.Second)
	}
}

func TestACallerWhoGivesUpIsNotToldOfABudget(t *testing.T) {
	c, _ := tries(time.Minute)
	ctx, cancel := context.WithCancel(t.Context())
	err := c.try(ctx, func(context.Context) error {
		cancel()
		return failure.New(failure.Unreachable, errors.New("no"), "")
	})
	if !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
}
