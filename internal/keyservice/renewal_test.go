package keyservice

import (
	"context"
	"log/slog"
	"sync/atomic"
	"testing"
	"time"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/keyclient"
	"github.com/keyagent/keyagent/internal/wire"
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

// A machine that shuts down has measured that, and no profile accepts it any more. What it
// holds goes back all the same, on a session from before. If the service started again
// meanwhile, there is another one.
func TestALeaseGoesBackFromAMachineThatChanged(t *testing.T) {
	w := newWorld(t)
	w.cfg.Listen = w.at()
	var attested atomic.Int64
	client, err := keyclient.New(keyclient.Options{
		Servers: []keyclient.Server{{Address: w.at(), Name: "127.0.0.1", Roots: w.pki.Pool()}},
		Issuers: func(context.Context) ([]attestation.Issuer, error) {
			attested.Add(1)
			return []attestation.Issuer{w.issuer}, nil
		},
		Log: slog.New(slog.DiscardHandler), Node: "node-1",
	})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	k, err := client.GetKey(t.Context(), keyclient.Request{Volume: "data-1", Format: true})
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	if _, err := client.BeginFormat(t.Context(), k, keyclient.MACs{Header: [32]byte{1}, Copies: [2][32]byte{{2}, {3}}}); err != nil {
		t.Fatal(err)
	}
	if err := client.HeaderStands(t.Context(), k); err != nil {
		t.Fatal(err)
	}
	keep := func(want int64) {
		t.Helper()
		if err := client.KeepSession(t.Context(), time.Minute); err != nil {
			t.Fatal(err)
		}
		if got := attested.Load(); got != want {
			t.Errorf("attested %d times, want %d", got, want)
		}
	}
	keep(2)
	keep(2)
	w.restart()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for attested.Load() == 2 && ctx.Err() == nil {
		// That the other side has gone is noticed a moment later.
		_ = client.KeepSession(ctx, time.Minute)
	}
	keep(3)
	w.extend(4)
	if err := client.Release(t.Context(), k.Volume, k.Lease.ID); err != nil {
		t.Errorf("the lease stays: %v", err)
	}
	w.restart()
	for failure.Of(client.KeepSession(ctx, time.Minute)).Class != failure.EvidenceRefused && ctx.Err() == nil {
	}
	if ctx.Err() != nil {
		t.Error("a machine that changed is not refused")
	}
}

// Case 83: a renewal that is silent ends, and leaves the verdict as it is.
func TestASilentRenewalEnds(t *testing.T) {
	w := newWorld(t)
	w.server.service.renewal = 200 * time.Millisecond
	m := w.machine()
	if _, _, err := w.get(m, "data-1", formatOp); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	stream, err := m.Reattest(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&attestv1.Frame{Body: &attestv1.Frame_Open{Open: &attestv1.Open{Version: 1, HasEvidence: true}}}); err != nil {
		t.Fatal(err)
	}
	for err == nil {
		_, err = stream.Recv()
	}
	if ctx.Err() != nil {
		t.Error("it did not end")
	}
	if _, _, err := w.get(m, "data-1", formatOp); err != nil {
		t.Errorf("the verdict ended: %v", err)
	}
}

// Cases 80 and 83: what no honest machine sends is refused before it is decoded, and
// ends the verdict.
func TestARenewalOfEmptyPiecesEndsTheVerdict(t *testing.T) {
	w := newWorld(t)
	m := w.machine()
	if _, _, err := w.get(m, "data-1", formatOp); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	stream, err := m.Reattest(ctx)
	if err != nil {
		t.Fatal(err)
	}
	hello := &attestv1.Hello{Offers: make([]*attestv1.Item, wire.MaxFields)}
	for i := range hello.Offers {
		hello.Offers[i] = &attestv1.Item{}
	}
	for _, f := range []*attestv1.Frame{
		{Body: &attestv1.Frame_Open{Open: &attestv1.Open{Version: 1, HasEvidence: true}}}, {Body: &attestv1.Frame_Hello{Hello: hello}},
	} {
		if err := stream.Send(f); err != nil {
			t.Fatal(err)
		}
	}
	for err == nil {
		_, err = stream.Recv()
	}
	if ctx.Err() != nil {
		t.Error("it did not end")
	}
	_, _, err = w.get(m, "data-1", formatOp)
	wantClass(t, err, failure.EvidenceRefused)
}
