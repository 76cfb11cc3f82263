package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/luks"
)

// The states of a volume on this node, as the local API shows them.
const (
	StateClosed  = "closed"
	StateOpen    = "open"
	StateMounted = "mounted"
)

// Volume is what the node knows of one volume.
type Volume struct {
	ID            string
	Device        string
	Mapped        string // /dev/mapper path, empty when closed
	Mount         string // mount point, empty when not mounted
	State         string
	UUID          string
	Generation    uint64
	LastError     string
	CorrelationID string
	Optional      bool
}

// Manager opens and closes the volumes of this node. Every local interface uses
// it. Work on one volume waits for other work on the same volume alone.
type Manager struct {
	cfg      *Config
	keys     KeySource
	log      *slog.Logger
	progress Progress

	mu      sync.Mutex
	locks   map[string]chan struct{}
	lastErr map[string]error
	lastID  map[string]string
}

// NewManager returns a manager of the volumes in cfg.
func NewManager(cfg *Config, keys KeySource, log *slog.Logger, progress Progress) *Manager {
	if progress == nil {
		progress = func(string, time.Duration) {}
	}
	return &Manager{cfg: cfg, keys: keys, log: log, progress: progress,
		locks: map[string]chan struct{}{}, lastErr: map[string]error{}, lastID: map[string]string{}}
}

// lock waits for the volume's turn.
func (m *Manager) lock(ctx context.Context, id string) (unlock func(), err error) {
	m.mu.Lock()
	turn, ok := m.locks[id]
	if !ok {
		turn = make(chan struct{}, 1)
		m.locks[id] = turn
	}
	m.mu.Unlock()
	select {
	case turn <- struct{}{}:
		return func() { <-turn }, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// Open opens a volume, and mounts it if its configuration says where. With
// format, or with format in its configuration, a volume that does not exist yet
// is created on a blank device. Opening an open volume succeeds.
func (m *Manager) Open(ctx context.Context, id string, format bool) (Volume, error) {
	v, err := m.cfg.volume(id)
	if err != nil {
		return Volume{}, err
	}
	unlock, err := m.lock(ctx, id)
	if err != nil {
		return Volume{}, err
	}
	defer unlock()
	started := time.Now()
	err = classifyLuks(m.open(ctx, v, format || v.Format))
	m.mu.Lock()
	m.lastErr[id] = err
	m.mu.Unlock()
	if err != nil {
		m.log.Error("volume is not open", "volume", id, "error", err, "class", failure.Of(err).Class, "correlation_id", failure.Of(err).CorrelationID)
		return m.status(ctx, v), err
	}
	m.log.Info("volume is open", "volume", id, "mount", v.Mount, "took", time.Since(started))
	return m.status(ctx, v), nil
}

func (m *Manager) open(ctx context.Context, v *VolumeConfig, format bool) error {
	mapping, open, err := m.alreadyOpen(ctx, v)
	if err != nil {
		return err
	}
	if !open {
		if mapping, err = m.unlock(ctx, v, format); err != nil {
			return err
		}
	}
	if v.Mount == "" {
		return nil
	}
	return m.step("mounted", func() error { return mount(mapping.Path, v.Mount, v.Options) })
}

// step times one part of opening and reports it.
func (m *Manager) step(name string, f func() error) error {
	started := time.Now()
	err := f()
	took := time.Since(started)
	if err == nil {
		logStep(m.log, name, took)
		m.progress(name, took)
	}
	return err
}

// logStep is one line of the timeline from power on to a mounted volume.
func logStep(log *slog.Logger, name string, took time.Duration) {
	log.Info("step", "step", name, "took_ms", float64(took.Microseconds())/1000, "uptime_s", uptime())
}

// unlock gets the key and maps the volume. The key lives no longer than this
// call.
func (m *Manager) unlock(ctx context.Context, v *VolumeConfig, format bool) (mapping luks.Mapping, err error) {
	if err := m.awaitDevice(ctx, v.Device); err != nil {
		return mapping, err
	}
	var key *Key
	err = m.step("key", func() (err error) {
		key, err = m.key(ctx, v.ID, format)
		return err
	})
	if err != nil {
		return mapping, err
	}
	defer func() {
		_ = key.Close()
		secret.Forget() // what the computations with it left on the heap
	}()
	m.mu.Lock()
	m.lastID[v.ID] = key.CorrelationID
	m.mu.Unlock()
	if key.Pending {
		mapping, err = m.provision(ctx, v, key)
	} else {
		err = m.step("mapped", func() (err error) {
			mapping, err = luks.Open(ctx, v.Device, v.Name, key.Identity, key.HeaderMAC, key.DEK, v.openOptions())
			return err
		})
	}
	if err != nil {
		return mapping, failure.WithID(classifyLuks(err), key.CorrelationID)
	}
	return mapping, m.remember(v, key.Identity)
}

// key asks for the key of a volume that exists, and only if there is none, and
// it may be created, for a new one.
func (m *Manager) key(ctx context.Context, id string, format bool) (*Key, error) {
	key, err := m.keys.GetKey(ctx, id, false)
	if class := failure.Of(err).Class; err != nil && format && (class == failure.NotFound || class == failure.State) {
		return m.keys.GetKey(ctx, id, true)
	}
	return key, err
}

// maxDeviceWait is how long a disk may take to appear.
const maxDeviceWait = time.Minute

// awaitDevice waits for a disk that is attached, or found, a moment later than
// the agent starts.
func (m *Manager) awaitDevice(ctx context.Context, device string) error {
	limit := min(m.cfg.Retry.budget, maxDeviceWait)
	deadline := time.Now().Add(limit)
	for first := true; ; first = false {
		_, err := os.Stat(device)
		if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if !time.Now().Before(deadline) {
			return failure.New(failure.NotFound, err, "is the disk attached, and is device right in the configuration?")
		}
		if first {
			m.log.Info("waiting for the disk", "device", device, "at_most", limit)
			m.progress("waiting for "+device, limit)
		}
		if err := wait(ctx, 100*time.Millisecond); err != nil {
			return err
		}
	}
}

func (v *VolumeConfig) openOptions() luks.OpenOptions {
	return luks.OpenOptions{AllowDiscards: v.Discards}
}

// provision creates a volume that the key service knows as pending. A crash at
// any point leaves it pending, and the next run goes on from what is on the
// disk: nothing, an interrupted format of our own, or a complete header that
// the key opens. Only the confirmation, at the end, makes it active, and nobody
// can have stored data before.
func (m *Manager) provision(ctx context.Context, v *VolumeConfig, key *Key) (luks.Mapping, error) {
	var mapping luks.Mapping
	mac, err := m.header(ctx, v, key)
	if err != nil {
		return mapping, err
	}
	if err := m.step("mapped", func() (err error) {
		mapping, err = luks.Open(ctx, v.Device, v.Name, key.Identity, mac, key.DEK, v.openOptions())
		return err
	}); err != nil {
		return mapping, err
	}
	// The kernel has the volume key now; making the filesystem takes a while.
	if err := key.Close(); err != nil {
		return mapping, err
	}
	err = m.settle(ctx, v, key, mapping, mac)
	if err != nil {
		// A pending volume is not left open: nobody may use it yet.
		err = errors.Join(err, luks.Close(context.WithoutCancel(ctx), v.Name))
	}
	return mapping, err
}

func (m *Manager) settle(ctx context.Context, v *VolumeConfig, key *Key, mapping luks.Mapping, mac luks.MAC) error {
	if v.Filesystem == "ext4" {
		if err := m.step("filesystem", func() error { return makeFilesystem(ctx, mapping.Path) }); err != nil {
			return err
		}
	}
	return m.step("confirmed", func() error { return m.keys.Confirm(ctx, key, mac) })
}

// header makes sure that the device has the volume's header.
func (m *Manager) header(ctx context.Context, v *VolumeConfig, key *Key) (mac luks.MAC, err error) {
	state, err := luks.Probe(ctx, v.Device, key.Identity, key.DEK)
	if err != nil {
		return mac, err
	}
	if state == luks.StateLUKS2 {
		mac, err = luks.Adopt(ctx, v.Device, key.Identity, key.DEK)
		return mac, err
	}
	// Format refuses whatever is neither blank nor its own interrupted work.
	err = m.step("formatted", func() (err error) {
		mac, err = luks.Format(ctx, v.Device, key.Identity, key.DEK, luks.FormatOptions{})
		return err
	})
	return mac, err
}

// remembered is kept in memory-backed storage while a volume is open, so that
// a restarted agent knows its own mappings without asking the key service.
type remembered struct {
	UUID       string `json:"uuid"`
	Generation uint64 `json:"generation"`
}

func (m *Manager) statePath(v *VolumeConfig) string {
	return filepath.Join(m.cfg.StateDir, v.ID+".json")
}

func (m *Manager) remember(v *VolumeConfig, id luks.Identity) error {
	if err := os.MkdirAll(m.cfg.StateDir, 0o700); err != nil {
		return err
	}
	data, err := json.Marshal(remembered{id.UUID, id.Generation})
	if err != nil {
		return err
	}
	tmp := m.statePath(v) + ".tmp"
	if err := os.WriteFile(tmp, data, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, m.statePath(v))
}

func (m *Manager) recall(v *VolumeConfig) (remembered, bool) {
	var r remembered
	data, err := os.ReadFile(m.statePath(v))
	if err != nil || len(data) > 4096 || json.Unmarshal(data, &r) != nil {
		return r, false
	}
	return r, true
}

// alreadyOpen reports whether the mapping exists and is the one that this agent
// made: same UUID, same device. Anything else under that name is left to
// luks.Open, which refuses it.
func (m *Manager) alreadyOpen(ctx context.Context, v *VolumeConfig) (luks.Mapping, bool, error) {
	mapping, err := luks.Status(ctx, v.Name)
	if errors.Is(err, luks.ErrNotActive) {
		return mapping, false, nil
	}
	if err != nil {
		return mapping, false, err
	}
	r, ok := m.recall(v)
	dev := deviceNumber(v.Device)
	same := ok && r.UUID == mapping.UUID && dev == unix.Mkdev(mapping.DataDevice.Major, mapping.DataDevice.Minor)
	return mapping, same, nil
}

// Close unmounts and closes a volume. Closing a closed volume succeeds.
func (m *Manager) Close(ctx context.Context, id string) (Volume, error) {
	v, err := m.cfg.volume(id)
	if err != nil {
		return Volume{}, err
	}
	unlock, err := m.lock(ctx, id)
	if err != nil {
		return Volume{}, err
	}
	defer unlock()
	mapping, err := luks.Status(ctx, v.Name)
	if err == nil && v.Mount != "" {
		if err := unmount(mapping.Path, v.Mount); err != nil {
			return m.status(ctx, v), err
		}
	}
	if err := luks.Close(ctx, v.Name); err != nil && !errors.Is(err, luks.ErrNotActive) {
		return m.status(ctx, v), classifyLuks(err)
	}
	if err := os.Remove(m.statePath(v)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return m.status(ctx, v), err
	}
	m.log.Info("volume is closed", "volume", id)
	return m.status(ctx, v), nil
}

// Status returns what is known of one volume.
func (m *Manager) Status(ctx context.Context, id string) (Volume, error) {
	v, err := m.cfg.volume(id)
	if err != nil {
		return Volume{}, err
	}
	return m.status(ctx, v), nil
}

// List returns every configured volume.
func (m *Manager) List(ctx context.Context) []Volume {
	out := make([]Volume, len(m.cfg.Volumes))
	for i := range m.cfg.Volumes {
		out[i] = m.status(ctx, &m.cfg.Volumes[i])
	}
	return out
}

func (m *Manager) status(ctx context.Context, v *VolumeConfig) Volume {
	m.mu.Lock()
	lastErr := m.lastErr[v.ID]
	out := Volume{ID: v.ID, Device: v.Device, State: StateClosed, CorrelationID: m.lastID[v.ID], Optional: v.Optional}
	m.mu.Unlock()
	if lastErr != nil {
		out.LastError = lastErr.Error()
		out.CorrelationID = failure.Of(lastErr).CorrelationID
	}
	mapping, err := luks.Status(ctx, v.Name)
	if err != nil {
		if !errors.Is(err, luks.ErrNotActive) {
			out.LastError = err.Error()
		}
		return out
	}
	out.State, out.Mapped, out.UUID = StateOpen, mapping.Path, mapping.UUID
	if r, ok := m.recall(v); ok && r.UUID == mapping.UUID {
		out.Generation = r.Generation
	}
	if v.Mount != "" {
		if n, err := mountedAt(v.Mount); err == nil && n != nil && *n == deviceNumber(mapping.Path) {
			out.State, out.Mount = StateMounted, v.Mount
		}
	}
	return out
}

// OpenAll opens every volume, all at the same time. The error is that of the
// first volume in the configuration that is not optional and did not open.
func (m *Manager) OpenAll(ctx context.Context) error {
	errs := make([]error, len(m.cfg.Volumes))
	var wg sync.WaitGroup
	for i, v := range m.cfg.Volumes {
		wg.Go(func() { _, errs[i] = m.Open(ctx, v.ID, false) })
	}
	wg.Wait()
	for i, v := range m.cfg.Volumes {
		if errs[i] != nil && !v.Optional {
			f := failure.Of(errs[i])
			return &failure.Error{Class: f.Class, CorrelationID: f.CorrelationID, Hint: f.Hint, Err: fmt.Errorf("volume %q: %w", v.ID, errs[i])}
		}
	}
	return nil
}

// classifyLuks gives the errors of package luks their class and a hint.
func classifyLuks(err error) error {
	for _, row := range []struct {
		is    error
		class failure.Class
		hint  string
	}{
		{luks.ErrHeaderRefused, failure.HeaderRefused, "do not repair it: restore the header from a backup, and find out who changed it"},
		{luks.ErrHeaderMAC, failure.HeaderRefused, "the header is not the one that was recorded: restore the newest backup of it"},
		{luks.ErrShortHeader, failure.HeaderRefused, ""},
		{luks.ErrVolumeMismatch, failure.HeaderRefused, "is this the right disk? compare device in the configuration"},
		{luks.ErrTableMismatch, failure.HeaderRefused, ""},
		{luks.ErrWrongKey, failure.WrongKey, "the key service's key is not this disk's"},
		{luks.ErrInvalidKey, failure.WrongKey, ""},
		{luks.ErrNotBlank, failure.NotBlank, "keyagent never formats a disk that holds something; erase it yourself if you mean to"},
		{luks.ErrDeviceBusy, failure.DeviceBusy, "something else uses the device"},
		{luks.ErrNameTaken, failure.DeviceBusy, "close the other mapping, or choose another name"},
		{luks.ErrNotBlockDevice, failure.Configuration, "device must be a disk or a partition"},
		{luks.ErrDeviceSize, failure.Configuration, ""},
		{luks.ErrNotActive, failure.NotFound, "the volume is not open"},
	} {
		if errors.Is(err, row.is) {
			return failure.New(row.class, err, row.hint)
		}
	}
	return err
}
