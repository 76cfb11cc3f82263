package agent

import (
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil"
)

func TestVolumesAreShownAsMetrics(t *testing.T) {
	c, e := holding(t, &scriptedLeases{}, false, 0)
	c.warn(e, "header", "it was overwritten")
	e.alarms = 2
	want := `# HELP keyagent_header_alarms_total How often the header of an open volume was found overwritten on its disk.
# TYPE keyagent_header_alarms_total counter
keyagent_header_alarms_total{volume="data"} 2
# HELP keyagent_volume_warning 1 for each thing that an administrator has to look at: header, filesystem, lease, fence or reservation.
# TYPE keyagent_volume_warning gauge
keyagent_volume_warning{kind="header",volume="data"} 1
`
	if err := testutil.CollectAndCompare(collector{c}, strings.NewReader(want), "keyagent_header_alarms_total", "keyagent_volume_warning"); err != nil {
		t.Error(err)
	}
	if n := testutil.CollectAndCount(collector{c}, "keyagent_volume_state"); n != len(States()) {
		t.Errorf("%d states", n)
	}
}
