package agent

import (
	"bytes"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
)

func TestVolumesAreShownAsMetrics(t *testing.T) {
	c, e := holding(t, &scriptedLeases{}, false, 0)
	c.warn(e, "header", "it was overwritten")
	e.alarms = 2
	var out bytes.Buffer
	c.writeMetrics(&out)
	got := out.String()
	for _, want := range []string{
		`# HELP keyagent_header_alarms_total How often the header of an open volume was found overwritten on its disk.
# TYPE keyagent_header_alarms_total counter
keyagent_header_alarms_total{volume="data"} 2
`, `# HELP keyagent_volume_warning 1 for each thing that an administrator has to look at: header, filesystem, lease, fence or reservation; offline: it was opened without the key service.
# TYPE keyagent_volume_warning gauge
keyagent_volume_warning{kind="header",volume="data"} 1
`, `
keyagent_volume_state{state="open",volume="data"} 1
`,
	} {
		if !strings.Contains(got, want) {
			t.Errorf("no %s\nin\n%s", want, got)
		}
	}
	if n := strings.Count(got, "keyagent_volume_state{"); n != len(States()) {
		t.Errorf("%d states", n)
	}
	// Prometheus' own library reads it.
	problems, err := promlint.New(&out).Lint()
	if err != nil || len(problems) != 0 {
		t.Error(problems, err)
	}
}
