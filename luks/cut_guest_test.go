//go:build umlguest

package luks

import (
	"context"
	"os"
	"testing"
)

// A volume that was cut off its disk gives errors, also to what waited while it was
// suspended; its key is gone, and it can be closed.
func TestLiveAMappingThatIsCutOffReachesNoDisk(t *testing.T) {
	ctx := context.Background()
	v := newVolume(t, idData, dataKey(t))
	m := v.mustOpen(t, "data")
	must(t, Suspend(ctx, "data", m.UUID))
	waits := make(chan error, 1)
	go func() {
		f, err := os.OpenFile(m.Path, os.O_RDWR|os.O_SYNC, 0)
		if err == nil {
			defer f.Close()
			_, err = f.Write(make([]byte, dataSectorSize))
		}
		waits <- err
	}()
	before := digest(t, v.device)
	must(t, Cut(ctx, "data", m.UUID))
	if <-waits == nil {
		t.Error("a write that waited went through")
	}
	st, err := Status(ctx, "data")
	must(t, err)
	if !st.Cut || st.UUID != m.UUID {
		t.Errorf("mapping is %+v", st)
	}
	_, err = v.open("data")
	wantError(t, err, ErrTableMismatch)
	must(t, Close(ctx, CloseRequest{Name: "data", UUID: m.UUID, Device: m.DataDevice}))
	if digest(t, v.device) != before {
		t.Error("the device was written to")
	}
	_, err = v.open("data")
	must(t, err)
	wantError(t, Cut(ctx, "data", "00000000-0000-0000-0000-000000000000"), ErrNameTaken)
}
