package agent

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"net/http"
	"slices"

	"github.com/keyagent/keyagent/internal/localweb"
)

// writeMetrics shows volumes in Prometheus' text format, version 0.0.4. Names and values
// need no escaping: IDs of volumes are words. What it shows is what is known: it asks
// neither a disk nor the kernel. Prometheus' library does the same in a tenth of the
// program for nodes.
func (c *Volumes) writeMetrics(out *bytes.Buffer) {
	c.mu.Lock()
	defer c.mu.Unlock()
	ids := slices.DeleteFunc(slices.Sorted(maps.Keys(c.entries)), func(id string) bool { return c.entries[id].spec.ID == "" })
	fmt.Fprintln(out, "# HELP keyagent_header_alarms_total How often the header of an open volume was found overwritten on its disk.")
	fmt.Fprintln(out, "# TYPE keyagent_header_alarms_total counter")
	for _, id := range ids {
		fmt.Fprintf(out, "keyagent_header_alarms_total{volume=%q} %d\n", id, c.entries[id].alarms)
	}
	fmt.Fprintln(out, "# HELP keyagent_volume_state 1 for the state that a volume is in.")
	fmt.Fprintln(out, "# TYPE keyagent_volume_state gauge")
	for _, id := range ids {
		for _, s := range States() {
			value := 0
			if s == c.entries[id].condition.state {
				value = 1
			}
			fmt.Fprintf(out, "keyagent_volume_state{state=%q,volume=%q} %d\n", s, id, value)
		}
	}
	fmt.Fprintln(out, "# HELP keyagent_volume_warning 1 for each thing that an administrator has to look at: header, filesystem, lease, fence or reservation; offline: it was opened without the key service.")
	fmt.Fprintln(out, "# TYPE keyagent_volume_warning gauge")
	for _, id := range ids {
		for _, kind := range slices.Sorted(maps.Keys(c.entries[id].warnings)) {
			fmt.Fprintf(out, "keyagent_volume_warning{kind=%q,volume=%q} 1\n", kind, id)
		}
	}
}

// ServeMetrics serves /metrics on a loopback address until ctx ends.
func (c *Volumes) ServeMetrics(ctx context.Context, address string) error {
	l, err := localweb.Listen(address, false)
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, _ *http.Request) {
		var out bytes.Buffer
		c.writeMetrics(&out)
		w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
		_, _ = w.Write(out.Bytes())
	})
	return localweb.Serve(ctx, l, mux)
}
