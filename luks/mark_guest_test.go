//go:build umlguest

package luks

import (
	"context"
	"testing"

	"github.com/martinjungblut/go-cryptsetup"
)

// The mark is set, seen and cleared while dm-crypt holds the device.
func TestLiveAFilesystemMarkLivesBelowTheMapping(t *testing.T) {
	ctx := context.Background()
	v := newVolume(t, idData, dataKey(t))
	m, h, err := Open(ctx, v.request("data", OpenOptions{}), v.dek)
	must(t, err)
	defer v.close("data")
	ours := mark(t, v.id, 1)
	must(t, ours.Set(ctx, v.device))
	must(t, ours.Set(ctx, v.device))
	run(t, "mkfs.ext4", "-q", m.Path)
	if there, err := ours.Present(ctx, v.device); err != nil || !there {
		t.Errorf("present is %v, %v", there, err)
	}
	if untouched, err := DataUntouched(ctx, v.device); err != nil || untouched {
		t.Errorf("untouched is %v, %v", untouched, err)
	}
	found, err := Signatures(ctx, m.Path)
	if err != nil || len(found) != 1 || found[0].Type != "ext4" {
		t.Errorf("signatures are %+v, %v", found, err)
	}
	must(t, ours.Clear(ctx, v.device))
	must(t, ours.Clear(ctx, v.device))
	if there, err := ours.Present(ctx, v.device); err != nil || there {
		t.Errorf("present is %v, %v", there, err)
	}
	must(t, Matches(ctx, v.device, h))
	patch(t, v.device, []byte("somebody's data"), markOffset)
	wantError(t, ours.Set(ctx, v.device), ErrNotBlank)
	wantError(t, ours.Clear(ctx, v.device), ErrNotBlank)
}

// Case 50, while the volume is open: the header is overwritten, and put back.
func TestAttack50AHeaderThatIsOverwrittenWhileTheVolumeIsOpen(t *testing.T) {
	ctx := context.Background()
	v := newVolume(t, idData, dataKey(t))
	m, h, err := Open(ctx, v.request("data", OpenOptions{}), v.dek)
	must(t, err)
	run(t, "mkfs.ext4", "-q", m.Path)
	must(t, Matches(ctx, v.device, h))
	late := newTestHeader(t, v.id, v.dek) // of a node that woke up late
	for name, raw := range map[string][]byte{"zeros": make([]byte, guardedSize), "another node's header": late.Bytes()} {
		patch(t, v.device, raw, 0)
		wantError(t, Matches(ctx, v.device, h), ErrHeaderChanged)
		if err := WriteBack(ctx, v.device, h); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		must(t, Matches(ctx, v.device, h))
	}
	must(t, v.close("data"))
	v.mustOpen(t, "data")
	if found, err := Signatures(ctx, m.Path); err != nil || len(found) != 1 {
		t.Errorf("signatures are %+v, %v", found, err)
	}
}

// A mapping that libcryptsetup makes through go-cryptsetup reads what ours wrote, and is
// proved to have the volume's key.
func TestLiveTheBindingReadsWhatWeWrote(t *testing.T) {
	v := newVolume(t, idData, dataKey(t))
	m := v.mustOpen(t, "data")
	run(t, "mkfs.ext4", "-q", m.Path)
	ours := digest(t, m.Path)
	must(t, v.close("data"))
	d := binding(t, v.device)
	must(t, d.Load(cryptsetup.LUKS2{}))
	must(t, d.ActivateByPassphrase("data", 0, keyString(t, v.dek), cryptsetup.CRYPT_ACTIVATE_KEYRING_KEY))
	defer func() { must(t, d.Deactivate("data")) }()
	if digest(t, m.Path) != ours {
		t.Error("the two mappings read differently")
	}
	_, err := Prove(context.Background(), v.existing("data"), v.dek)
	must(t, err)
	_, err = v.open("data")
	must(t, err)
}
