package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"testing"
	"time"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/atls"
	"github.com/keyagent/keyagent/internal/failure"
)

// tries is a client with endpoints whose answers are scripted: one function for
// each, called once a round.
func tries(budget time.Duration, endpoints int) (*Client, *[]time.Duration) {
	var pauses []time.Duration
	c := &Client{
		retry: RetryConfig{budget: budget, first: 100 * time.Millisecond, max: time.Second},
		log:   slog.New(slog.DiscardHandler),
	}
	for i := range endpoints {
		c.endpoints = append(c.endpoints, &endpoint{address: fmt.Sprint("endpoint-", i)})
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
	}{
		{"a service that is not there", failure.New(failure.Unreachable, errors.New("refused"), ""), true, failure.Unreachable},
		{"a connection that broke", errors.New("broken pipe"), true, failure.Unreachable},
		{"a verifier's own fault", &atls.Refusal{Class: "verifier's fault"}, true, failure.Unreachable},
		{"a certificate that is not valid yet, as a wrong clock sees it", fmt.Errorf("x: %w", atls.ErrCertificateTime), true, failure.ServerUntrusted},
		{"evidence that was refused", &atls.Refusal{Class: "evidence refused", CorrelationID: "ID"}, false, failure.EvidenceRefused},
		{"evidence that lacks what a vendor says", &atls.Refusal{Class: "endorsements missing"}, true, failure.Unreachable},
		{"a server whose vendor has an outage", fmt.Errorf("x: %w", attestation.ErrUnendorsed), true, failure.Unreachable},
		{"a denied volume", failure.New(failure.PolicyDenied, errors.New("no"), ""), false, failure.PolicyDenied},
		{"a server with another key", atls.ErrServerUntrusted, false, failure.ServerUntrusted},
		{"a server that cannot attest itself", atls.ErrPeerUnattested, false, failure.ServerUntrusted},
		{"a machine without a TPM", attestation.ErrNoDevice, false, failure.NoDevice},
		{"a TPM that is not the pinned one", fmt.Errorf("x: %w", attestation.ErrLocal), false, failure.NoDevice},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, pauses := tries(time.Minute, 1)
			err := c.try(t.Context(), func(context.Context, *endpoint) error { return classify(tt.err) })
			if failure.Of(err).Class != tt.class {
				t.Errorf("class %q, want %q (%v)", failure.Of(err).Class, tt.class, err)
			}
			if (len(*pauses) > 0) != tt.again {
				t.Errorf("tried again %d times", len(*pauses))
			}
		})
	}
}

func TestPausesGrowAndAreJittered(t *testing.T) {
	c, pauses := tries(time.Minute, 1)
	_ = c.try(t.Context(), func(context.Context, *endpoint) error {
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

func TestTheNextEndpointIsAskedWhenOneDoesNotAnswer(t *testing.T) {
	c, pauses := tries(time.Minute, 3)
	var asked []string
	f := func(_ context.Context, e *endpoint) error {
		asked = append(asked, e.address)
		if e.address == "endpoint-1" {
			return nil
		}
		return failure.New(failure.Unreachable, errors.New("down"), "")
	}
	for range 2 {
		if err := c.try(t.Context(), f); err != nil {
			t.Fatal(err)
		}
	}
	if got := fmt.Sprint(asked); got != "[endpoint-0 endpoint-1 endpoint-1]" || len(*pauses) != 0 {
		t.Fatalf("asked %s with %d pauses", got, len(*pauses))
	}
	// A refusal is an answer: nobody else is asked to overrule it.
	asked = nil
	err := c.try(t.Context(), func(_ context.Context, e *endpoint) error {
		asked = append(asked, e.address)
		return failure.New(failure.PolicyDenied, errors.New("no"), "")
	})
	if failure.Of(err).Class != failure.PolicyDenied || len(asked) != 1 {
		t.Fatalf("%v, asked %v", err, asked)
	}
}

func TestAServerThatIsNotTrustedIsNamedBeforeOneThatIsDown(t *testing.T) {
	c, _ := tries(time.Minute, 2)
	err := c.try(t.Context(), func(_ context.Context, e *endpoint) error {
		if e.address == "endpoint-0" {
			return failure.New(failure.Unreachable, errors.New("down"), "")
		}
		return classify(atls.ErrServerUntrusted)
	})
	if failure.Of(err).Class != failure.ServerUntrusted {
		t.Fatal(err)
	}
}

func TestOneBadEndpointDoesNotStopTheRetriesOfAGoodOne(t *testing.T) {
	c, pauses := tries(time.Minute, 2)
	round := 0
	err := c.try(t.Context(), func(_ context.Context, e *endpoint) error {
		if e.address == "endpoint-0" {
			return classify(atls.ErrServerUntrusted)
		}
		if round++; round < 3 {
			return failure.New(failure.Unreachable, errors.New("restarting"), "")
		}
		return nil
	})
	if err != nil || len(*pauses) != 2 {
		t.Fatalf("%v after %d pauses", err, len(*pauses))
	}
}

func TestACallerWhoGivesUpIsNotToldOfABudget(t *testing.T) {
	c, _ := tries(time.Minute, 1)
	ctx, cancel := context.WithCancel(t.Context())
	err := c.try(ctx, func(context.Context, *endpoint) error {
		cancel()
		return failure.New(failure.Unreachable, errors.New("no"), "")
	})
	if !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
}
