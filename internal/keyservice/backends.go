package keyservice

import (
	"context"
	"errors"
	"strings"
	"time"

	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/kms/setup"
	"github.com/keyagent/keyagent/storage"
)

// backend is what metrics say of one backend. The clock is the machine's: how
// long somebody else's service took has nothing to do with the service's own.
type backend struct {
	name    string // kms/NAME or storage/NAME, from a closed set
	metrics *Metrics
}

func newBackend(uri string, m *Metrics) backend {
	return backend{strings.Replace(setup.Redact(uri), "://", "/", 1), m}
}

func (b backend) observe(operation string, began time.Time, err error) {
	b.metrics.backends.WithLabelValues(b.name, operation, backendClass(err)).Observe(time.Since(began).Seconds())
}

// backendClass gives an error a label.
func backendClass(err error) string {
	if err == nil {
		return "ok"
	}
	for _, row := range []struct {
		is    error
		class string
	}{
		{context.Canceled, "cancelled"},
		{storage.ErrNotFound, "not found"},
		{storage.ErrConflict, "conflict"},
		{storage.ErrNoBucket, "no bucket"},
		{storage.ErrCorrupt, "corrupt"},
		{kms.ErrWrongKey, "wrong key"},
		{kms.ErrKEK, "kek"},
		{kms.ErrThrottled, "throttled"}, {storage.ErrThrottled, "throttled"},
		{kms.ErrCredentials, "credentials"}, {storage.ErrCredentials, "credentials"},
		{kms.ErrDenied, "denied"}, {storage.ErrDenied, "denied"},
		{kms.ErrUnavailable, "unavailable"}, {storage.ErrUnavailable, "unavailable"},
	} {
		if errors.Is(err, row.is) {
			return row.class
		}
	}
	return "other"
}

// observedKMS measures a KMS.
type observedKMS struct {
	setup.Keys
	backend
}

func observeKMS(k setup.Keys, uri string, m *Metrics) kms.KMS {
	o := &observedKMS{k, newBackend(uri, m)}
	if kms.Public(k) {
		return publicKMS{o}
	}
	return o
}

// publicKMS stays known as one under whose KEK anybody can wrap.
type publicKMS struct{ *observedKMS }

// Public implements kms.PublicWrapper.
func (publicKMS) Public() bool { return true }

// Generate implements kms.KMS.
func (o *observedKMS) Generate(ctx context.Context, b kms.Binding) (key *kms.Secret, w kms.Wrapped, err error) {
	defer func(began time.Time) { o.observe("generate", began, err) }(time.Now())
	return o.Keys.Generate(ctx, b)
}

// Wrap implements kms.KMS.
func (o *observedKMS) Wrap(ctx context.Context, b kms.Binding, key *kms.Secret) (w kms.Wrapped, err error) {
	defer func(began time.Time) { o.observe("wrap", began, err) }(time.Now())
	return o.Keys.Wrap(ctx, b, key)
}

// Unwrap implements kms.KMS.
func (o *observedKMS) Unwrap(ctx context.Context, b kms.Binding, w kms.Wrapped) (key *kms.Secret, err error) {
	defer func(began time.Time) { o.observe("unwrap", began, err) }(time.Now())
	return o.Keys.Unwrap(ctx, b, w)
}

// observedStorage measures a storage.
type observedStorage struct {
	setup.Objects
	backend
}

func observeStorage(s setup.Objects, uri string, m *Metrics) storage.Storage {
	return &observedStorage{s, newBackend(uri, m)}
}

// Get implements storage.Storage.
func (o *observedStorage) Get(ctx context.Context, name string) (data []byte, v storage.Version, err error) {
	defer func(began time.Time) { o.observe("get", began, err) }(time.Now())
	return o.Objects.Get(ctx, name)
}

// Put implements storage.Storage.
func (o *observedStorage) Put(ctx context.Context, name string, data []byte, expect storage.Version) (v storage.Version, err error) {
	defer func(began time.Time) { o.observe("put", began, err) }(time.Now())
	return o.Objects.Put(ctx, name, data, expect)
}

// List implements storage.Storage.
func (o *observedStorage) List(ctx context.Context, prefix, after string, limit int) (names []string, err error) {
	defer func(began time.Time) { o.observe("list", began, err) }(time.Now())
	return o.Objects.List(ctx, prefix, after, limit)
}
