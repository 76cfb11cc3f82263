//go:build umlguest

package luks

import (
	"context"
	"os"
	"testing"
)

// A mapping that must not be used any more is removed, or gives errors while somebody
// holds it.
func TestLiveAMappingIsSevered(t *testing.T) {
	ctx := context.Background()
	v := newVolume(t, idData, dataKey(t))
	m := v.mustOpen(t, "data")
	f, err := os.OpenFile(m.Path, os.O_RDWR|os.O_SYNC, 0)
	must(t, err)
	before := digest(t, v.device)
	must(t, Sever(ctx, "data"))
	if _, err := f.Write(make([]byte, dataSectorSize)); err == nil {
		t.Error("it is written to")
	}
	must(t, f.Close())
	st, err := Status(ctx, "data")
	must(t, err)
	if !st.Cut {
		t.Errorf("mapping is %+v", st)
	}
	must(t, Sever(ctx, "data"))
	wantError(t, Sever(ctx, "data"), ErrNotActive)
	if digest(t, v.device) != before {
		t.Error("the device was written to")
	}
	wantError(t, Sever(ctx, "no/name"), ErrInvalid)
}
