package keyservice

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/keyagent/keyagent/attestation/atls"
	"github.com/keyagent/keyagent/internal/failure"
)

// Case 86: what strangers make the log say has a rate and a size, and says what it
// leaves out.
func TestStrangersDoNotFillTheLog(t *testing.T) {
	w := newWorld(t)
	clock := time.Now()
	w.server.strangers = newStrangers(func() time.Time { return clock })
	flood := func(n int) int {
		before := strings.Count(w.logged.String(), "attestation refused")
		for range n {
			w.server.observe(atls.Outcome{CorrelationID: "id", Remote: "remote", Err: errors.New(strings.Repeat("x", 1<<20))})
		}
		return strings.Count(w.logged.String(), "attestation refused") - before
	}
	if n := flood(1000); n != strangersBurst {
		t.Errorf("%d lines at once", n)
	}
	clock = clock.Add(time.Second)
	if n := flood(1000); n != strangersRate {
		t.Errorf("%d lines in the next second", n)
	}
	if !strings.Contains(w.logged.String(), "withheld=800") {
		t.Error("the log does not say what it left out")
	}
	if n := len(w.logged.String()); n > 2*maxErrorText*(strangersBurst+strangersRate) {
		t.Errorf("%d bytes", n)
	}
}

func TestMetricsOffThisMachineTakeAWord(t *testing.T) {
	w := newWorld(t)
	w.stop()
	cfg := *w.cfg
	cfg.Metrics = "0.0.0.0:0"
	_, err := NewServer(t.Context(), &cfg, w.server.log)
	wantClass(t, err, failure.Usage)
	path := filepath.Join(w.dir, "serve.yaml")
	text := "listen: 127.0.0.1:0\ntls: {certificate: server.pem, key: server.key}\npolicy: policy.yaml\nkms: x\nstorage: x\naudit: audit.log\nmetrics: 0.0.0.0:9000\n"
	for more, ok := range map[string]bool{"": false, "metrics_remote: true\n": true} {
		if err := os.WriteFile(path, []byte(text+more), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := LoadConfig(path, Config{}); (err == nil) != ok || err != nil && failure.Of(err).Class != failure.Configuration {
			t.Errorf("with %q: %v", more, err)
		}
	}
	cfg.MetricsRemote = true
	s, err := NewServer(t.Context(), &cfg, w.server.log)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}
