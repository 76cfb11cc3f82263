//go:build umlguest

package luks

import (
	"context"
	"os"
	"testing"
)

// Case 38, for opening: what a killed activation leaves behind does not keep the
// volume shut, whichever step was the last.
func TestLiveAnUnfinishedMappingIsMadeAnew(t *testing.T) {
	v := newVolume(t, idData, dataKey(t))
	ctx := context.Background()
	for _, step := range []func(){
		func() {},
		func() { // a table is loaded, and not in force
			run(t, "dmsetup", "load", "data", "--table", "0 8192 crypt aes-xts-plain64 "+
				"00000000000000000000000000000000ffffffffffffffffffffffffffffffff 0 "+v.device+" 32768")
		},
	} {
		run(t, "dmsetup", "create", "data", "--notable", "--uuid", dmUUID(idData.UUID, "data"))
		step()
		_, err := Status(ctx, "data")
		wantError(t, err, ErrNotActive)
		_, err = v.open("data")
		must(t, err)
		must(t, v.close("data"))
	}

	m := v.mustOpen(t, "data") // killed before the node was there
	must(t, os.Remove(m.Path))
	_, err := v.open("data")
	must(t, err)
	if _, err := os.Stat(m.Path); err != nil {
		t.Error(err)
	}
	must(t, v.close("data"))

	// Somebody else's is left alone.
	run(t, "dmsetup", "create", "data", "--notable", "--uuid", "CRYPT-LUKS2-of-somebody-data")
	_, err = v.open("data")
	wantError(t, err, ErrNameTaken)
	run(t, "dmsetup", "remove", "data")
}
