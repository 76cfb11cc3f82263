//go:build umlguest

package disks

import (
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// A volume that is refused does not end the agent that renews another one's lease. Status
// shows which one is wrong, and SIGTERM ends the agent as it does otherwise.
func TestDiskARefusedVolumeLeavesOthersTheirLeases(t *testing.T) {
	m := first(t)
	removed(t, "x-stays", "nobodys")
	m.configure(t, "{id: nobodys, device: "+disk(t, diskSize)+", format: true}", "{id: x-stays, device: "+disk(t, diskSize)+", format: true}")
	a := m.start(t)
	a.waitFor(t, "the agent stays for the leases")
	before := m.leaseUntil(t, "x-stays")
	for deadline := time.Now().Add(time.Minute); m.leaseUntil(t, "x-stays") == before; time.Sleep(time.Second) {
		if time.Now().After(deadline) {
			t.Fatalf("the lease is not renewed:\n%s", tail(a.log.String()))
		}
	}
	out := must[[]byte](t)(m.command("status", "--socket", filepath.Join(m.dir, "agent.sock")).CombinedOutput())
	if !regexp.MustCompile(`(?m)^x-stays +open`).Match(out) || !regexp.MustCompile(`(?m)^nobodys +failed`).Match(out) || !strings.Contains(string(out), "policy denied") {
		t.Errorf("status:\n%s", out)
	}
	m.must(t, "close", "x-stays")
	a.terminate(t)
}
