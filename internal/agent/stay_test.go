package agent

import (
	"context"
	"io/fs"
	"log/slog"
	"net"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/measured"
	"github.com/keyagent/keyagent/internal/node"
	"github.com/keyagent/keyagent/systemd"
)

// unit is where systemd would listen.
func unit(t *testing.T) *net.UnixConn {
	t.Helper()
	path := filepath.Join(t.TempDir(), "notify")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	t.Setenv("NOTIFY_SOCKET", path)
	t.Setenv("WATCHDOG_USEC", "")
	return l
}

func heard(t *testing.T, l *net.UnixConn) string {
	t.Helper()
	if err := l.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 4096)
	n, err := l.Read(b)
	if err != nil {
		t.Fatal(err)
	}
	return string(b[:n])
}

// One volume is refused for good: the agent ends if it is the only one, or if what else is
// open has no lease. It stays where it alone renews a lease, and the unit's status says
// what is wrong.
func TestARefusedVolumeDoesNotEndTheRenewals(t *testing.T) {
	for name, tt := range map[string]struct {
		change func(*Volumes, *entry)
		stays  bool
	}{
		"another is open": {func(*Volumes, *entry) {}, true},
		"another is suspended, which waits for its lease": {func(_ *Volumes, e *entry) { e.condition.state = Suspended }, true},
		"nothing else is open":                            {func(_ *Volumes, e *entry) { e.condition.state = Failed }, false},
		"what is open has no lease, and a verdict":        {func(_ *Volumes, e *entry) { e.lease = nil }, true},
		"what is open has a key of its own":               {func(_ *Volumes, e *entry) { e.lease, e.spec.Kind = nil, node.Swap }, false},
		"what is open belongs to another node":            {func(_ *Volumes, e *entry) { e.lease.lost = true }, false},
		"another is being opened":                         {func(_ *Volumes, e *entry) { e.condition.state = Opening }, true},
		"what is open is from the initrd, and not proved": {func(_ *Volumes, e *entry) { e.known.Initrd = true }, true},
	} {
		t.Run(name, func(t *testing.T) {
			l := unit(t)
			c, e := holding(t, &scriptedLeases{}, true, time.Minute)
			tt.change(c, e)
			// There is no register: final, before anything is asked.
			cfg := &node.Config{Volumes: []node.Volume{{ID: "refused", Name: "ka-test-refused", Device: "/dev/keyagent-none", Measure: true}}}
			a := New(cfg, c, slog.New(slog.DiscardHandler), systemd.NewNotifier())
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			end := make(chan error, 1)
			go func() { end <- a.boot(ctx, ctx) }()
			said := heard(t, l)
			if !strings.Contains(said, `STATUS=failed, no attestation device: volume "refused"`) || strings.Contains(said, "READY=1") != tt.stays {
				t.Errorf("systemd hears %q", said)
			}
			if tt.stays {
				cancel()
			}
			if err := <-end; (err == nil) != tt.stays || err != nil && failure.Of(err).Class != failure.NoDevice {
				t.Errorf("it ended with %v", err)
			}
		})
	}
}

// What failed in a way that may pass is tried again by an agent that stays, each ten
// seconds; a refusal is not, nor what another node has taken.
func TestAVolumeThatMayOpenIsTriedAgain(t *testing.T) {
	for name, tt := range map[string]struct {
		state       State
		err         error
		fenced      bool
		soon, later bool
	}{
		"its disk gave an error":       {Failed, failure.Newf(failure.DeviceBusy, "", "x"), false, false, true},
		"another node had it":          {Failed, failure.Newf(failure.Held, "", "x"), false, false, true},
		"its register was not there":   {Failed, failure.New(failure.NoDevice, measured.ErrNoRegister, ""), false, false, true},
		"another volume was not there": {Failed, blockedBy("y"), false, true, true},
		"it was refused":               {Failed, failure.Newf(failure.PolicyDenied, "", "x"), false, false, false},
		"it was cut off its disk":      {Failed, failure.Newf(failure.Held, "", "x"), true, false, false},
		"it is open":                   {Open, nil, false, false, false},
	} {
		c, e := holding(t, &scriptedLeases{}, false, time.Minute)
		e.condition.state, e.lastErr = tt.state, tt.err
		if tt.fenced {
			c.warn(e, "fence", "cut off")
		}
		if soon, later := c.mayOpen(e.spec.ID, false), c.mayOpen(e.spec.ID, true); soon != tt.soon || later != tt.later {
			t.Errorf("%s: soon %v, later %v", name, soon, later)
		}
	}
}

// The unit starts the agent again after just those errors that may pass.
func TestTheUnitStartsAgainWhatTheAgentEndsFor(t *testing.T) {
	text, err := fs.ReadFile(systemd.Units, "units/keyagent-agent.service")
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`(?m)^RestartPreventExitStatus=(.*)$`).FindStringSubmatch(string(text))
	if m == nil {
		t.Fatal("the unit starts everything again")
	}
	classes := []failure.Class{
		failure.Internal, failure.Usage, failure.Configuration, failure.Unreachable, failure.ServerUntrusted, failure.EvidenceRefused, failure.PolicyDenied,
		failure.WrongKey, failure.HeaderRefused, failure.DeviceBusy, failure.NotFound, failure.NotBlank, failure.NoDevice, failure.Tampered, failure.State,
		failure.Held, failure.NeedsRepair, failure.Revoked,
	}
	if len(classes) != failure.Classes() {
		t.Fatalf("%d of %d classes", len(classes), failure.Classes())
	}
	final := map[string]bool{}
	for _, code := range strings.Fields(m[1]) {
		final[code] = true
	}
	for _, class := range classes {
		err := failure.Newf(class, "", "x")
		if code := failure.ExitCode(class); final[strconv.Itoa(code)] == passes(err) {
			t.Errorf("%s, exit code %d: started again by the unit: %v, expected by the agent: %v", class, code, !final[strconv.Itoa(code)], passes(err))
		}
	}
}
