package endorsement

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"net/url"
	"sync"
	"time"
)

const (
	// maxMemory bounds what a cache holds in memory, in bytes.
	maxMemory = 64 << 20
	// maxFlights bounds how many names are asked for at once: names come from
	// evidence of which nothing is verified yet.
	maxFlights = 32
	// maxRetryAfter bounds what a vendor can ask for.
	maxRetryAfter = 10 * time.Minute
)

// CacheOptions configure [NewCache]. Unset fields take the stated default.
type CacheOptions struct {
	// Dir keeps documents across restarts. Empty: memory only.
	Dir string
	// Source is asked for what is not stored. Nil: nobody is.
	Source Source
	// Negative is how long a failure is remembered. A vendor may ask for longer.
	// Default one minute.
	Negative time.Duration
	// Wait bounds how long one caller waits. Default 20 seconds.
	Wait time.Duration
	// MaxEntries bounds the documents in memory and on disk, and the failures
	// that are remembered. Default 1024.
	MaxEntries int
	// Now is the clock for freshness and failures. Default time.Now.
	Now func() time.Time
}

// Cache remembers documents and failures. However many callers ask for a name,
// its source is asked once; one caller's cancelled context fails that caller
// only. It never returns a document that its request calls stale.
type Cache struct {
	opts  CacheOptions
	store *store

	ctx  context.Context // of the flights
	stop context.CancelFunc
	wg   sync.WaitGroup

	mu      sync.Mutex
	closed  bool
	docs    map[string]*list.Element // of entry
	used    list.List                // the most recently used first
	size    int
	failed  map[string]failure // by name, and by origin for vendors that are silent
	flights map[string]*flight
}

var _ Source = (*Cache)(nil)

type entry struct {
	name string
	doc  Document
}

func (e entry) size() int { return len(e.doc.Body) + len(e.doc.Chain) }

type failure struct {
	err   error
	until time.Time
}

// flight is one question that is on its way.
type flight struct {
	ctx  context.Context
	done chan struct{}
	doc  Document
	err  error
}

// NewCache returns a cache. The caller closes it.
func NewCache(opts CacheOptions) (*Cache, error) {
	if opts.Negative == 0 {
		opts.Negative = time.Minute
	}
	if opts.Wait == 0 {
		opts.Wait = 20 * time.Second
	}
	if opts.MaxEntries == 0 {
		opts.MaxEntries = 1024
	}
	if opts.Now == nil {
		opts.Now = time.Now
	}
	c := &Cache{opts: opts, docs: map[string]*list.Element{}, failed: map[string]failure{}, flights: map[string]*flight{}}
	if opts.Dir != "" {
		var err error
		if c.store, err = openStore(opts.Dir, opts.MaxEntries); err != nil {
			return nil, fmt.Errorf("store of endorsements: %w", err)
		}
	}
	c.ctx, c.stop = context.WithCancel(context.Background())
	return c, nil
}

// Close ends what is on its way and waits for it.
func (c *Cache) Close() error {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	c.stop()
	c.wg.Wait()
	if c.store != nil {
		return c.store.root.Close()
	}
	return nil
}

// Get implements Source. The document is shared: callers do not change it.
func (c *Cache) Get(ctx context.Context, r Request) (Document, error) {
	if err := checkName(r.Name); err != nil {
		return Document{}, err
	}
	if err := ctx.Err(); err != nil {
		return Document{}, err
	}
	f, d, err := c.begin(r)
	if f == nil {
		return d, err
	}
	select {
	case <-f.done:
		return c.landed(r, f)
	case <-ctx.Done():
		return Document{}, fmt.Errorf("%s: %w: %w", r.Name, ErrUnavailable, ctx.Err())
	case <-f.ctx.Done():
	}
	select {
	case <-f.done: // which came first, its end ends the context as well
		return c.landed(r, f)
	default:
		return Document{}, fmt.Errorf("%s: %w: no answer within %s", r.Name, ErrUnavailable, c.opts.Wait)
	}
}

// landed is what a flight brought for one caller, who may have joined another's.
func (c *Cache) landed(r Request, f *flight) (Document, error) {
	if f.err == nil && !fresh(r, f.doc, c.opts.Now()) {
		return Document{}, fmt.Errorf("%s: %w: what is stored is stale", r.Name, ErrUnavailable)
	}
	return f.doc, f.err
}

// begin answers from memory, or joins or starts the one flight for a name.
func (c *Cache) begin(r Request) (*flight, Document, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e, ok := c.docs[r.Name]; ok && fresh(r, e.Value.(entry).doc, c.opts.Now()) {
		c.used.MoveToFront(e)
		return nil, e.Value.(entry).doc, nil
	}
	if f := c.flights[r.Name]; f != nil {
		return f, Document{}, nil
	}
	if c.closed || len(c.flights) >= maxFlights {
		return nil, Document{}, fmt.Errorf("%s: %w: %d others are being asked for", r.Name, ErrUnavailable, len(c.flights))
	}
	f := &flight{done: make(chan struct{})}
	var cancel context.CancelFunc
	f.ctx, cancel = context.WithTimeout(c.ctx, c.opts.Wait)
	c.flights[r.Name] = f
	c.wg.Go(func() {
		defer cancel()
		f.doc, f.err = c.fetch(f.ctx, r)
		c.mu.Lock()
		delete(c.flights, r.Name)
		c.mu.Unlock()
		close(f.done)
	})
	return f, Document{}, nil
}

// fetch looks on the disk, where another process may have put the document, and
// then asks the source, unless that failed a short while ago.
func (c *Cache) fetch(ctx context.Context, r Request) (Document, error) {
	if c.store != nil {
		if d, ok := c.store.read(r.Name); ok && fresh(r, d, c.opts.Now()) {
			c.remember(r.Name, d)
			return d, nil
		}
	}
	if c.opts.Source == nil {
		return Document{}, fmt.Errorf("%s: %w: it is not stored, and nobody is configured to be asked", r.Name, ErrUnavailable)
	}
	if err := c.failedLately(r); err != nil {
		return Document{}, err
	}
	d, err := c.opts.Source.Get(ctx, r)
	if err == nil && !fresh(r, d, c.opts.Now()) {
		err = fmt.Errorf("%s: %w", r.Name, &UnavailableError{Err: errors.New("what the vendor sent is stale, or is something else")})
	}
	if err == nil && (len(d.Body) == 0 || len(d.Body) > MaxDocument || len(d.Chain) > MaxDocument) {
		err = fmt.Errorf("%s: %w", r.Name, &UnavailableError{Err: fmt.Errorf("document of %d and %d bytes", len(d.Body), len(d.Chain))})
	}
	if err != nil {
		if ctx.Err() != nil && !errors.Is(err, ErrUnavailable) {
			err = fmt.Errorf("%s: %w", r.Name, &UnavailableError{Err: err, Silent: true})
		}
		if c.ctx.Err() == nil {
			c.rememberFailure(r, err)
		}
		return Document{}, err
	}
	c.remember(r.Name, d)
	if c.store != nil {
		// A full disk costs another question after the next restart.
		_ = c.store.write(r.Name, d)
	}
	return d, nil
}

func (c *Cache) remember(name string, d Document) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.failed, name)
	if e, ok := c.docs[name]; ok {
		c.drop(e)
	}
	e := entry{name, d}
	c.docs[name] = c.used.PushFront(e)
	c.size += e.size()
	for c.used.Len() > c.opts.MaxEntries || c.size > maxMemory {
		c.drop(c.used.Back())
	}
}

func (c *Cache) drop(e *list.Element) {
	old := c.used.Remove(e).(entry)
	delete(c.docs, old.name)
	c.size -= old.size()
}

// failedLately is why a name is not asked for now. A vendor that is silent is
// not asked for anything.
func (c *Cache) failedLately(r Request) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.opts.Now()
	for _, key := range []string{r.Name, originOf(r)} {
		f, ok := c.failed[key]
		if ok && now.Before(f.until) {
			return fmt.Errorf("%s: not asked for again before %s: %w", r.Name, f.until.UTC().Format(time.RFC3339), f.err)
		}
		delete(c.failed, key)
	}
	return nil
}

func (c *Cache) rememberFailure(r Request, err error) {
	if !errors.Is(err, ErrUnavailable) && !errors.Is(err, ErrNotFound) {
		return // nobody was asked
	}
	key, wait := r.Name, c.opts.Negative
	var u *UnavailableError
	if errors.As(err, &u) {
		wait = max(wait, min(u.RetryAfter, maxRetryAfter))
		if u.Silent {
			key = originOf(r)
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.failed) >= c.opts.MaxEntries {
		now := c.opts.Now()
		for k, f := range c.failed {
			if !now.Before(f.until) {
				delete(c.failed, k)
			}
		}
	}
	for k := range c.failed {
		if len(c.failed) < c.opts.MaxEntries {
			break
		}
		delete(c.failed, k)
	}
	c.failed[key] = failure{err, c.opts.Now().Add(wait)}
}

// originOf contains a colon, which no name does.
func originOf(r Request) string {
	u, err := url.Parse(r.URL)
	if err != nil {
		return ":"
	}
	return origin(u)
}

func fresh(r Request, d Document, now time.Time) bool { return r.Fresh == nil || r.Fresh(d, now) }
