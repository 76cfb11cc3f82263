package agent

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/keyclient"
	"github.com/keyagent/keyagent/internal/measured"
	"github.com/keyagent/keyagent/internal/node"
	"github.com/keyagent/keyagent/luks"
)

// Getter is where keys come from.
type Getter interface {
	// GetKey returns the key of a volume. The caller closes it, within a Hold.
	GetKey(ctx context.Context, r keyclient.Request) (*keyclient.Key, error)
	// Hold keeps the session on which keys travel until release is called.
	Hold() (release func())
}

// Creator carries a first format, see docs/spec/volume-record.md.
type Creator interface {
	BeginFormat(ctx context.Context, k *keyclient.Key, m keyclient.MACs) (until time.Duration, err error)
	HeaderStands(ctx context.Context, k *keyclient.Key) error
	Confirm(ctx context.Context, k *keyclient.Key) error
	// CreateDiskless is all of it for a key that opens no disk.
	CreateDiskless(ctx context.Context, k *keyclient.Key, mac [32]byte) error
}

// Leaser keeps the right to write.
type Leaser interface {
	Renew(ctx context.Context, volume string, lease []byte) (*keyclient.Lease, error)
	// Verdict is nil if this machine may still have a volume open of which it has no lease.
	Verdict(ctx context.Context, volume string, readOnly bool) error
	Release(ctx context.Context, volume string, lease []byte) error
	// KeepSession has a session for both, whose verdict holds for that much longer.
	KeepSession(ctx context.Context, left time.Duration) error
	// Report has it told with the next question about the volume that it was opened without
	// an answer.
	Report(volume string, r keyclient.OfflineReport)
}

// Keys is all that a node asks the key service for.
type Keys interface {
	Getter
	Creator
	Leaser
	Rotator
	Retirer
}

// Options configure [New].
type Options struct {
	Keys Keys
	Log  *slog.Logger
	// StateDir is a folder in memory. What the node knows of its own mappings
	// outlives a restart there, and not a power cycle.
	StateDir string
	// DeviceWait is how long a disk may take to answer, or to appear.
	DeviceWait time.Duration
	// AppearWait is how long a disk that is not optional may take to appear.
	AppearWait time.Duration
	// Initrd says that this process runs in the initrd, and that another one will take
	// over what it opens.
	Initrd   bool
	Progress keyclient.Progress
	// Register is where volumes are measured. Nil: nowhere, and a volume that has to be
	// is not opened.
	Register measured.Register
	// Offline keeps keys for an outage of the key service. Nil: nothing is kept.
	Offline Keeper
}

// Volumes is the core of the node: it opens, keeps and closes volumes, whatever
// names them. Work on one volume waits for other work on the same volume, and a first
// format for some of the other first formats as well.
type Volumes struct {
	Options

	mu      sync.Mutex
	entries map[string]*entry
	keeping sync.Mutex    // of files in StateDir; taken before mu
	formats chan struct{} // one for each that may write a header
}

// maxFormats bounds the headers that are written beside each other: 16 MiB each, to its
// end, often to disks that are parts of one. Hundreds at once would each take longer than
// a disk may take to answer.
const maxFormats = 8

// formatTurn waits until a header may be written. A disk that hangs keeps its turn no
// longer than DeviceWait.
func (c *Volumes) formatTurn(ctx context.Context) (release func(), err error) {
	select {
	case c.formats <- struct{}{}:
		return func() { <-c.formats }, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("wait for other volumes that are being created: %w", ctx.Err())
	}
}

// entry is what is known of one volume. Its fields are guarded by Volumes.mu,
// and changed by the holder of its turn.
type entry struct {
	turn chan struct{}

	spec      node.Volume
	dynamic   bool
	condition condition
	known     remembered
	header    *luks.Header // nil until this process has seen it
	lease     *lease
	verdict   verdict
	fences    int // how often it was suspended for a verdict or its lease
	lastErr   error
	lastID    string
	warnings  map[string]string // by kind
	created   bool
	progress  string       // of a long step that is under way
	alarms    int          // how often the header was found overwritten
	unreserve func() error // of the disk's reservation; nil without one
	anew      func()       // somebody asks for the key again
	rotating  bool         // a change of its key is under way that the key service asked for
	tidy      bool         // nothing is left on the disk of an earlier change

	keptNext       time.Duration // when the leave to keep its key is asked for again
	keptGeneration int           // how often what is kept was to be destroyed
	keptNothing    bool          // and nothing was kept since
	keptAt         time.Duration // when it was kept last; 0: never
	givesBack      bool          // its lease goes back when it is closed, whatever is kept
}

// NewVolumes returns a core that knows no volumes yet. See [Volumes.Recover].
func NewVolumes(o Options) *Volumes {
	if o.Register == nil {
		o.Register = measured.None{}
	}
	if o.Progress == nil {
		o.Progress = func(string, time.Duration) {}
	}
	if o.DeviceWait == 0 {
		o.DeviceWait = 30 * time.Second
	}
	if o.AppearWait == 0 {
		o.AppearWait = time.Minute
	}
	c := &Volumes{Options: o, entries: map[string]*entry{}, formats: make(chan struct{}, maxFormats)}
	if o.Offline != nil {
		c.Keys = &listening{o.Keys, c}
	}
	return c
}

// entryOf returns the entry of a volume, which it makes if there is none.
func (c *Volumes) entryOf(id string) *entry {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.entryLocked(id)
}

func (c *Volumes) entryLocked(id string) *entry {
	e, ok := c.entries[id]
	if !ok {
		e = &entry{turn: make(chan struct{}, 1), condition: condition{state: Absent}, warnings: map[string]string{}, anew: func() {}}
		c.entries[id] = e
	}
	return e
}

// find returns the entry of a volume that is known, or nil.
func (c *Volumes) find(id string) *entry {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.entries[id]
}

// knows reports whether the node has anything to do with a volume.
func (c *Volumes) knows(id string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	e, ok := c.entries[id]
	return ok && e.spec.ID != ""
}

// Know tells the core of a volume that it does not open yet, so that status shows
// it.
func (c *Volumes) Know(v node.Volume) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.entryLocked(v.ID)
	e.spec = v
}

// claim gives a volume its description, and refuses one that takes something of
// another volume that is up.
func (c *Volumes) claim(v node.Volume, dynamic bool) (*entry, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for id, o := range c.entries {
		idle := o.condition.state == Absent || o.condition.state == Failed && o.known.Spec.ID == ""
		if id == v.ID || idle {
			continue
		}
		for _, f := range []struct {
			field      string
			mine, hers string
		}{{"mapping name", v.Name, o.spec.Name}, {"device", v.DevicePath(), o.spec.DevicePath()}, {"mount point", v.Mount, o.spec.Mount}} {
			if f.mine != "" && f.mine == f.hers {
				return nil, failure.Newf(failure.DeviceBusy, "close that volume first", "volume %q has the %s %s", id, f.field, f.mine)
			}
		}
	}
	e := c.entryLocked(v.ID)
	if e.condition.state != Absent && e.condition.state != Failed && (e.spec.DevicePath() != v.DevicePath() || e.spec.Name != v.Name) {
		return nil, failure.Newf(failure.DeviceBusy, "close it first", "volume %q is up with another device or mapping name", v.ID)
	}
	// A configured volume is described in one place alone.
	if dynamic && isUp(e.condition.state) && e.dynamic && (e.spec.Mount != v.Mount || e.spec.ReadOnly != v.ReadOnly) {
		return nil, failure.Newf(failure.DeviceBusy, "close it first", "volume %q is up with another mount point, or right to write", v.ID)
	}
	e.spec, e.dynamic = v, dynamic
	return e, nil
}

// take waits for a volume's turn, also among processes.
func (c *Volumes) take(ctx context.Context, id string, e *entry) (give func(), err error) {
	select {
	case e.turn <- struct{}{}:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	unlock, err := c.lockFile(ctx, id)
	if err != nil {
		<-e.turn
		return nil, err
	}
	c.refresh(id, e)
	return func() { unlock(); <-e.turn }, nil
}

// on applies an event. One that does not fit is a fault of this package, which is
// logged and does not stop the work on a disk half-way.
func (c *Volumes) on(e *entry, ev Event, reason error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := e.condition.on(ev, reason); err != nil {
		c.Log.Error("volume is in an unexpected state", "volume", e.spec.ID, "error", err)
	}
}

// allowed is on for an event that somebody asked for.
func (c *Volumes) allowed(e *entry, ev Event) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return failure.New(failure.State, e.condition.on(ev, nil), "keyagent status shows it")
}

func (c *Volumes) warn(e *entry, kind, text string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if text == "" {
		delete(e.warnings, kind)
		return
	}
	e.warnings[kind] = text
}

// set changes an entry under the lock.
func (c *Volumes) set(f func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f()
}

// step times one part of the work and reports it.
func (c *Volumes) step(ctx context.Context, name string, f func() error) error {
	started := time.Now()
	err := f()
	took := time.Since(started)
	if err == nil {
		c.Log.Info("step", "step", name, "took_ms", float64(took.Microseconds())/1000, "uptime_s", uptime())
		c.Progress(name, took)
		if tell, ok := ctx.Value(progressKey{}).(func(string, time.Duration)); ok {
			tell(name, took)
		}
	}
	return err
}

type progressKey struct{}

// WithProgress has the steps of one call told to f.
func WithProgress(ctx context.Context, f func(step string, took time.Duration)) context.Context {
	return context.WithValue(ctx, progressKey{}, f)
}

// ids are those of the volumes that are known, in byte order.
func (c *Volumes) ids() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := make([]string, 0, len(c.entries))
	for id, e := range c.entries {
		if e.spec.ID != "" {
			out = append(out, id)
		}
	}
	slices.SortFunc(out, strings.Compare)
	return out
}

// in names the volume in an error.
func in(id string, err error) error {
	if err == nil {
		return nil
	}
	f := failure.Of(err)
	return &failure.Error{Class: f.Class, CorrelationID: f.CorrelationID, Hint: f.Hint, Err: fmt.Errorf("volume %q: %w", id, err)}
}
