package luks

import (
	"bytes"
	"context"
	"os"
	"testing"
)

func TestAnErasedHeaderIsGone(t *testing.T) {
	ctx := context.Background()
	r := newRotation(t)
	path := image(t, minDevice)
	patch(t, path, r.front.raw, 0)
	patch(t, path, r.coming.raw, nextOffset)
	patch(t, path, r.front.raw, sourceOffset)
	patch(t, path, []byte("data"), dataOffset)
	before := digest(t, path)
	wantError(t, Erase(ctx, path, idLogs.UUID), ErrVolumeMismatch)
	wantError(t, Erase(ctx, path, "x"), ErrInvalid)
	if digest(t, path) != before {
		t.Fatal("a refusal wrote to the disk")
	}
	patch(t, path, []byte("junk"), 100) // one bad copy is no reason to keep the other
	must(t, Erase(ctx, path, idData.UUID))
	must(t, Erase(ctx, path, idData.UUID))
	raw, err := os.ReadFile(path)
	must(t, err)
	if !allZero(raw[:dataOffset]) || !bytes.HasPrefix(raw[dataOffset:], []byte("data")) {
		t.Error("something is left of the header, or the data were written")
	}
	// What no copy names is not touched.
	patch(t, path, []byte("another tenant"), 0)
	wantError(t, Erase(ctx, path, idData.UUID), ErrVolumeMismatch)
}

// Cut off anywhere, it can be done again, and what was destroyed stays so.
func TestAnErasureThatIsCutOffGoesOn(t *testing.T) {
	ctx := context.Background()
	r := newRotation(t)
	for cut := range []int{areasOffset, nextOffset, sourceOffset, metadataSize} {
		path := image(t, minDevice)
		patch(t, path, r.front.raw, 0)
		if cut > 0 {
			patch(t, path, make([]byte, authAreaSize), areasOffset)
		}
		if cut > 2 {
			patch(t, path, make([]byte, metadataSize), metadataSize)
		}
		must(t, Erase(ctx, path, idData.UUID))
		raw, err := os.ReadFile(path)
		must(t, err)
		if !allZero(raw) {
			t.Errorf("cut %d: something is left", cut)
		}
	}
}
