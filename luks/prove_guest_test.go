//go:build umlguest

package luks

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// Case 53: the stock tool has opened, under the volume's name, a header that the host
// wrote: the volume's UUID, a keyslot that every key opens, a volume key of the host's.
func TestAttack53AMappingThatAnotherToolMadeIsNotAdopted(t *testing.T) {
	ctx := context.Background()
	v := newVolume(t, idData, dataKey(t))
	good := v.header(t)
	var forged []byte
	for _, h := range hostileHeaders {
		if h.attack == 2 {
			forged = h.forge(t, good)
		}
	}
	patch(t, v.device, forged, 0)
	out, err := exec.Command("cryptsetup", "open", "--key-file", keyFile(t, logsKey(t)), v.device, "data").CombinedOutput()
	if err != nil {
		// A newer tool refuses a null keyslot. The host's own header does as well.
		t.Logf("this cryptsetup refuses a null keyslot cipher: %s", out)
		run(t, "cryptsetup", "luksFormat", "-q", "--type", "luks2", "--sector-size", "4096", "--uuid", v.id.UUID, "--cipher", "aes-xts-plain64",
			"--key-size", "512", "--offset", "32768", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--key-file", keyFile(t, logsKey(t)), v.device)
		run(t, "cryptsetup", "open", "--perf-no_read_workqueue", "--perf-no_write_workqueue", "--key-file", keyFile(t, logsKey(t)), v.device, "data")
	}
	defer run(t, "cryptsetup", "close", "data")
	if _, err := Status(ctx, "data"); err != nil {
		t.Fatalf("the control does not look like the volume: %v", err)
	}
	for name, header := range map[string][]byte{"the host's header is on the disk": nil, "the good header is back": good} {
		t.Run(name, func(t *testing.T) {
			if header != nil {
				patch(t, v.device, header, 0)
			}
			before := digest(t, v.device)
			_, openErr := v.open("data")
			_, proveErr := Prove(ctx, v.existing("data"), v.dek)
			_, resizeErr := Resize(ctx, v.existing("data"), v.dek)
			for _, err := range []error{openErr, proveErr, resizeErr} {
				if header != nil {
					wantError(t, err, ErrNotOurs)
				}
				if err == nil {
					t.Error("the mapping was taken for the volume")
				}
				t.Log(err)
			}
			if digest(t, v.device) != before {
				t.Error("the device has changed")
			}
		})
	}
}

func TestLiveAMappingOfOursIsProved(t *testing.T) {
	ctx := context.Background()
	v := newVolume(t, idData, dataKey(t))
	m := v.mustOpen(t, "data")
	_, err := Prove(ctx, v.existing("data"), v.dek) // of a data area of zeros
	must(t, err)
	run(t, "mkfs.ext4", "-q", m.Path)
	dir := t.TempDir()
	run(t, "mount", m.Path, dir)
	defer run(t, "umount", dir)
	must(t, os.WriteFile(filepath.Join(dir, "file"), make([]byte, 1<<20), 0o600)) // dirty pages, at the mapping and above
	_, err = Prove(ctx, v.existing("data"), v.dek)
	must(t, err)
	_, err = Prove(ctx, v.existing("data"), logsKey(t))
	wantError(t, err, ErrHeaderMAC)

	// The agent has the header in memory when the disk's is gone.
	h, err := ReadHeader(ctx, HeaderRequest{v.device, v.id, v.macs}, v.dek)
	must(t, err)
	patch(t, v.device, make([]byte, guardedSize), 0)
	e := v.existing("data")
	_, err = Prove(ctx, e, v.dek)
	wantRule(t, err, RuleMagic)
	e.Header = h
	_, err = Prove(ctx, e, v.dek)
	must(t, err)
	must(t, WriteBack(ctx, v.device, h, DeadlineIn(1e9)))
	must(t, Matches(ctx, v.device, h))
}

// A node of another device in the place of the mapping's is not followed.
func TestLiveAForeignNodeUnderTheMappingsNameIsRefused(t *testing.T) {
	v := newVolume(t, idData, dataKey(t))
	m := v.mustOpen(t, "data")
	must(t, os.Remove(m.Path))
	run(t, "cp", "-a", v.device, m.Path)
	_, err := v.open("data")
	wantError(t, err, ErrNotOurs)
	must(t, os.Remove(m.Path))
	_, err = v.open("data")
	must(t, err)
}

func TestLiveCloseRemovesOnlyTheMappingThatIsNamed(t *testing.T) {
	ctx := context.Background()
	v := newVolume(t, idData, dataKey(t))
	m := v.mustOpen(t, "data")
	wantError(t, Close(ctx, CloseRequest{Name: "data", UUID: idLogs.UUID}), ErrNameTaken)
	wantError(t, Close(ctx, CloseRequest{Name: "data", UUID: v.id.UUID, Device: DevNum{1, 1}}), ErrNameTaken)
	wantError(t, Close(ctx, CloseRequest{Name: "data", Throwaway: true}), ErrNameTaken)
	all, err := Mappings(ctx)
	must(t, err)
	if len(all) != 1 || all[0] != m {
		t.Errorf("mappings are %+v, want %+v", all, m)
	}
	must(t, Close(ctx, CloseRequest{Name: "data", UUID: v.id.UUID, Device: m.DataDevice}))
	if _, err := os.Lstat(m.Path); err == nil {
		t.Errorf("%s is there still", m.Path)
	}
}
