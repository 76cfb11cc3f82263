package agent

import (
	"context"
	"errors"
	"log/slog"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/keyclient"
	"github.com/keyagent/keyagent/internal/measured"
	"github.com/keyagent/keyagent/internal/node"
)

// unasked is a key service that must not be asked.
type unasked struct {
	Keys
	t *testing.T
}

func (n unasked) GetKey(context.Context, keyclient.Request) (*keyclient.Key, error) {
	n.t.Error("the key service was asked")
	return nil, errors.New("must not be asked")
}

// A machine without a register hears it before the key service is asked, and before the
// disk is looked at.
func TestAVolumeThatCannotBeMeasuredIsNotOpened(t *testing.T) {
	for name, register := range map[string]measured.Register{
		"none is wired": nil, "no device": &measured.TPM{Device: filepath.Join(t.TempDir(), "tpm")},
	} {
		c := NewVolumes(Options{Keys: unasked{t: t}, Log: slog.New(slog.DiscardHandler), StateDir: t.TempDir(), Register: register})
		v := node.Volume{ID: "data", Device: "/dev/keyagent-none", Measure: true}
		got, err := c.Open(t.Context(), v, Intent{NoWait: true})
		if f := failure.Of(err); !errors.Is(err, measured.ErrNoRegister) || f.Class != failure.NoDevice || f.Hint == "" || got.State != Failed {
			t.Errorf("%s: %v, the volume is %s", name, err, got.State)
		}
	}
}

// late is a register that is there after some looks.
type late struct {
	measured.None
	looks int
}

func (l *late) Ready(ctx context.Context) error {
	if l.looks--; l.looks < 0 {
		return nil
	}
	return l.None.Ready(ctx)
}

// A TPM whose driver loads late is waited for, and not for ever; an optional volume, which
// nobody waits for, does not wait.
func TestALateRegisterIsWaitedFor(t *testing.T) {
	for _, tt := range []struct {
		looks  int
		noWait bool
		after  time.Duration
		ok     bool
	}{{0, false, 0, true}, {30, false, 3 * time.Second, true}, {1 << 20, false, time.Minute, false}, {1, true, 0, false}} {
		synctest.Test(t, func(t *testing.T) {
			began := time.Now()
			c := NewVolumes(Options{Log: slog.New(slog.DiscardHandler), Register: &late{looks: tt.looks}, AppearWait: time.Minute})
			o := &opening{Volumes: c, v: node.Volume{Measure: true}, intent: Intent{NoWait: tt.noWait}}
			err := o.measurable(t.Context())
			if took := time.Since(began); took != tt.after || (err == nil) != tt.ok {
				t.Errorf("%+v: after %s: %v", tt, took, err)
			}
		})
	}
}

// What was remembered says which mapping was measured. One that was made since is
// another.
func TestAMappingIsMeasuredOnce(t *testing.T) {
	for _, tt := range []struct {
		measure            bool
		sequence, measured uint64
		want               bool
	}{{false, 7, 0, true}, {true, 7, 7, true}, {true, 7, 0, false}, {true, 8, 7, false}} {
		o := &opening{v: node.Volume{Measure: tt.measure}}
		if got := o.isMeasured(remembered{Sequence: tt.sequence, Measured: tt.measured}); got != tt.want {
			t.Errorf("%+v: %v", tt, got)
		}
	}
}
