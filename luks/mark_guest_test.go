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
	left := func() *FilesystemMark {
		m, err := MarkLeft(ctx, v.device, v.id, v.dek)
		must(t, err)
		return m
	}
	must(t, ours.Claim(ctx, v.device, nil))
	must(t, ours.Claim(ctx, v.device, nil))
	run(t, "mkfs.ext4", "-q", m.Path)
	must(t, ours.Claim(ctx, v.device, nil)) // it is ours, whatever mkfs came to
	wantError(t, untouchedData(t, v.device), ErrNotBlank)
	found, err := Signatures(ctx, m.Path)
	if err != nil || len(found) != 1 || found[0].Type != "ext4" {
		t.Errorf("signatures are %+v, %v", found, err)
	}
	// The next attempt goes over what that one left, if it is still there.
	next, was := mark(t, v.id, 2), left()
	wantError(t, next.Claim(ctx, v.device, nil), ErrNotBlank)
	wantError(t, next.Claim(ctx, v.device, mark(t, v.id, 3)), ErrNotBlank)
	must(t, next.Claim(ctx, v.device, was))
	was = left()
	must(t, next.Clear(ctx, v.device))
	must(t, next.Clear(ctx, v.device))
	// It was finished since, by a machine that did not wait for one that was frozen.
	if got := left(); got != nil {
		t.Error("a mark is left")
	}
	wantError(t, ours.Claim(ctx, v.device, was), ErrNotBlank)
	wantError(t, mark(t, v.id, 3).Claim(ctx, v.device, was), ErrNotBlank)
	must(t, Matches(ctx, v.device, h))
	patch(t, v.device, []byte("somebody's data"), markOffset)
	wantError(t, ours.Claim(ctx, v.device, was), ErrNotBlank)
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
		if err := WriteBack(ctx, v.device, h, DeadlineIn(1e9)); err != nil {
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
