package keyservice

import (
	"fmt"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/macstore"
)

// Metrics of a key service. Labels come from closed sets: never an error's text,
// a volume or an identity.
type Metrics struct {
	registry     *prometheus.Registry
	requests     *prometheus.HistogramVec
	attestations *prometheus.CounterVec
	warnings     *prometheus.CounterVec
	reloads      *prometheus.CounterVec
	backends     *prometheus.HistogramVec
	rewrap       *prometheus.GaugeVec
}

// connections counts those of a service, as [atls.Gate] does.
type connections interface {
	Waiting() (now int, evicted uint64)
	Attested() int
}

// NewMetrics returns metrics of their own registry.
func NewMetrics(c connections) *Metrics {
	m := &Metrics{
		registry: prometheus.NewRegistry(),
		requests: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "keyagent_request_seconds", Help: "Time to answer a request, by event and class of the result.",
			Buckets: prometheus.ExponentialBuckets(0.0005, 2, 14),
		}, []string{"event", "class"}),
		attestations: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "keyagent_attestations_total", Help: "Attestation exchanges, by result.",
		}, []string{"result"}),
		warnings: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "keyagent_warn_only_mismatches_total", Help: "Keys that were released although a warn_only reference value did not fit.",
		}, []string{"field"}),
		reloads: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "keyagent_policy_reloads_total", Help: "Reloads of the policy, by result.",
		}, []string{"result"}),
	}
	m.backends = prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "keyagent_backend_seconds", Help: "Time of one call to a key management or storage backend with its retries, by backend, operation and class of the result.",
		Buckets: prometheus.ExponentialBuckets(0.0005, 2, 17),
	}, []string{"backend", "operation", "class"})
	m.rewrap = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "keyagent_rewrap_records", Help: "Records of the last background re-wrap: total, done, changed, failed.",
	}, []string{"records"})
	m.registry.MustRegister(m.requests, m.attestations, m.warnings, m.reloads, m.backends, m.rewrap,
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "keyagent_unattested_connections", Help: "Connections that have not attested themselves yet, or have and then said nothing.",
		}, func() float64 { n, _ := c.Waiting(); return float64(n) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "keyagent_attested_connections", Help: "Connections of machines that have attested themselves.",
		}, func() float64 { return float64(c.Attested()) }),
		prometheus.NewCounterFunc(prometheus.CounterOpts{
			Name: "keyagent_unattested_evictions_total", Help: "Connections that were closed for newer ones.",
		}, func() float64 { _, n := c.Waiting(); return float64(n) }),
	)
	return m
}

func (m *Metrics) request(event string, err error, took time.Duration) {
	class := "ok"
	if err != nil {
		class = string(failure.Of(classify(err)).Class)
	}
	m.requests.WithLabelValues(event, class).Observe(took.Seconds())
}

func (m *Metrics) attested(err error) {
	result := "accepted"
	if err != nil {
		result = "refused"
	}
	m.attestations.WithLabelValues(result).Inc()
}

func (m *Metrics) warned(field string) { m.warnings.WithLabelValues(field).Inc() }

func (m *Metrics) reloaded(err error) {
	result := "ok"
	if err != nil {
		result = "error"
	}
	m.reloads.WithLabelValues(result).Inc()
}

func (m *Metrics) rewrapped(p macstore.Progress) {
	for name, n := range map[string]int{"total": p.Total, "done": p.Done, "changed": p.Changed, "failed": p.Failed} {
		m.rewrap.WithLabelValues(name).Set(float64(n))
	}
}

// handler serves /metrics, /healthz and /readyz.
func (m *Metrics) handler(ready func() error) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if err := ready(); err != nil {
			http.Error(w, "not ready", http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	return mux
}
