package keyservice

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/volume"
	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/storage"
)

// What goes to each backend is counted and timed, by classes from a closed set.
func TestEachBackendIsMeasured(t *testing.T) {
	w := newWorld(t)
	m := w.machine()
	if _, _, err := w.get(m, "data-1", formatOp); err != nil {
		t.Fatal(err)
	}
	_, _, _ = w.get(m, "data-2", openOp)
	seen := map[string]bool{}
	families, err := w.server.metrics.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != "keyagent_backend_seconds" {
			continue
		}
		for _, metric := range f.GetMetric() {
			labels := map[string]string{}
			for _, l := range metric.GetLabel() {
				labels[l.GetName()] = l.GetValue()
			}
			seen[labels["backend"]+" "+labels["operation"]+" "+labels["class"]] = metric.GetHistogram().GetSampleCount() > 0
		}
	}
	for _, want := range []string{
		"kms/cluster-kms generate ok", "kms/cluster-kms unwrap ok", "storage/file get ok", "storage/file get not found", "storage/file put ok", "storage/file list ok",
	} {
		if !seen[want] {
			t.Errorf("%q was not measured; there are %v", want, seen)
		}
	}
	if problems, err := testutil.GatherAndLint(w.server.metrics.registry); err != nil || len(problems) > 0 {
		t.Errorf("%v, %v", problems, err)
	}
}

// An operator learns what to mend; a node is told to try again where an operator, or
// another replica, may mend it.
func TestWhatABackendsErrorMeans(t *testing.T) {
	for _, tt := range []struct {
		err            error
		node, operator failure.Class
		label          string
	}{
		{kms.ErrThrottled, failure.Unreachable, failure.Unreachable, "throttled"},
		{kms.ErrUnavailable, failure.Unreachable, failure.Unreachable, "unavailable"},
		{kms.ErrCredentials, failure.Unreachable, failure.Unreachable, "credentials"},
		{storage.ErrDenied, failure.Unreachable, failure.Configuration, "denied"},
		{kms.ErrKEK, failure.Unreachable, failure.Configuration, "kek"},
		{storage.ErrNoBucket, failure.Unreachable, failure.Configuration, "no bucket"},
		{kms.ErrKEKVersion, failure.Unreachable, failure.WrongKey, "kek version"},
		{kms.ErrWrongKey, failure.WrongKey, failure.WrongKey, "wrong key"},
		{storage.ErrCorrupt, failure.Tampered, failure.Tampered, "corrupt"},
		{context.DeadlineExceeded, failure.Unreachable, failure.Unreachable, "unavailable"},
		{volume.ErrRollback, failure.Tampered, failure.Tampered, "other"},
	} {
		err := fmt.Errorf("some call: %w", tt.err)
		if got := failure.Of(classify(err)).Class; got != tt.node {
			t.Errorf("%v: a node learns %q", tt.err, got)
		}
		if got := failure.Of(forOperator(err)).Class; got != tt.operator {
			t.Errorf("%v: an operator learns %q", tt.err, got)
		}
		if got := backendLabel(err); got != tt.label {
			t.Errorf("%v: the label is %q", tt.err, got)
		}
	}
	if got := failure.Of(BackendError(errors.New("the bucket must be named"))).Class; got != failure.Configuration {
		t.Errorf("options that make no sense are %q", got)
	}
}
