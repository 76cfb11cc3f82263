package agent

import (
	"context"
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/keyagent/keyagent/internal/localweb"
)

var (
	stateDesc   = prometheus.NewDesc("keyagent_volume_state", "1 for the state that a volume is in.", []string{"volume", "state"}, nil)
	warningDesc = prometheus.NewDesc("keyagent_volume_warning", "1 for each thing that an administrator has to look at: header, filesystem, lease, fence or reservation.", []string{"volume", "kind"}, nil)
	alarmDesc   = prometheus.NewDesc("keyagent_header_alarms_total", "How often the header of an open volume was found overwritten on its disk.", []string{"volume"}, nil)
)

// collector shows volumes as metrics. What it shows is what is known: it asks
// neither a disk nor the kernel.
type collector struct{ *Volumes }

// Describe implements prometheus.Collector.
func (collector) Describe(out chan<- *prometheus.Desc) {
	out <- stateDesc
	out <- warningDesc
	out <- alarmDesc
}

// Collect implements prometheus.Collector.
func (c collector) Collect(out chan<- prometheus.Metric) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for id, e := range c.entries {
		if e.spec.ID == "" {
			continue
		}
		for _, s := range States() {
			value := 0.0
			if s == e.condition.state {
				value = 1
			}
			out <- prometheus.MustNewConstMetric(stateDesc, prometheus.GaugeValue, value, id, string(s))
		}
		for kind := range e.warnings {
			out <- prometheus.MustNewConstMetric(warningDesc, prometheus.GaugeValue, 1, id, kind)
		}
		out <- prometheus.MustNewConstMetric(alarmDesc, prometheus.CounterValue, float64(e.alarms), id)
	}
}

// ServeMetrics serves /metrics on a loopback address until ctx ends.
func (c *Volumes) ServeMetrics(ctx context.Context, address string) error {
	l, err := localweb.Listen(address, false)
	if err != nil {
		return err
	}
	registry := prometheus.NewRegistry()
	registry.MustRegister(collector{c})
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{}))
	return localweb.Serve(ctx, l, mux)
}
