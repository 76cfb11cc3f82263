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
func provision(d *disk, id Identity, dek *secret.Bytes, header headerMaker) (MAC, State, error) {
	ctx := context.Background()
	state, err := d.state(ctx, id, dek)
	if err != nil {
		return MAC{}, state, err
	}
	switch state {
	case StateBlank, StateInterrupted:
		mac, err := d.format(ctx, id, dek, header)
		return mac, state, err
	case StateLUKS2:
		mac, err := d.adopt(ctx, id, dek)
		return mac, state, err
	default:
		return MAC{}, state, d.checkBlank(ctx, 0)
	}
}

// The process dies or power is lost at every write and every flush of a format,
// and again during each later try; of what was not flushed, sectors
// survive a loss of power in any combination.
func TestAFormatThatIsCutOffAnywhereConverges(t *testing.T) {
	dek := dataKey(t)
	// Four headers stand for all that libcryptsetup would make.
	var made []guarded
	for range 4 {
		g, err := newHeader(idData, dek)
		must(t, err)
		made = append(made, g)
	}
	seen := map[State]int{}
	for trial := range 60 {
		rng := rand.New(rand.NewPCG(uint64(trial), 1))
		maker := func(Identity, *secret.Bytes) (guarded, error) { return made[rng.IntN(len(made))], nil }
		r := newRAM(minDevice)
		var completed *MAC
		for attempt := 0; ; attempt++ {
			if attempt < 5 {
				r.writesLeft = rng.IntN(7) // a format has three writes and three flushes
			}
			mac, state, err := provision(r.disk(), idData, dek, maker)
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
	g, err := newHeader(idData, dek)
	must(t, err)
	marker, err := newMarker(idData, dek)
	must(t, err)
	for cut := 1; cut < sectorSize; cut += 7 {
		r := newRAM(minDevice)
		copy(r.data, g.raw)
		copy(r.data, g.raw[:cut])
		copy(r.data[cut:sectorSize], marker[cut:])
		_, state, err := provision(r.disk(), idData, dek, newHeader)
		if err == nil || state == StateInterrupted || state == StateBlank {
			t.Fatalf("cut at %d: state %v, error %v", cut, state, err)
		}
	}
}

// Case 13: a disk that cannot be read is in no state at all.
func TestADiskThatFailsIsNeverBlank(t *testing.T) {
	ctx, dek := context.Background(), dataKey(t)
	g, err := newHeader(idData, dek)
	must(t, err)
	mac, err := headerMAC(g, idData, dek)
	must(t, err)
	for _, failFrom := range []int64{0, 1, sectorSize, binarySize, metadataSize + 1, areasOffset, guardedSize - 1} {
		for _, short := range []bool{false, true} {
			for _, blank := range []bool{false, true} {
				t.Run(fmt.Sprintf("from byte %d, short %v, blank %v", failFrom, short, blank), func(t *testing.T) {
					r := newRAM(minDevice)
					if !blank {
						copy(r.data, g.raw)
					}
					r.failFrom, r.readErr, r.shortRead = failFrom, unix.EIO, short
					want := ErrIO
					if short {
						want = ErrShortHeader
					}
					before := append([]byte(nil), r.data...)
					_, err := r.disk().examine(ctx, idData, mac, dek)
					wantError(t, err, want)
					_, err = r.disk().adopt(ctx, idData, dek)
					wantError(t, err, want)
					if blank || failFrom < sectorSize {
						_, err = r.disk().format(ctx, idData, dek, newHeader)
						wantError(t, err, want)
						_, err = r.disk().state(ctx, idData, dek)
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
	g, err := newHeader(idData, dek)
	must(t, err)
	for n := range 6 {
		r := newRAM(minDevice)
		r.writesLeft = n
		_, err := r.disk().format(context.Background(), idData, dek, func(Identity, *secret.Bytes) (guarded, error) { return g, nil })
		wantError(t, err, ErrIO)
		wantError(t, err, errPower)
	}
}
