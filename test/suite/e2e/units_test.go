//go:build linux && amd64

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/lab"
)

// unitScript runs the key service under its unit too, and lets systemd judge both.
const unitScript = `
head -c 32 /dev/urandom >/etc/keyagent/master.secret
chmod 600 /etc/keyagent/master.secret
systemctl start keyagent-serve.service
echo "E2E serve: $(systemctl is-active keyagent-serve.service)"
systemctl reload keyagent-serve.service && echo "E2E serve: reloaded"
systemctl stop keyagent-serve.service
systemctl show keyagent-serve.service -p Result -p ExecMainStatus | sed 's/^/E2E serve /'
journalctl -b -o cat --no-pager -u keyagent-serve.service
for unit in agent serve; do
	systemd-analyze verify --man=no keyagent-$unit.service && echo "E2E verified $unit"
	echo "E2E security $unit $(systemd-analyze security --no-pager keyagent-$unit.service | tail -n 1)"
done
`

const serveConfig = `listen: 127.0.0.1:8443
tls: {certificate: /etc/keyagent/server.pem, key: /run/credentials/keyagent-serve.service/server.key}
policy: /etc/keyagent/policy.yaml
kms: kms://cluster-kms?credential=master.secret
storage: storage://file?dir=/var/lib/keyagent/records
audit: /var/lib/keyagent/audit.log
`

// serveFiles are the key service's files in a guest: those of the one that runs
// beside it, but for its keys.
func (n *node) serveFiles(t *testing.T) []lab.File {
	t.Helper()
	files := []lab.File{{Path: "/etc/keyagent/serve.yaml", Data: []byte(serveConfig)}}
	for name, mode := range map[string]os.FileMode{"server.pem": 0o644, "server.key": 0o600, "policy.yaml": 0o644, "tpm-maker.pem": 0o644} {
		files = append(files, lab.File{Path: "/etc/keyagent/" + name, Source: filepath.Join(n.service.Dir, name), Mode: mode})
	}
	return files
}

// exposure is what systemd-analyze may at most say, from 0 to 10. The agent mounts
// for the whole machine, which rules out every setting that needs a mount
// namespace; its unit says which ones those are. Half a point is for growing ext4, for
// swap, and for naming who keeps a volume busy.
var exposure = map[string]float64{"serve": 1.5, "agent": 4.8}

// unitsHold asserts that both units do their work in their sandboxes, and that
// the sandboxes are as tight as they were.
func unitsHold(t *testing.T, g *lab.Guest) {
	t.Helper()
	wantLines(t, g, "E2E serve: active", "E2E serve: reloaded", "E2E serve Result=success", "E2E serve ExecMainStatus=0",
		"E2E verified agent", "E2E verified serve", `"msg":"serving"`)
	for unit, most := range exposure {
		score := -1.0
		for _, l := range g.Lines() {
			if _, text, ok := strings.Cut(l.Text, "E2E security "+unit+" "); ok {
				_, number, _ := strings.Cut(text, ".service: ")
				if _, err := fmt.Sscan(number, &score); err != nil {
					complain(t, "systemd-analyze security says %q", text)
				}
			}
		}
		t.Logf("keyagent-%s.service: exposure %.1f, at most %.1f", unit, score, most)
		if score < 0 || score > most {
			complain(t, "keyagent-%s.service has an exposure of %.1f, at most %.1f is allowed", unit, score, most)
		}
	}
}

// What another attempt may change is tried again, and nothing else.
func TestTheAgentsUnitTriesAgainWhatMayChange(t *testing.T) {
	var final []string
	for line := range strings.Lines(string(unitFile(t, "keyagent-agent.service"))) {
		if list, ok := strings.CutPrefix(line, "RestartPreventExitStatus="); ok {
			final = strings.Fields(list)
		}
	}
	for class, again := range map[failure.Class]bool{
		failure.Internal: true, failure.Unreachable: true, failure.DeviceBusy: true, failure.Held: true,
		failure.Usage: false, failure.Configuration: false, failure.ServerUntrusted: false, failure.EvidenceRefused: false,
		failure.PolicyDenied: false, failure.WrongKey: false, failure.HeaderRefused: false, failure.NotFound: false,
		failure.NotBlank: false, failure.NoDevice: false, failure.Tampered: false, failure.State: false,
		failure.NeedsRepair: false,
	} {
		if slices.Contains(final, strconv.Itoa(failure.ExitCode(class))) == again {
			complain(t, "%s, exit code %d: tried again must be %v", class, failure.ExitCode(class), again)
		}
	}
}
