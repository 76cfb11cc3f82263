//go:build linux && amd64

package e2e

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/keyagent/keyagent/internal/lab"
)

// nodeScript is what the node does once it is up, the same in each boot.
const nodeScript = `
systemctl show keyagent-agent.service -p ActiveState -p Result -p ExecMainStatus | sed 's/^/E2E unit /'
echo "E2E emergency $(systemctl is-active emergency.service) $(systemctl is-active rescue.service)"
echo "E2E mappings $(dmsetup ls)"
echo "E2E findmnt $(findmnt -n -r -o SOURCE,FSTYPE,OPTIONS /data)"
journalctl -b -o cat --no-pager -u keyagent-agent.service
if systemctl is-active --quiet keyagent-agent.service; then
	echo "E2E namespaces $(readlink /proc/1/ns/mnt) $(readlink /proc/$(systemctl show -P MainPID keyagent-agent.service)/ns/mnt)"
	keyagent status --output json
	setpriv --reuid=65534 --regid=65534 --clear-groups keyagent status
	echo "E2E another uid: exit code $?"
	if [ -f /data/hello ]; then
		echo "E2E read: $(cat /data/hello)"
	else
		echo "written by the first boot" >/data/hello
		echo "E2E wrote: $(cat /data/hello)"
	fi
	systemctl restart keyagent-agent.service
	echo "E2E restarted: $(systemctl is-active keyagent-agent.service) $(cat /data/hello)"
else
	[ -e /dev/mapper/data ] && echo "E2E the mapping exists"
	[ -e /data/hello ] && echo "E2E the file can be read"
	exit 3
fi
`

// Shows 1 and 17: a node formats, opens again, and with one word more on the
// kernel command line is refused, under systemd and with our unit.
func TestAMeasuredNodeUnlocksItsDisk(t *testing.T) {
	n := newNode(t, commandLine("e2e"))
	esp := n.path("expected.esp")

	t.Log("first boot: the disk is blank")
	first := n.boot(t, esp, n.root(t, nodeScript))
	wantStatus(t, first, 0)
	opened(t, first)
	wantLines(t, first, "E2E wrote: written by the first boot", `"step":"formatted"`, `"step":"filesystem"`, `"step":"confirmed"`)

	t.Log("second boot: the disk holds a volume")
	second := n.boot(t, esp, n.root(t, nodeScript+unitScript, n.serveFiles(t)...))
	wantStatus(t, second, 0)
	opened(t, second)
	unitsHold(t, second)
	wantLines(t, second, "E2E read: written by the first boot")
	if hasLine(second, `"step":"formatted"`) {
		complain(t, "the second boot has formatted")
	}

	t.Log("third boot: one word more on the kernel command line")
	before := digest(t, n.disk)
	_, changed := n.image(t, "changed", commandLine("e2e", "init.debug"))
	third := n.boot(t, changed, n.root(t, nodeScript))
	wantStatus(t, third, 3)
	if after := digest(t, n.disk); after != before {
		complain(t, "the refused node has changed its disk")
	}
	n.refused(t, third)
	for i, g := range []*lab.Guest{first, second, third} {
		logTimeline(t, i+1, g)
	}
	_, err := n.service.Run(t.Context(), "audit", "verify", n.service.AuditLog())
	must(t, err)
}

// opened asserts what holds in each boot that opens the volume.
func opened(t *testing.T, g *lab.Guest) {
	t.Helper()
	wantLines(t, g,
		"E2E unit ActiveState=active", "E2E unit Result=success", "E2E unit ExecMainStatus=0",
		"E2E findmnt /dev/mapper/data ext4 rw,nosuid,nodev",
		"does callers in the agent's configuration name this user", "E2E another uid: exit code 4",
		"E2E restarted: active written by the first boot")
	var namespaces []string
	for _, l := range g.Lines() {
		if _, rest, ok := strings.Cut(l.Text, "E2E namespaces "); ok {
			namespaces = strings.Fields(rest)
		}
	}
	if len(namespaces) != 2 || namespaces[0] != namespaces[1] {
		complain(t, "the unit must share the machine's mount namespace, they are %q", namespaces)
	}
	if v := statusOf(t, g); v.ID != "data" || v.State != "mounted" || v.Mount != "/data" || v.Generation == 0 {
		complain(t, "keyagent status says %+v", v)
	}
}

type volumeStatus struct {
	ID         string
	State      string
	Mount      string `json:"mount_point"`
	UUID       string `json:"luks_uuid"`
	Generation uint64
}

// statusOf reads the JSON that keyagent status printed.
func statusOf(t *testing.T, g *lab.Guest) volumeStatus {
	t.Helper()
	var text strings.Builder
	inside := false
	for _, l := range g.Lines() {
		inside = inside || l.Text == "["
		if inside {
			text.WriteString(l.Text)
		}
		if l.Text == "]" {
			break
		}
	}
	var all []volumeStatus
	if err := json.Unmarshal([]byte(text.String()), &all); err != nil || len(all) != 1 {
		t.Fatalf("keyagent status --output json: %v: %q", err, text.String())
	}
	return all[0]
}

// refused asserts that the unit failed visibly, and that both sides can explain
// why, each as far as it may.
func (n *node) refused(t *testing.T, g *lab.Guest) {
	t.Helper()
	wantLines(t, g, "E2E unit ActiveState=failed", "E2E unit Result=exit-code", "E2E unit ExecMainStatus=6",
		"E2E emergency inactive inactive",
		"E2E mappings No devices found", "evidence refused")
	for _, text := range []string{"E2E the mapping exists", "E2E the file can be read", "E2E findmnt /"} {
		if hasLine(g, text) {
			complain(t, "the refused guest printed %q", text)
		}
	}
	entry, err := n.service.Await(t.Context(), "attestation refused", "", 10*time.Second)
	must(t, err)
	id, _ := entry["correlation_id"].(string)
	text, _ := entry["error"].(string)
	t.Logf("key service: refused, correlation id %s: %s", id, text)
	if id == "" || !hasLine(g, id) {
		complain(t, "the guest's journal does not show the correlation ID %q of the service's log", id)
	}
	for _, want := range []string{"kernel command line", "expected", "found"} {
		if !strings.Contains(text, want) {
			complain(t, "the service's log does not say %q: %s", want, text)
		}
	}
}

// logTimeline logs the way from power on to a mounted volume.
func logTimeline(t *testing.T, number int, g *lab.Guest) {
	t.Helper()
	if t.Failed() {
		return // the errors must not drown
	}
	for _, m := range g.Marks() {
		t.Logf("boot %d: %8.3f s after power on, %8.3f s of the guest's clock: %s", number, m.At.Seconds(), m.Uptime.Seconds(), m.Name)
	}
	for _, l := range g.Lines() {
		var step struct {
			Msg, Step string
			Took      float64 `json:"took_ms"`
			Uptime    float64 `json:"uptime_s"`
		}
		if strings.HasPrefix(l.Text, "{") && json.Unmarshal([]byte(l.Text), &step) == nil && step.Msg == "step" {
			t.Logf("boot %d: %8.3f s of the guest's clock: %s (took %.1f ms)", number, step.Uptime, step.Step, step.Took)
		}
	}
}
