package offline

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/keyagent/keyagent/attestation/tpm"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/keyclient"
	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/test/sim/swtpm"
)

// machine is a machine with a TPM and a disk.
type machine struct {
	*Cache
	t   testing.TB
	tpm *swtpm.TPM
}

const (
	volume = "data"
	kernel = 4 // the register that the kernel is measured into
)

func newMachine(t testing.TB) *machine {
	t.Helper()
	m := &machine{t: t, tpm: swtpm.New(t, nil)}
	m.Cache = New(Options{Device: m.tpm.Device, Dir: filepath.Join(t.TempDir(), "kept"), RunDir: t.TempDir()})
	m.measure(1)
	return m
}

func (m *machine) must(err error) {
	m.t.Helper()
	if err != nil {
		m.t.Fatal(err)
	}
}

// measure is what a boot does: firmware measures the kernel.
func (m *machine) measure(what byte) {
	m.t.Helper()
	m.must(swtpm.Extend(m.tpm.Device, kernel, bytes.Repeat([]byte{what}, 32)))
}

// boot is a power cycle, and what is in memory is gone.
func (m *machine) boot(what byte) {
	m.t.Helper()
	m.tpm.Restart(m.t)
	m.booted(what)
}

func (m *machine) booted(what byte) {
	m.t.Helper()
	m.must(os.RemoveAll(m.RunDir))
	m.measure(what)
}

// hold runs f with the TPM.
func (m *machine) hold(f func(*module) error) error { return m.with(m.t.Context(), f) }

// key is what the key service gives, with leave to keep it.
func (m *machine) key(limit time.Duration, boots uint32) *keyclient.Key {
	m.t.Helper()
	dek, err := secret.From(bytes.Repeat([]byte{0x5a}, 32))
	m.must(err)
	m.t.Cleanup(func() { dek.Close() })
	k := &keyclient.Key{
		DEK: dek, State: keyclient.Active, Volume: volume, UUID: "11111111-2222-3333-4444-555555555555", Generation: 3, KeyVersion: 2,
		Writers: keyclient.WritersOne, Lease: &keyclient.Lease{ID: bytes.Repeat([]byte{0xbb}, 16), Term: 2 * time.Minute},
		MACs: keyclient.MACs{Header: [32]byte{1}, Copies: [2][32]byte{{2}, {3}}},
	}
	k.Offline = &keyclient.Offline{OfflineLimits: keyclient.OfflineLimits{For: limit, Boots: boots}, PCRs: []uint32{kernel, 7}}
	m.must(m.hold(func(t *module) (err error) {
		k.Offline.Digest, err = t.registers(1<<kernel | 1<<7)
		return err
	}))
	return k
}

func (m *machine) keep(limit time.Duration, boots uint32) {
	m.t.Helper()
	m.must(m.Keep(m.t.Context(), m.key(limit, boots)))
}

// opens wants the key.
func (m *machine) opens(what string) Use {
	m.t.Helper()
	k, use, err := m.Open(m.t.Context(), volume)
	if err != nil {
		m.t.Fatalf("%s: %v", what, err)
	}
	defer k.DEK.Close()
	want := m.key(time.Hour, 1)
	if !k.DEK.Equal(want.DEK) || k.UUID != want.UUID || k.Generation != 3 || k.KeyVersion != 2 || k.MACs != want.MACs || k.State != keyclient.Active ||
		k.Writers != keyclient.WritersOne || !bytes.Equal(k.Lease.ID, want.Lease.ID) || k.Lease.Term != want.Lease.Term || k.Lease.Bound || k.Offline != nil {
		m.t.Errorf("%s: %+v", what, k)
	}
	return use
}

// refused wants an error, and that the TPM would refuse as well if this program did not look:
// each file that there is, whatever it says.
func (m *machine) refused(what string, want error) {
	m.t.Helper()
	k, _, err := m.Open(m.t.Context(), volume)
	if k != nil || !errors.Is(err, want) {
		m.t.Errorf("%s: got %v, want %v", what, err, want)
	}
	present, next := m.names(volume)
	for _, path := range []string{present, next} {
		f, err := readFile(path, volume)
		if err != nil {
			continue
		}
		_ = m.hold(func(t *module) error {
			count, err := t.theCounter(volume)
			if err != nil {
				return nil
			}
			if key, err := t.unprotect(f, count.NamedHandle); err == nil || len(key) > 0 {
				m.t.Errorf("%s: the TPM gives the key of %s", what, filepath.Base(path))
			}
			return nil
		})
	}
}

// jump sets the TPM's clock ahead, as its owner can.
func (m *machine) jump(by time.Duration) {
	m.t.Helper()
	m.must(swtpm.AdvanceClock(m.tpm.Device, by))
}

// shutdown is what the kernel tells the TPM before a reboot.
func (m *machine) shutdown() {
	m.t.Helper()
	m.must(m.hold(func(t *module) error {
		_, err := tpm2.Shutdown{ShutdownType: tpm2.TPMSUClear}.Execute(t)
		return err
	}))
}

// With the key service down a volume opens for as many boots as were granted. An agent that
// is restarted, and a second opening, cost nothing.
func TestAKeptKeyOpensForItsBootsAlone(t *testing.T) {
	m := newMachine(t)
	m.keep(24*time.Hour, 3)
	for boot := range uint32(4) { // the one in which it was kept, and three more
		for n := range 3 {
			again := New(m.Options)
			m.Cache = again
			use := m.opens("within its boots")
			if use.Boots != boot+1 || use.BootsLeft != 3-boot || use.Since < 0 || use.TimeLeft > 24*time.Hour+time.Minute || use.TimeLeft < 23*time.Hour {
				t.Errorf("boot %d, opening %d: %+v", boot, n, use)
			}
		}
		m.boot(1)
	}
	m.refused("an extra boot", ErrBoots)
	m.refused("the same once more", ErrBoots)
	if use, ok := m.Used(t.Context(), volume); !ok || use.Boots != 4 {
		t.Errorf("%+v, %v", use, ok)
	}
	// The key service is back.
	m.keep(24*time.Hour, 1)
	if _, ok := m.Used(t.Context(), volume); ok {
		t.Error("what it was told of is still to be reported")
	}
	m.boot(1)
	m.opens("after another grant")
}

// A boot that opens nothing is one all the same.
func TestABootCountsWithoutAnOpening(t *testing.T) {
	m := newMachine(t)
	m.keep(24*time.Hour, 2)
	m.boot(1)
	m.boot(1)
	m.opens("the last boot")
	m.boot(1)
	m.refused("an extra boot", ErrBoots)
}

func TestAnotherKernelGetsNoKey(t *testing.T) {
	m := newMachine(t)
	m.keep(24*time.Hour, 3)
	m.boot(2)
	m.refused("a changed kernel", ErrRegisters)
	m.boot(1)
	m.opens("the kernel from before")
	m.measure(2)
	m.refused("something measured since", ErrRegisters)
}

// The TPM's clock is the only one. It goes ahead alone, also where its owner sets it.
func TestTheTimeOfAKeptKeyEnds(t *testing.T) {
	m := newMachine(t)
	m.keep(24*time.Hour, 3)
	m.jump(23 * time.Hour)
	m.shutdown()
	m.boot(1)
	m.opens("within its time")
	m.jump(2 * time.Hour)
	m.refused("after a day", ErrTime)
	m.shutdown()
	m.boot(1)
	m.refused("after a day, and a reset", ErrTime)
}

// A power cut takes the clock back to what the TPM had written last, and not the boots.
func TestAPowerCutGivesNoBoot(t *testing.T) {
	m := newMachine(t)
	m.keep(time.Hour, 2)
	for range 2 {
		m.jump(50 * time.Minute)
		m.boot(1)
		if use := m.opens("within its boots"); use.TimeLeft > time.Hour+time.Minute {
			t.Errorf("%+v", use)
		}
	}
	m.jump(50 * time.Minute)
	m.boot(1)
	m.refused("an extra boot", ErrBoots)
}

// A TPM whose state somebody put back, and a file from before, are both noticed: they do not
// fit each other.
func TestAnOlderStateIsNoticed(t *testing.T) {
	m := newMachine(t)
	before := m.tpm.Snapshot(t)
	m.keep(24*time.Hour, 3)
	present, _ := m.names(volume)
	file, err := os.ReadFile(present)
	m.must(err)
	kept := m.tpm.Snapshot(t)
	m.boot(1)
	m.opens("the first boot")

	m.tpm.RollBack(t, kept)
	m.booted(1)
	m.refused("the TPM's state of before the first use", ErrStale)
	m.tpm.RollBack(t, before)
	m.booted(1)
	m.refused("the TPM's state of before it was kept", ErrNone)

	m.keep(24*time.Hour, 3)
	m.boot(1)
	m.opens("kept anew")
	now, err := os.ReadFile(present)
	m.must(err)
	m.must(os.WriteFile(present, file, 0o600))
	m.refused("an older file", ErrStale)
	m.must(os.WriteFile(present, now, 0o600))
	m.opens("the newest file")
}

// What was destroyed stays destroyed, if its file comes back and also when another key is
// kept.
func TestWhatWasDestroyedStaysSo(t *testing.T) {
	m := newMachine(t)
	m.keep(24*time.Hour, 3)
	present, next := m.names(volume)
	file, err := os.ReadFile(present)
	m.must(err)
	m.must(os.Remove(present)) // by the host, for a moment
	if had, err := m.Forget(t.Context(), volume); err != nil || !had {
		t.Fatalf("%v, %v", had, err)
	}
	m.must(os.WriteFile(present, file, 0o600))
	m.refused("its file put back", ErrNone)
	m.keep(24*time.Hour, 3)
	m.must(os.WriteFile(next, file, 0o600))
	m.opens("another one")
	m.must(os.WriteFile(present, file, 0o600))
	m.refused("its file in the place of another one", ErrStale)
	for range 2 {
		_, err := m.Forget(t.Context(), volume)
		m.must(err)
	}
	if m.Has(volume) {
		t.Error("a file is left")
	}
}

func TestACloneOfTheDiskOpensNothing(t *testing.T) {
	m := newMachine(t)
	m.keep(24*time.Hour, 3)
	other := newMachine(t)
	m.must(os.CopyFS(other.Dir, os.DirFS(m.Dir)))
	other.refused("a clone beside another TPM", ErrOtherTPM)
	other.keep(time.Hour, 1)
	m.must(os.RemoveAll(other.Dir))
	m.must(os.CopyFS(other.Dir, os.DirFS(m.Dir)))
	other.refused("a clone, and a counter", ErrOtherTPM)
	m.opens("its own machine")
}

// Two folders of state have one counter for a volume: the key that was kept last is valid.
func TestTheLastOfTwoFoldersCounts(t *testing.T) {
	m := newMachine(t)
	m.keep(time.Hour, 1)
	one := m.Cache
	o := m.Options
	o.Dir = filepath.Join(t.TempDir(), "another")
	m.Cache = New(o)
	m.keep(time.Hour, 1)
	m.opens("the last")
	m.Cache = one
	m.refused("the first", ErrStale)
	// Two volumes have nothing to do with each other.
	k := m.key(time.Hour, 1)
	k.Volume = "logs"
	m.must(m.Keep(t.Context(), k))
	m.keep(time.Hour, 1)
	if k, _, err := m.Open(t.Context(), "logs"); err != nil {
		t.Error(err)
	} else {
		k.DEK.Close()
	}
	_, err := m.Forget(t.Context(), "logs")
	m.must(err)
	m.opens("the other volume")
	present, _ := m.names(volume)
	m.must(os.Rename(present, filepath.Join(m.Dir, "logs.key")))
	if _, _, err := m.Open(t.Context(), "logs"); !errors.Is(err, ErrFormat) {
		t.Errorf("another volume's file: %v", err)
	}
}

// An attacker who writes the disk can put any limit into a file; the TPM refuses all of them.
func TestAFileThatWasChangedOpensNothing(t *testing.T) {
	m := newMachine(t)
	m.keep(time.Hour, 1)
	present, _ := m.names(volume)
	whole, err := os.ReadFile(present)
	m.must(err)
	for name, change := range map[string]func(*file){
		"more boots":       func(f *file) { f.lastBoot += 100 },
		"more time":        func(f *file) { f.lastTime += 1 << 40 },
		"other registers":  func(f *file) { f.pcrs = 1 << 16 },
		"used":             func(f *file) { f.boots++ },
		"used in this run": func(f *file) { f.written++ },
		"since":            func(f *file) { f.since++ },
		"another content":  func(f *file) { f.sealed[len(f.sealed)-1] ^= 1 },
		"another object":   func(f *file) { f.private[len(f.private)-1] ^= 1 },
		"no content":       func(f *file) { f.sealed = f.sealed[:16] },
	} {
		f, err := parse(bytes.Clone(whole))
		m.must(err)
		change(f)
		m.must(os.WriteFile(present, f.encode(), 0o600))
		if k, _, err := m.Open(t.Context(), volume); err == nil {
			k.DEK.Close()
			t.Errorf("%s: it opens", name)
		}
	}
	m.must(os.WriteFile(present, whole, 0o600))
	m.opens("as it was")
}

var errCut = errors.New("cut off")

// A crash at any step costs at most the kept key, and gives no boot more. Whatever became of
// it, the next grant is kept.
func TestACrashGivesNothing(t *testing.T) {
	for _, at := range []string{"before the file", "before the counter", "behind the counter"} {
		m := newMachine(t)
		m.keep(24*time.Hour, 2)
		m.boot(1)
		m.cut = func(step string) error {
			if step == at {
				return errCut
			}
			return nil
		}
		if _, _, err := m.Open(t.Context(), volume); !errors.Is(err, errCut) {
			t.Fatalf("%s: %v", at, err)
		}
		m.boot(1) // the second
		m.Cache = New(m.Options)
		m.opens("after a crash " + at)
		m.boot(1)
		m.refused("an extra boot, after a crash "+at, ErrBoots)

		m.cut = func(step string) error {
			if step == at {
				return errCut
			}
			return nil
		}
		if err := m.Keep(t.Context(), m.key(24*time.Hour, 1)); !errors.Is(err, errCut) {
			t.Fatalf("%s: %v", at, err)
		}
		m.Cache = New(m.Options)
		if at == "behind the counter" {
			m.opens("a grant that was cut off " + at)
		} else {
			m.refused("a grant that was cut off "+at, ErrStale)
		}
		m.keep(24*time.Hour, 1)
		m.opens("the next grant")
	}
}

// A key is sealed to what the key service verified, and not to what is there by now. What
// was measured since the first time in a boot changes nothing for the next one.
func TestAKeyIsKeptForWhatWasAttested(t *testing.T) {
	m := newMachine(t)
	early := m.key(24*time.Hour, 3)
	m.measure(9)
	if err := m.Keep(t.Context(), early); !errors.Is(err, ErrMoved) {
		t.Errorf("registers that moved: %v", err)
	}
	m.refused("registers that moved", ErrNone)
	m.boot(1)
	m.keep(24*time.Hour, 3)
	m.measure(9) // a later phase of the boot
	m.keep(24*time.Hour, 3)
	m.refused("in the later phase", ErrRegisters)
	m.boot(1)
	m.opens("in the next boot")
	m.measure(9)
	m.keep(24*time.Hour, 3) // the key service is back
	m.boot(1)
	m.opens("in the one after that")
}

func TestAKeyIsKeptOnlyWithLeave(t *testing.T) {
	m := newMachine(t)
	for name, change := range map[string]func(*keyclient.Key){
		"no leave":       func(k *keyclient.Key) { k.Offline = nil },
		"no lease":       func(k *keyclient.Key) { k.Lease = nil },
		"a bound lease":  func(k *keyclient.Key) { k.Lease.Bound = true },
		"not active":     func(k *keyclient.Key) { k.State = keyclient.Formatted },
		"no UUID":        func(k *keyclient.Key) { k.UUID = strings.Repeat("x", 100) },
		"too many boots": func(k *keyclient.Key) { k.Offline.Boots = 1<<32 - 1 },
	} {
		k := m.key(time.Hour, 1)
		change(k)
		if err := m.Keep(t.Context(), k); err == nil {
			t.Errorf("%s: it is kept", name)
		}
	}
	m.refused("nothing", ErrNone)
}

func TestAPasswordOfTheOwnerIsNamed(t *testing.T) {
	m := newMachine(t)
	m.must(m.hold(func(t *module) error {
		_, err := tpm2.HierarchyChangeAuth{
			AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)}, NewAuth: tpm2.TPM2BAuth{Buffer: []byte("owner")},
		}.Execute(t)
		return err
	}))
	k := &keyclient.Key{State: keyclient.Active, Volume: volume, Lease: &keyclient.Lease{}, Offline: &keyclient.Offline{PCRs: []uint32{4}}}
	err := m.Keep(t.Context(), k)
	if !errors.Is(err, ErrOwnerAuth) || failure.Of(err).Class != failure.Configuration || !strings.Contains(failure.Of(err).Hint, "changeauth") {
		t.Errorf("%v, hint %q", err, failure.Of(err).Hint)
	}
}

func TestAMachineWithoutATPMKeepsNothing(t *testing.T) {
	c := New(Options{Device: "unix:" + filepath.Join(t.TempDir(), "none"), Dir: t.TempDir(), RunDir: t.TempDir()})
	if _, _, err := c.Open(t.Context(), volume); err == nil {
		t.Error("it opens")
	}
	if _, err := c.Forget(t.Context(), volume); err == nil {
		t.Error("what is in a TPM that does not answer may be there still")
	}
	ctx, cancel := context.WithCancel(t.Context())
	unlock, err := c.lock(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	cancel()
	if _, _, err := c.Open(ctx, volume); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

// tap hears everything on the bus.
type tap struct {
	transport.TPMCloser
	heard bytes.Buffer
}

func (p *tap) Send(cmd []byte) ([]byte, error) {
	rsp, err := p.TPMCloser.Send(cmd)
	p.heard.Write(cmd)
	p.heard.Write(rsp)
	return rsp, err
}

func TestWhoHearsTheBusHearsNoKey(t *testing.T) {
	m := newMachine(t)
	dev, err := tpm.OpenDevice(m.tpm.Device)
	m.must(err)
	defer dev.Close()
	bus := &tap{TPMCloser: dev}
	s, err := load(bus)
	m.must(err)
	key := bytes.Repeat([]byte("heard?"), 6)[:32]
	f := &file{volume: volume, pcrs: 1 << kernel, lastBoot: 1 << 31, lastTime: 1 << 60}
	f.digest, err = s.registers(f.pcrs)
	m.must(err)
	count, err := s.define(volume)
	m.must(err)
	f.counter = count.value
	m.must(s.protect(f, count.NamedHandle, key))
	got, err := s.unprotect(f, count.NamedHandle)
	m.must(err)
	if !bytes.Equal(got, key) {
		t.Fatalf("%x", got)
	}
	if bytes.Contains(bus.heard.Bytes(), key) {
		t.Error("the key is on the bus")
	}
}

// A machine that goes to sleep, and is reset in place of being woken, begins anew without a
// reset that the TPM counts. It opens nothing until the next one.
func TestAStartThatIsNoResetOpensNothing(t *testing.T) {
	m := newMachine(t)
	m.keep(24*time.Hour, 3)
	m.boot(1)
	m.opens("after a reset")
	var before, after uint32
	m.must(m.hold(func(t *module) (err error) {
		if before, _, err = t.now(); err == nil {
			_, err = tpm2.Shutdown{ShutdownType: tpm2.TPMSUState}.Execute(t)
		}
		return err
	}))
	m.boot(1)
	m.must(m.hold(func(t *module) (err error) { after, _, err = t.now(); return err }))
	if before != after {
		t.Fatalf("it is a reset: %d, then %d", before, after)
	}
	m.refused("after a restart", ErrBoots)
	m.must(m.hold(func(t *module) error {
		f, count, err := m.newest(t, volume)
		if err != nil {
			return err
		}
		if _, err := t.unprotect(f, count.NamedHandle); err == nil {
			m.t.Error("the TPM itself gives it")
		}
		return nil
	}))
	m.boot(1)
	m.opens("after the next reset")
}

// The vectors of docs/spec/offline.md.
func TestTheFormatHasItsVector(t *testing.T) {
	k := (&machine{t: t}).vector()
	f := vectorFile()
	plain, err := content(k)
	if err != nil {
		t.Fatal(err)
	}
	if err := plain.Use(func(p []byte) error { return f.seal(bytes.Repeat([]byte{7}, 32), p) }); err != nil {
		t.Fatal(err)
	}
	got := map[string]string{"head": hex.EncodeToString(f.head()), "sealed": hex.EncodeToString(f.sealed)}
	digest, err := f.policyDigest(tpm2.NamedHandle{Handle: firstIndex, Name: tpm2.TPM2BName{Buffer: append([]byte{0, 0xb}, bytes.Repeat([]byte{9}, 32)...)}})
	if err != nil {
		t.Fatal(err)
	}
	got["policy"] = hex.EncodeToString(digest)
	spec, err := os.ReadFile("../../docs/spec/offline.md")
	if err != nil {
		t.Fatal(err)
	}
	text := strings.Join(strings.Fields(string(spec)), "")
	for name, v := range got {
		if !strings.Contains(text, v) {
			t.Errorf("%s: %s", name, v)
		}
	}
	again, err := f.open(bytes.Repeat([]byte{7}, 32))
	if err != nil {
		t.Fatal(err)
	}
	defer again.DEK.Close()
	if !again.DEK.Equal(k.DEK) {
		t.Error("another key")
	}
}

func (m *machine) vector() *keyclient.Key {
	m.t.Helper()
	b := make([]byte, 32)
	for i := range b {
		b[i] = byte(i)
	}
	dek, err := secret.From(b)
	m.must(err)
	m.t.Cleanup(func() { dek.Close() })
	fill := func(b byte) [32]byte { return [32]byte(bytes.Repeat([]byte{b}, 32)) }
	return &keyclient.Key{DEK: dek, Volume: "data-1", UUID: "11111111-2222-3333-4444-555555555555", Generation: 1, KeyVersion: 1,
		MACs:  keyclient.MACs{Header: fill(0x11), Copies: [2][32]byte{fill(0x22), fill(0x33)}},
		Lease: &keyclient.Lease{ID: bytes.Repeat([]byte{0xaa}, 16), Term: 2 * time.Minute}}
}

func vectorFile() *file {
	return &file{volume: "data-1", index: firstIndex, counter: 5, pcrs: 1<<4 | 1<<11, digest: [32]byte(bytes.Repeat([]byte{0xcc}, 32)),
		lastBoot: 12, lastTime: 86_400_000, parent: append([]byte{0, 0xb}, bytes.Repeat([]byte{0xdd}, 32)...), public: []byte{1}, private: []byte{2}}
}

func TestAFileOfAnotherVersionIsRefused(t *testing.T) {
	f := vectorFile()
	f.sealed = []byte{3}
	good := f.encode()
	if _, err := parse(good); err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{
		"nothing": nil, "another version": bytes.Replace(good, []byte("key 1"), []byte("key 2"), 1), "cut off": good[:len(good)-1],
		"something behind it": append(bytes.Clone(good), 0), "too long": append(bytes.Clone(good), make([]byte, maxFile)...),
	} {
		if _, err := parse(data); !errors.Is(err, ErrFormat) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, change := range map[string]func(*file){
		"no registers": func(f *file) { f.pcrs = 0 }, "a register that there is not": func(f *file) { f.pcrs = 1 << 24 },
		"another's index": func(f *file) { f.index = firstIndex + indices }, "an index below": func(f *file) { f.index = firstIndex - 1 },
		"a path": func(f *file) { f.volume = "../data" }, "no volume": func(f *file) { f.volume = "" }, "no parent": func(f *file) { f.parent = nil },
	} {
		f := vectorFile()
		f.sealed = []byte{3}
		change(f)
		if _, err := parse(f.encode()); !errors.Is(err, ErrFormat) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzFile(f *testing.F) {
	v := vectorFile()
	v.sealed = bytes.Repeat([]byte{3}, 17)
	f.Add(v.encode())
	f.Add([]byte(magic))
	f.Fuzz(func(t *testing.T, data []byte) {
		got, err := parse(data)
		if err != nil {
			return
		}
		if !bytes.Equal(got.encode(), data) {
			t.Error("what it accepts does not encode to the same bytes")
		}
		_, _ = got.open(make([]byte, 32))
		_, _ = keyOf(got.volume, data)
	})
}
