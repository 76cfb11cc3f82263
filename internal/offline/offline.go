// Package offline keeps keys of volumes for the time in which no key service answers:
// sealed to this machine's TPM, for as long and as many boots as the key service allowed.
//
// What is on the disk opens only in the TPM that it was sealed in, while the registers hold
// what the key service verified, until the TPM's clock and its reset count have reached
// their limits, and only the newest of it: a counter in the TPM has one exact value for it.
// The TPM judges all of that; this package looks first, to say what is wrong. The wall clock
// is never asked.
//
// It promises that an interruption at any moment costs at most the kept key, and never gives
// one more boot; and that whatever is destroyed stays so, also if its file is put back. Who
// can put back the TPM's own state and the file together is not noticed.
//
// The format, the policy and the order of the steps are in docs/spec/offline.md.
package offline

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/keyagent/keyagent/attestation/tpm"
	"github.com/keyagent/keyagent/internal/config"
	"github.com/keyagent/keyagent/internal/keyclient"
	"github.com/keyagent/keyagent/internal/secret"
)

// Why a kept key does not open, or a key is not kept.
var (
	ErrNone      = errors.New("no key is kept for this volume")
	ErrFormat    = errors.New("the kept key cannot be read")
	ErrOtherTPM  = errors.New("the kept key belongs to another TPM, or this one was cleared")
	ErrStale     = errors.New("the kept key is not the newest, or the TPM's state is older than it")
	ErrRegisters = errors.New("the machine did not boot as when the key was kept")
	ErrBoots     = errors.New("the boots for which the key was kept are used up")
	ErrTime      = errors.New("the time for which the key was kept is over")
	ErrMoved     = errors.New("the registers are not what the key service verified any more")
	ErrOwnerAuth = errors.New("the TPM's owner hierarchy has a password")
)

// Options configure [New].
type Options struct {
	// Device is the TPM, as tpm.OpenDevice has it. Empty: tpm.DefaultDevice.
	Device string
	// Dir keeps the files. It outlives a boot.
	Dir string
	// RunDir remembers what was attested in this boot. It is in memory.
	RunDir string
}

// Cache keeps keys. It is safe for concurrent use, also by several processes.
type Cache struct {
	Options
	cut func(at string) error // an interruption, in tests
}

// New touches neither the TPM nor the disk.
func New(o Options) *Cache {
	if o.Device == "" {
		o.Device = tpm.DefaultDevice
	}
	return &Cache{o, func(string) error { return nil }}
}

// Use is how far a kept key has been used.
type Use struct {
	Boots     uint32        // in which it was used, this one included
	Since     time.Duration // since the first use, by the TPM's clock
	BootsLeft uint32        // after this one
	TimeLeft  time.Duration // of the TPM's clock
}

// Report is that, for the key service.
func (u Use) Report() keyclient.OfflineReport {
	return keyclient.OfflineReport{Boots: u.Boots, Since: u.Since}
}

// names of the files of a volume. The second one exists while the first is being replaced.
func (c *Cache) names(volume string) (present, next string) {
	present = filepath.Join(c.Dir, volume+".key")
	return present, present + ".next"
}

// lock takes the turn among all processes of this machine.
func (c *Cache) lock(ctx context.Context) (unlock func(), err error) {
	if err := os.MkdirAll(c.Dir, 0o700); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(c.Dir, "lock"), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, err
	}
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { _ = f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, errors.Join(err, f.Close())
		}
		t := time.NewTimer(20 * time.Millisecond)
		select {
		case <-ctx.Done():
			t.Stop()
			return nil, errors.Join(context.Cause(ctx), f.Close())
		case <-t.C:
		}
	}
}

// with runs f with the TPM, alone.
func (c *Cache) with(ctx context.Context, f func(*module) error) error {
	unlock, err := c.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	dev, err := tpm.OpenDevice(c.Device)
	if err != nil {
		return err
	}
	defer dev.Close()
	m, err := load(dev)
	if err != nil {
		return err
	}
	defer m.flush(m.srk.Handle)
	return f(m)
}

// Keep seals a key that the key service allows to be kept, in the place of what was kept of
// the volume before, which is lost from its first step on. After an error of which the caller
// does not know better, it should [Cache.Forget] the volume: what was kept before may still be
// there.
func (c *Cache) Keep(ctx context.Context, k *keyclient.Key) error {
	o := k.Offline
	if o == nil || k.State != keyclient.Active || k.Lease == nil || k.Lease.Bound {
		return fmt.Errorf("the key service does not allow to keep the key of volume %q", k.Volume)
	}
	return c.with(ctx, func(m *module) error {
		reset, clock, err := m.now()
		if err != nil {
			return err
		}
		f := &file{volume: k.Volume, written: reset, parent: m.name}
		for _, n := range o.PCRs {
			f.pcrs |= 1 << n
		}
		if f.digest, err = c.attested(m, k.Volume, f.pcrs, o.Digest, reset); err != nil {
			return err
		}
		limit := uint64(o.For / time.Millisecond)
		if f.lastBoot, f.lastTime = reset+o.Boots, clock+limit; f.lastBoot < reset || f.lastTime < clock {
			return fmt.Errorf("the TPM's counters are at their end: reset count %d, clock %d", reset, clock)
		}
		count, err := m.define(k.Volume)
		if err != nil {
			return err
		}
		// What an earlier call sealed, and was cut off before it counted, is for the next value:
		// with other limits, maybe. It must never come to be valid beside this one.
		if err := m.increment(count.NamedHandle); err != nil {
			return err
		}
		count.value++
		return c.write(m, f, count, k)
	})
}

// write seals a key to the value that the counter has next, and makes that its value.
func (c *Cache) write(m *module, f *file, count counter, k *keyclient.Key) error {
	f.index, f.counter = uint32(count.Handle), count.value+1
	plain, err := content(k)
	if err != nil {
		return err
	}
	defer plain.Close()
	key, err := secret.Random(32)
	if err != nil {
		return err
	}
	defer key.Close()
	err = key.Use(func(key []byte) error {
		return plain.Use(func(plain []byte) (err error) {
			secret.Do(func() {
				if err = f.seal(key, plain); err == nil {
					err = m.protect(f, count.NamedHandle, key)
				}
			})
			return err
		})
	})
	if err != nil {
		return err
	}
	present, next := c.names(f.volume)
	if err := c.cut("before the file"); err != nil {
		return err
	}
	if err := config.ReplaceFile(next, f.encode()); err != nil {
		return err
	}
	if err := c.cut("before the counter"); err != nil {
		return err
	}
	if err := m.increment(count.NamedHandle); err != nil {
		return err
	}
	if err := c.cut("behind the counter"); err != nil {
		return err
	}
	return errors.Join(os.Rename(next, present), config.SyncDir(c.Dir))
}

// Open returns a key that is kept, and how far it has been used. The first use in a boot
// counts before the key is returned. The caller closes the key.
func (c *Cache) Open(ctx context.Context, volume string) (k *keyclient.Key, use Use, err error) {
	err = c.with(ctx, func(m *module) error {
		f, count, err := c.newest(m, volume)
		if err != nil {
			return err
		}
		reset, clock, err := c.allowed(m, f)
		if err != nil {
			return err
		}
		secret.Do(func() {
			var key []byte
			if key, err = m.unprotect(f, count.NamedHandle); err == nil {
				k, err = f.open(key)
				secret.Wipe(key)
			}
		})
		if err != nil {
			return err
		}
		if f.written != reset || f.boots == 0 {
			if f.written = reset; f.boots == 0 {
				f.since = clock
			}
			f.boots++
			err = c.write(m, f, count, k)
		}
		if err == nil {
			err = c.remember(volume, attested{reset, f.pcrs, f.digest})
		}
		if err != nil {
			return errors.Join(err, k.DEK.Close())
		}
		use = Use{Boots: f.boots, Since: since(f, clock), BootsLeft: f.lastBoot - reset, TimeLeft: ms(f.lastTime - clock)}
		return nil
	})
	if err != nil {
		return nil, Use{}, fmt.Errorf("kept key of volume %q: %w", volume, err)
	}
	return k, use, nil
}

// since is how long ago the first use was. After a power cut the clock may be a little behind
// what it was.
func since(f *file, clock uint64) time.Duration { return ms(clock - min(f.since, clock)) }

func ms(n uint64) time.Duration { return time.Duration(n) * time.Millisecond }

// newest is the file that the counter means.
func (c *Cache) newest(m *module, volume string) (*file, counter, error) {
	present, next := c.names(volume)
	var why error
	var all []*file
	for _, path := range []string{present, next} {
		f, err := readFile(path, volume)
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			why = err
		case string(f.parent) != string(m.name):
			why = ErrOtherTPM
		default:
			all = append(all, f)
		}
	}
	if len(all) == 0 {
		if why == nil {
			why = ErrNone
		}
		return nil, counter{}, why
	}
	count, err := m.theCounter(volume)
	if err != nil {
		return nil, counter{}, err
	}
	for _, f := range all {
		if f.counter == count.value && f.index == uint32(count.Handle) {
			return f, count, nil
		}
	}
	return nil, counter{}, fmt.Errorf("%w: it is of the counter's value %d, which is %d", ErrStale, all[0].counter, count.value)
}

// allowed says what is wrong before the TPM would refuse without a word.
func (c *Cache) allowed(m *module, f *file) (reset uint32, clock uint64, err error) {
	digest, err := m.registers(f.pcrs)
	if err != nil {
		return 0, 0, err
	}
	if reset, clock, err = m.now(); err != nil {
		return 0, 0, err
	}
	restarts, err := m.restarts()
	switch {
	case err != nil:
		return 0, 0, err
	case restarts > 0:
		return 0, 0, fmt.Errorf("%w: it was started %d times since without a reset, which nobody counts", ErrBoots, restarts)
	case digest != f.digest:
		return 0, 0, ErrRegisters
	case reset > f.lastBoot:
		return 0, 0, fmt.Errorf("%w: reset count %d, the last one was %d", ErrBoots, reset, f.lastBoot)
	case clock > f.lastTime:
		return 0, 0, fmt.Errorf("%w: since %s of the TPM's clock", ErrTime, ms(clock-f.lastTime).Round(time.Second))
	}
	return reset, clock, nil
}

// Forget destroys what is kept of a volume, in the TPM first: a file that is put back is
// worth nothing. It is fine if nothing is kept, and had says whether something was.
func (c *Cache) Forget(ctx context.Context, volume string) (had bool, err error) {
	if none, err := c.untouched(volume); none || err != nil {
		return false, err
	}
	err = c.with(ctx, func(m *module) (err error) {
		had, err = m.destroy(volume)
		present, next := c.names(volume)
		for _, path := range []string{present, next} {
			if removeErr := os.Remove(path); removeErr == nil {
				had = true
			} else if !errors.Is(removeErr, fs.ErrNotExist) {
				err = errors.Join(err, removeErr)
			}
		}
		return err
	})
	if err != nil {
		return had, fmt.Errorf("destroy the kept key of volume %q: %w", volume, err)
	}
	return had, nil
}

// untouched reports that the TPM has no counter of the volume, and the disk no file. It costs a
// command or two.
func (c *Cache) untouched(volume string) (bool, error) {
	if c.Has(volume) {
		return false, nil
	}
	dev, err := tpm.OpenDevice(c.Device)
	if err != nil {
		return false, fmt.Errorf("destroy the kept key of volume %q: %w", volume, err)
	}
	defer dev.Close()
	mine, _, err := (&module{TPMCloser: dev}).find(volume)
	return err == nil && len(mine) == 0, nil // who goes on says what is wrong
}

// Has reports whether there is a file of the volume. Whether it opens is another question.
func (c *Cache) Has(volume string) bool {
	present, next := c.names(volume)
	for _, path := range []string{present, next} {
		if _, err := os.Lstat(path); err == nil {
			return true
		}
	}
	return false
}

// Used is what the file says of openings of which the key service has not been told, and
// whether there were any. It decides nothing.
func (c *Cache) Used(ctx context.Context, volume string) (use Use, ok bool) {
	present, next := c.names(volume)
	var last *file
	for _, path := range []string{present, next} {
		if f, err := readFile(path, volume); err == nil && f.boots > 0 && (last == nil || f.boots > last.boots) {
			last = f
		}
	}
	if last == nil {
		return use, false
	}
	use.Boots = last.boots
	_ = c.with(ctx, func(m *module) error {
		_, clock, err := m.now()
		if err == nil {
			use.Since = since(last, clock)
		}
		return err
	})
	return use, true
}

// attested is the first that the key service attested in a boot.
type attested struct {
	Reset  uint32   `json:"reset"`
	PCRs   uint32   `json:"pcrs"`
	Digest [32]byte `json:"digest"`
}

func (c *Cache) runFile(volume string) string { return filepath.Join(c.RunDir, volume+".offline") }

// attested is what a key is sealed to: what the registers held when the key service first
// allowed it in this boot, as they will when the volume is opened in the next one. Later in
// a boot systemd has measured more of it, and so the key service attests other values. Those
// first values must have been there when they were attested.
func (c *Cache) attested(m *module, volume string, pcrs uint32, digest [32]byte, reset uint32) (out [32]byte, err error) {
	var a attested
	data, err := config.ReadPublicFile(c.runFile(volume), 1024)
	if err == nil && json.Unmarshal(data, &a) == nil && a.Reset == reset && a.PCRs == pcrs {
		return a.Digest, nil
	}
	now, err := m.registers(pcrs)
	if err != nil {
		return out, err
	}
	if now != digest {
		return out, ErrMoved
	}
	return digest, c.remember(volume, attested{reset, pcrs, digest})
}

func (c *Cache) remember(volume string, a attested) error {
	data, err := json.Marshal(a)
	if err == nil {
		err = os.MkdirAll(c.RunDir, 0o700)
	}
	if err != nil {
		return err
	}
	return config.ReplaceFile(c.runFile(volume), data)
}

// readFile reads a file that has to be of this volume.
func readFile(path, volume string) (*file, error) {
	data, err := config.ReadPublicFile(path, maxFile)
	if err != nil {
		return nil, err
	}
	f, err := parse(data)
	if err != nil {
		return nil, err
	}
	if f.volume != volume {
		return nil, fmt.Errorf("%w: it is of volume %q", ErrFormat, f.volume)
	}
	return f, nil
}
