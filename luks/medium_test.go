package luks

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/keyagent/keyagent/internal/secret"
)

// ram is a disk with a volatile cache, and with faults. Sectors that were
// written since the last Sync may or may not survive a crash, each for itself.
type ram struct {
	data    []byte           // what a reader sees
	durable map[int64][]byte // sectors as they were at the last Sync, where they differ

	readErr    error // for reads at or beyond failFrom
	shortRead  bool  // a read there ends early instead
	failFrom   int64
	writesLeft int // 0 fails the next write or Sync; negative never fails
}

func newRAM(size int64) *ram {
	return &ram{data: make([]byte, size), durable: map[int64][]byte{}, failFrom: size, writesLeft: -1}
}

func (r *ram) disk() *disk { return &disk{medium: r, path: "ram", size: int64(len(r.data))} }

func (r *ram) ReadAt(p []byte, at int64) (int, error) {
	n := copy(p, r.data[at:])
	if at+int64(n) > r.failFrom {
		n = int(max(0, r.failFrom-at))
		if r.shortRead {
			return n, io.EOF
		}
		return n, r.readErr
	}
	return n, nil
}

var errPower = errors.New("the power is gone")

func (r *ram) spend() error {
	if r.writesLeft == 0 {
		return errPower
	}
	r.writesLeft--
	return nil
}

func (r *ram) WriteAt(p []byte, at int64) (int, error) {
	failed := r.spend()
	// A write that fails may have reached the cache all the same.
	for i := at / sectorSize; i*sectorSize < at+int64(len(p)); i++ {
		if _, kept := r.durable[i]; !kept {
			r.durable[i] = append([]byte(nil), r.data[i*sectorSize:(i+1)*sectorSize]...)
		}
	}
	copy(r.data[at:], p)
	if failed != nil {
		return 0, failed
	}
	return len(p), nil
}

func (r *ram) Sync() error {
	if err := r.spend(); err != nil {
		return err
	}
	clear(r.durable)
	return nil
}

// kill ends the process: what it wrote is in the cache still.
func (r *ram) kill() { r.writesLeft = -1 }

// crash drops each unsynced sector with the given probability and restarts.
func (r *ram) crash(rng *rand.Rand, loss float64) {
	for i, old := range r.durable {
		if rng.Float64() < loss {
			copy(r.data[i*sectorSize:], old)
		}
	}
	clear(r.durable)
	r.writesLeft = -1
}

// provision is what a caller with a pending record does, at the first try and
// after every crash.
func provision(d *disk, id Identity, dek *secret.Bytes, h *Header) (MACs, State, error) {
	state, err := d.state(id, dek)
	if err != nil {
		return MACs{}, state, err
	}
	switch state {
	case StateBlank, StateInterrupted:
		return h.macs, state, d.write(id, dek, h, inTime)
	case StateLUKS2:
		found, err := d.adopt(id, dek)
		if err != nil {
			return MACs{}, state, err
		}
		return found.macs, state, nil
	default:
		return MACs{}, state, d.checkBlank(0)
	}
}

// The process dies or power is lost at every write and every flush of a format,
// and again during each later try; of what was not flushed, sectors
// survive a loss of power in any combination.
func TestAFormatThatIsCutOffAnywhereConverges(t *testing.T) {
	dek := dataKey(t)
	// Four headers stand for all that libcryptsetup would make.
	var made []*Header
	for range 4 {
		made = append(made, newTestHeader(t, idData, dek))
	}
	seen := map[State]int{}
	for trial := range 60 {
		rng := rand.New(rand.NewPCG(uint64(trial), 1))
		r := newRAM(minDevice)
		var completed *MACs
		for attempt := 0; ; attempt++ {
			if attempt < 5 {
				r.writesLeft = rng.IntN(8) // a format has three writes and four flushes
			}
			mac, state, err := provision(r.disk(), idData, dek, made[rng.IntN(len(made))])
			seen[state]++
			if err == nil {
				if completed != nil && mac != *completed {
					t.Fatalf("trial %d: a completed header was replaced", trial)
				}
				if attempt >= 5 {
					break
				}
				completed = &mac
			} else if !errors.Is(err, errPower) {
				t.Fatalf("trial %d, attempt %d: state %v: %v", trial, attempt, state, err)
			}
			if loss := rng.IntN(4); loss == 0 {
				r.kill()
			} else {
				r.crash(rng, float64(loss-1)/2)
			}
		}
		if !allZero(r.data[guardedSize:]) {
			t.Fatalf("trial %d: bytes beyond the header were written", trial)
		}
	}
	t.Logf("states met after a crash: %v", seen)
	for _, state := range []State{StateBlank, StateInterrupted, StateLUKS2} {
		if seen[state] == 0 {
			t.Errorf("state %v was never met", state)
		}
	}
}

// A sector that is torn is outside what a disk promises. It may stop a format
// for good, but must never let one go over data or be taken for a header.
func TestATornSectorIsRefusedAndNeverTakenForAHeader(t *testing.T) {
	dek := dataKey(t)
	h := newTestHeader(t, idData, dek)
	marker, err := newMarker(idData, dek)
	must(t, err)
	for cut := 1; cut < sectorSize; cut += 7 {
		r := newRAM(minDevice)
		copy(r.data, h.raw)
		copy(r.data[cut:sectorSize], marker[cut:])
		_, state, err := provision(r.disk(), idData, dek, h)
		if err == nil || state == StateInterrupted || state == StateBlank {
			t.Fatalf("cut at %d: state %v, error %v", cut, state, err)
		}
	}
}

// Case 13: a disk that cannot be read is in no state at all.
func TestADiskThatFailsIsNeverBlank(t *testing.T) {
	dek := dataKey(t)
	h := newTestHeader(t, idData, dek)
	for _, failFrom := range []int64{0, 1, sectorSize, binarySize, metadataSize + 1, areasOffset, guardedSize - 1} {
		for _, short := range []bool{false, true} {
			for _, blank := range []bool{false, true} {
				t.Run(fmt.Sprintf("from byte %d, short %v, blank %v", failFrom, short, blank), func(t *testing.T) {
					r := newRAM(minDevice)
					if !blank {
						copy(r.data, h.raw)
					}
					r.failFrom, r.readErr, r.shortRead = failFrom, unix.EIO, short
					want := ErrIO
					if short {
						want = ErrShortHeader
					}
					before := append([]byte(nil), r.data...)
					_, err := r.disk().examine(idData, h.macs, dek)
					wantError(t, err, want)
					_, err = r.disk().adopt(idData, dek)
					wantError(t, err, want)
					if blank || failFrom < sectorSize {
						err = r.disk().write(idData, dek, h, inTime)
						wantError(t, err, want)
						_, err = r.disk().state(idData, dek)
						wantError(t, err, want)
					}
					if string(before) != string(r.data) {
						t.Error("the disk has changed")
					}
				})
			}
		}
	}
}

func TestAFormatWhoseWriteFailsSaysSo(t *testing.T) {
	dek := dataKey(t)
	h := newTestHeader(t, idData, dek)
	for n := range 7 {
		r := newRAM(minDevice)
		r.writesLeft = n
		err := r.disk().write(idData, dek, h, inTime)
		wantError(t, err, ErrIO)
		wantError(t, err, errPower)
	}
}

func newTestHeader(t testing.TB, id Identity, dek *secret.Bytes) *Header {
	t.Helper()
	h, err := NewHeader(context.Background(), id, Layout{}, dek)
	must(t, err)
	return h
}
