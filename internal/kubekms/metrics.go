package kubekms

import (
	"fmt"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/keyagent/keyagent/internal/failure"
)

// Metrics of the plugin. Labels come from closed sets: never a key_id, a UID or the
// text of an error. A nil Metrics counts nothing.
type Metrics struct {
	registry *prometheus.Registry
	requests *prometheus.HistogramVec
	fetches  *prometheus.HistogramVec
	purges   prometheus.Counter
	refusals prometheus.Counter
}

// NewMetrics returns metrics of their own registry.
func NewMetrics() *Metrics {
	m := &Metrics{
		registry: prometheus.NewRegistry(),
		requests: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "keyagent_kubekms_request_seconds", Help: "Time to answer a request, by API, operation and class of the result.",
			Buckets: prometheus.ExponentialBuckets(0.00005, 2, 16),
		}, []string{"api", "operation", "class"}),
		fetches: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "keyagent_kubekms_fetch_seconds", Help: "Time of a fetch of the KEK, by class of the result.",
			Buckets: prometheus.ExponentialBuckets(0.001, 2, 18),
		}, []string{"class"}),
		purges: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "keyagent_kubekms_purges_total", Help: "How often the KEKs were wiped because they may not be used any longer.",
		}),
		refusals: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "keyagent_kubekms_refused_callers_total", Help: "Connections of callers that are not allowed.",
		}),
	}
	m.registry.MustRegister(m.requests, m.fetches, m.purges, m.refusals)
	return m
}

// Watch adds what is read from a ring: its state and how many KEKs there are.
func (m *Metrics) Watch(r *Ring) {
	for _, s := range States {
		m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "keyagent_kubekms_state", Help: "1 for the state that the KEKs are in.",
			ConstLabels: prometheus.Labels{"state": string(s)},
		}, func() float64 {
			if r.Health().State == s {
				return 1
			}
			return 0
		}))
	}
	m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "keyagent_kubekms_keys", Help: "KEKs in memory.",
	}, func() float64 { return float64(r.Health().Keys) }))
}

func class(err error) string {
	if err == nil {
		return "ok"
	}
	return string(failure.Of(err).Class)
}

func (m *Metrics) request(api, operation string, err error, took time.Duration) {
	if m != nil {
		m.requests.WithLabelValues(api, operation, class(err)).Observe(took.Seconds())
	}
}

func (m *Metrics) fetched(err error, took time.Duration) {
	if m != nil {
		m.fetches.WithLabelValues(class(err)).Observe(took.Seconds())
	}
}

func (m *Metrics) purged() {
	if m != nil {
		m.purges.Inc()
	}
}

func (m *Metrics) refused() {
	if m != nil {
		m.refusals.Inc()
	}
}

// Handler serves /metrics; /healthz, which says that the process is alive; and
// /readyz, which says whether the KEKs are those of the source.
func (m *Metrics) Handler(r *Ring) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if h := r.Health(); !h.OK() {
			http.Error(w, string(h.State), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	return mux
}
