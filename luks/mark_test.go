package luks

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"testing"
	"time"
)

func mark(t testing.TB, id Identity, attempt byte) *FilesystemMark {
	t.Helper()
	m, err := NewFilesystemMark(id, [16]byte{attempt}, dataKey(t))
	must(t, err)
	return m
}

// The marks are written to devices alone; here they are put into an image.
func TestAFilesystemMarkIsOfOneAttempt(t *testing.T) {
	ctx := context.Background()
	path, _ := formatted(t, idData, dataKey(t))
	ours, later := mark(t, idData, 1), mark(t, idData, 2)
	next := idData
	next.Generation++
	// Whichever attempt it was of: it was of this volume, and by who had its key.
	other := mark(t, idData, 1)
	other.sector[sectorSize-1] ^= 1
	for name, c := range map[string]struct {
		sector []byte
		want   bool
	}{
		"one attempt's": {ours.sector, true}, "another's": {later.sector, true}, "of another generation": {mark(t, next, 1).sector, false},
		"of another volume": {mark(t, idLogs, 1).sector, false}, "a forged one": {other.sector, false}, "none": {make([]byte, sectorSize), false},
		"of no attempt": {append(bytes.Clone(ours.sector[:offMarkAttempt]), make([]byte, sectorSize-offMarkAttempt)...), false},
	} {
		patch(t, path, c.sector, markOffset)
		if got, err := MarkLeft(ctx, path, idData, dataKey(t)); err != nil || (got != nil) != c.want {
			t.Errorf("%s: left is %v, %v", name, got, err)
		}
		if got, err := MarkLeft(ctx, path, idData, key(t, 101, 32)); err != nil || got != nil {
			t.Errorf("%s, under another key: left is %v, %v", name, got, err)
		}
	}
	wantError(t, ours.Claim(ctx, path, nil), ErrNotBlockDevice)
	_, err := NewFilesystemMark(idData, [16]byte{}, dataKey(t))
	wantError(t, err, ErrInvalid)
}

func TestAMarkStandsBesideAHeaderAndIsGoneWithTheNext(t *testing.T) {
	ctx, dek := context.Background(), dataKey(t)
	path, macs := formatted(t, idData, dek)
	patch(t, path, mark(t, idData, 1).sector, markOffset)
	_, err := ReadHeader(ctx, HeaderRequest{path, idData, macs}, dek)
	must(t, err)
	must(t, untouchedData(t, path))
	h, err := formatImage(path, idData, dek) // the next attempt
	must(t, err)
	must(t, Matches(ctx, path, h))
	d, err := openShared(ctx, path)
	must(t, err)
	defer d.Close()
	sector, err := d.readMark()
	if err != nil || !allZero(sector) {
		t.Errorf("mark is %q, %v", sector, err)
	}
}

// A header that an attempt left is replaced only while nobody has stored anything.
func TestACompleteHeaderIsReplacedOnlyBeforeUntouchedData(t *testing.T) {
	dek := dataKey(t)
	for name, c := range map[string]struct {
		offset    int64
		data      []byte
		untouched bool
	}{
		"the first byte of the data":     {dataOffset, []byte{1}, false},
		"the last byte of the data":      {20<<20 - 1, []byte{1}, false},
		"a byte between header and data": {maxGuardedSize, []byte{1}, true},
		"a torn mark":                    {markOffset, []byte("KEYAGENT\x00MK"), true},
	} {
		t.Run(name, func(t *testing.T) {
			path, _ := formatted(t, idData, dek)
			patch(t, path, c.data, c.offset)
			if err := untouchedData(t, path); errors.Is(err, ErrNotBlank) == c.untouched {
				t.Errorf("untouched: %v", err)
			}
			before := digest(t, path)
			_, err := formatImage(path, idData, dek)
			wantError(t, err, ErrNotBlank)
			if digest(t, path) != before {
				t.Error("the disk has changed")
			}
		})
	}
	for name, c := range map[string]struct {
		id  Identity
		dek byte
	}{
		"another DEK":    {idData, 101},
		"another volume": {idLogs, 1},
	} {
		t.Run(name, func(t *testing.T) {
			path, _ := formatted(t, idData, dek)
			before := digest(t, path)
			_, err := formatImage(path, c.id, key(t, c.dek, 32))
			wantError(t, err, ErrNotBlank)
			if digest(t, path) != before {
				t.Error("the disk has changed")
			}
		})
	}
}

// Case 47, the node that wakes up: it fails at its next step, wherever it slept.
func TestAWriterThatWakesUpLateWritesNoFurther(t *testing.T) {
	dek := dataKey(t)
	h := newTestHeader(t, idData, dek)
	for allowed := range 3 {
		r := newRAM(minDevice)
		asked := 0
		err := r.disk().write(idData, dek, h, func() error {
			if asked++; asked > allowed {
				return Deadline{}.check()
			}
			return nil
		})
		wantError(t, err, ErrTooLate)
		state, err := r.disk().state(idData, dek)
		must(t, err)
		if want := []State{StateBlank, StateBlank, StateInterrupted}[allowed]; state != want {
			t.Errorf("asked %d times: state is %v, want %v", allowed, state, want)
		}
		if !allZero(r.data[guardedSize:]) {
			t.Error("bytes beyond the header were written")
		}
	}
	if Deadline.check(Deadline{}) == nil || DeadlineIn(-time.Second).check() == nil || DeadlineIn(time.Hour).check() != nil {
		t.Error("a deadline is not what it says")
	}
}

// A disk that says that it has written what it has not.
type liar struct {
	*ram
	lose int64
}

func (l liar) WriteAt(p []byte, at int64) (int, error) {
	if at <= l.lose && l.lose < at+int64(len(p)) {
		p = append([]byte(nil), p...)
		p[l.lose-at] ^= 1
	}
	return l.ram.WriteAt(p, at)
}

func TestWhatIsReadBackDecides(t *testing.T) {
	dek := dataKey(t)
	h := newTestHeader(t, idData, dek)
	for _, lose := range []int64{3, offSalt, metadataSize, guardedSize - 1} {
		r := newRAM(minDevice)
		d := r.disk()
		d.medium = liar{r, lose}
		wantError(t, d.write(idData, dek, h, inTime), ErrIO)
	}
}

// untouchedData is [ErrNotBlank] if somebody has written to the data area of a disk.
func untouchedData(t *testing.T, path string) error {
	t.Helper()
	d, err := openShared(t.Context(), path)
	must(t, err)
	defer d.Close()
	return cmp.Or(d.checkSize(), d.checkBlank(dataOffset))
}
