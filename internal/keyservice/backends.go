package keyservice

import (
	"context"
	"errors"
	"strings"
	"time"

	"github.com/keyagent/keyagent/internal/failure"
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
	b.metrics.backends.WithLabelValues(b.name, operation, backendLabel(err)).Observe(time.Since(began).Seconds())
}

// backendErrors is the one table of what backends' errors mean: a label for
// metrics, a class, and what the operator who stands before the service can do. A
// node is told that the service is unreachable where an operator, or another
// replica, may change that: it tries again, and asks the next endpoint.
var backendErrors = []struct {
	is       error
	label    string
	class    failure.Class
	operator string
	final    bool // also for a node
}{
	{storage.ErrNotFound, "not found", failure.NotFound, "", true},
	{storage.ErrConflict, "conflict", failure.Unreachable, "try again", false},
	{storage.ErrNoBucket, "no bucket", failure.Configuration, "create it, or look for a misspelt name", false},
	{storage.ErrCorrupt, "corrupt", failure.Tampered, "put back a good copy of the object", true},
	{storage.ErrTooLarge, "corrupt", failure.Tampered, "put back a good copy of the object", true},
	{kms.ErrKEKVersion, "kek version", failure.WrongKey, "is the KEK that it was created under in kms or old_kms?", false},
	{kms.ErrWrongKey, "wrong key", failure.WrongKey, "", true},
	{kms.ErrKEK, "kek", failure.Configuration, "enable the key, or cancel its deletion", false},
	{kms.ErrThrottled, "throttled", failure.Unreachable, "try again later", false},
	{storage.ErrThrottled, "throttled", failure.Unreachable, "try again later", false},
	// Credentials are renewed while the service runs.
	{kms.ErrCredentials, "credentials", failure.Unreachable, "docs/clouds.md says where credentials come from", false},
	{storage.ErrCredentials, "credentials", failure.Unreachable, "docs/clouds.md says where credentials come from", false},
	{kms.ErrDenied, "denied", failure.Configuration, "docs/clouds.md and deploy/iam list the permissions", false},
	{storage.ErrDenied, "denied", failure.Configuration, "docs/clouds.md and deploy/iam list the permissions", false},
	{kms.ErrUnavailable, "unavailable", failure.Unreachable, "is it reachable from here?", false},
	{storage.ErrUnavailable, "unavailable", failure.Unreachable, "is it reachable from here?", false},
	{kms.ErrURI, "other", failure.Configuration, "docs/configuration.md lists the parameters of each URI", true},
	// The caller went, or did not wait any longer.
	{context.Canceled, "cancelled", failure.Unreachable, "", false},
	{context.DeadlineExceeded, "unavailable", failure.Unreachable, "is it reachable from here?", false},
}

// backendLabel gives an error its label.
func backendLabel(err error) string {
	if err == nil {
		return "ok"
	}
	for _, row := range backendErrors {
		if errors.Is(err, row.is) {
			return row.label
		}
	}
	return "other"
}

// BackendError gives an error of a key management or storage backend its class and
// a hint for the operator. What the table does not know is a matter of
// configuration: backends refuse options that make no sense without a sentinel.
func BackendError(err error) error {
	for _, row := range backendErrors {
		if errors.Is(err, row.is) {
			return failure.New(row.class, err, row.operator)
		}
	}
	return failure.New(failure.Configuration, err, "")
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

// Salts implements kms.Salter.
func (o *observedKMS) Salts() bool { return kms.Salts(o.Keys) }

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

// Purge implements storage.Purger.
func (o *observedStorage) Purge(ctx context.Context, name string) (n int, err error) {
	defer func(began time.Time) { o.observe("purge", began, err) }(time.Now())
	return storage.Purge(ctx, o.Objects, name)
}

// List implements storage.Storage.
func (o *observedStorage) List(ctx context.Context, prefix, after string, limit int) (names []string, err error) {
	defer func(began time.Time) { o.observe("list", began, err) }(time.Now())
	return o.Objects.List(ctx, prefix, after, limit)
}
