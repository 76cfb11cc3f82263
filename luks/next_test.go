package luks

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"testing"

	"github.com/keyagent/keyagent/internal/secret"
)

// rotation is a change of a volume's DEK as its record and its disk see it.
type rotation struct {
	dek, next     *secret.Bytes
	front, coming *Header
	// What the record says: the next header is whole on the disk; and: the volume has no
	// other any more.
	stands, done bool
}

func newRotation(t *testing.T) *rotation {
	t.Helper()
	r := &rotation{dek: dataKey(t), next: logsKey(t)}
	r.front = newTestHeader(t, idData, r.dek)
	var err error
	r.coming, err = NewNextHeader(context.Background(), r.front, idData, r.dek, r.next)
	must(t, err)
	return r
}

// step does what is left to do, as far as the disk lets it.
func (r *rotation) step(d *disk) error {
	if !r.stands {
		if err := d.keepNext(r.coming, inTime); err != nil {
			return err
		}
		r.stands = true
	}
	if !r.done {
		if err := d.putNext(r.coming, inTime); err != nil {
			return err
		}
		r.done = true
	}
	return d.forgetNext(inTime)
}

// opens says with which of its keys the volume opens, by the MACs of its record.
func (r *rotation) opens(d *disk) (*Header, error) {
	if !r.done {
		if h, err := d.examine(idData, r.front.macs, r.dek); err == nil {
			return h, h.opens(r.dek)
		}
	}
	h, err := d.examine(idData, r.coming.macs, r.next)
	if err != nil && r.stands && !r.done {
		h, err = d.nextHeader(HeaderRequest{Identity: idData, MACs: r.coming.macs}, r.next)
	}
	if err != nil {
		return nil, err
	}
	return h, h.opens(r.next)
}

// The process dies, or power is lost, at every write and every flush of a change of the
// key, again during each later try, and what was not flushed survives in any combination.
func TestAChangeOfTheKeyThatIsCutOffAnywhereLeavesAVolumeThatOpens(t *testing.T) {
	one := newRotation(t)
	first, err := one.front.volumeKey(one.dek)
	must(t, err)
	defer first.Close()
	second, err := one.coming.volumeKey(one.next)
	must(t, err)
	defer second.Close()
	if !first.Equal(second) {
		t.Fatal("the volume key has changed")
	}
	var torn, kept int
	for trial := range 300 {
		rng := rand.New(rand.NewPCG(uint64(trial), 7))
		m := newRAM(minDevice)
		copy(m.data, one.front.raw)
		r := *one
		for attempt := 0; ; attempt++ {
			if attempt < 5 {
				m.writesLeft = rng.IntN(14) // six writes, each with a flush, and two before something is read back
			}
			err := r.step(m.disk())
			if err == nil {
				break
			}
			if !errors.Is(err, errPower) {
				t.Fatalf("trial %d: %v", trial, err)
			}
			if loss := rng.IntN(4); loss == 0 {
				m.kill()
			} else {
				m.crash(rng, float64(loss-1)/2)
			}
			h, err := r.opens(m.disk())
			if err != nil {
				t.Fatalf("trial %d, attempt %d, stands %v, done %v: %v", trial, attempt, r.stands, r.done, err)
			}
			if !r.stands && h.macs != r.front.macs || r.done && h.macs != r.coming.macs {
				t.Fatalf("trial %d: stands %v, done %v, and it opens with the other key", trial, r.stands, r.done)
			}
			if !bytes.HasPrefix(m.data, h.raw) {
				torn++
			} else if r.stands {
				kept++
			}
		}
		if !bytes.HasPrefix(m.data, r.coming.raw) || !allZero(m.data[len(r.coming.raw):]) {
			t.Fatalf("trial %d: the next header is not all that is left", trial)
		}
	}
	if torn == 0 || kept == 0 {
		t.Errorf("no header was torn, or none was whole, after a cut: %d, %d", torn, kept)
	}
}

func TestTheNextHeaderIsHeldAgainstItsMACs(t *testing.T) {
	ctx := context.Background()
	r := newRotation(t)
	path := image(t, minDevice)
	patch(t, path, r.front.raw, 0)
	read := func(id Identity, want MACs, dek *secret.Bytes) error {
		_, err := NextHeader(ctx, HeaderRequest{path, id, want}, dek)
		return err
	}
	wantError(t, read(idData, r.coming.macs, r.next), ErrHeaderRefused) // nothing is there
	wantError(t, PutNext(ctx, path, r.coming, DeadlineIn(1e9)), ErrHeaderChanged)
	wantError(t, KeepNext(ctx, path, r.coming, Deadline{}), ErrTooLate)
	wantError(t, read(idData, r.coming.macs, r.next), ErrHeaderRefused)
	must(t, KeepNext(ctx, path, r.coming, DeadlineIn(1e9)))
	wantError(t, ForgetNext(ctx, path, Deadline{}), ErrTooLate)
	must(t, read(idData, r.coming.macs, r.next))
	wantError(t, read(idData, r.front.macs, r.dek), ErrHeaderMAC)
	wantError(t, read(idData, r.coming.macs, r.dek), ErrHeaderMAC)
	wantError(t, read(Identity{Volume: idData.Volume, UUID: idData.UUID, Generation: idData.Generation + 1}, r.coming.macs, r.next), ErrHeaderMAC)
	wantError(t, read(idLogs, r.coming.macs, r.next), ErrVolumeMismatch)

	before := digest(t, path)
	wantError(t, PutNext(ctx, path, r.coming, Deadline{}), ErrTooLate)
	wantError(t, PutNext(ctx, path, nil, DeadlineIn(1e9)), ErrInvalid)
	patch(t, path, []byte{1}, nextOffset+guardedSize-1)
	wantError(t, PutNext(ctx, path, r.coming, DeadlineIn(1e9)), ErrHeaderChanged)
	patch(t, path, []byte{r.coming.raw[guardedSize-1]}, nextOffset+guardedSize-1)
	if digest(t, path) != before {
		t.Error("a refusal wrote to the disk")
	}
	must(t, PutNext(ctx, path, r.coming, DeadlineIn(1e9)))
	must(t, ForgetNext(ctx, path, DeadlineIn(1e9)))
	must(t, ForgetNext(ctx, path, Deadline{})) // nothing is there
	raw, err := os.ReadFile(path)
	must(t, err)
	if !bytes.HasPrefix(raw, r.coming.raw) || !allZero(raw[len(r.coming.raw):]) {
		t.Error("the next header is not all that is left")
	}
	_, err = ReadHeader(ctx, HeaderRequest{path, idData, r.front.macs}, r.dek)
	wantError(t, err, ErrHeaderMAC)
	// Who still has the old DEK has nothing that it opens.
	_, err = Adopt(ctx, path, idData, r.dek)
	wantError(t, err, ErrWrongKey)
	// Another volume's header is not put over this one.
	other := newTestHeader(t, idLogs, r.next)
	must(t, KeepNext(ctx, path, other, DeadlineIn(1e9)))
	wantError(t, PutNext(ctx, path, other, DeadlineIn(1e9)), ErrVolumeMismatch)
}

func TestANextHeaderNeedsThePresentOne(t *testing.T) {
	ctx := context.Background()
	r := newRotation(t)
	for name, tt := range map[string]struct {
		h         *Header
		id        Identity
		dek, next *secret.Bytes
		want      error
	}{
		"no header":         {nil, idData, r.dek, r.next, ErrInvalid},
		"no DEK":            {r.front, idData, nil, r.next, ErrInvalidKey},
		"no next DEK":       {r.front, idData, r.dek, nil, ErrInvalidKey},
		"another volume":    {r.front, idLogs, r.dek, r.next, ErrVolumeMismatch},
		"another DEK":       {r.front, idData, r.next, r.dek, ErrHeaderMAC},
		"no volume":         {r.front, Identity{}, r.dek, r.next, ErrInvalid},
		"the one from then": {r.coming, idData, r.dek, r.next, ErrHeaderMAC},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := NewNextHeader(ctx, tt.h, tt.id, tt.dek, tt.next)
			wantError(t, err, tt.want)
		})
	}
	// A header of version 1 is followed by one of version 2.
	raw, want := version1(t, r.dek)
	old, err := verify(raw, idData, want, r.dek)
	must(t, err)
	h, err := NewNextHeader(ctx, old, idData, r.dek, r.next)
	must(t, err)
	if !h.macs.rebuildable() {
		t.Error("the next header is of version 1 again")
	}
}
