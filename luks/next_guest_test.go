//go:build umlguest

package luks

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"testing"
	"time"
)

// A volume gets another DEK while it is written to, in every form: no write fails, the
// data stay, the next DEK opens it and the old one opens nothing, by our hand and by
// cryptsetup's.
func TestLiveAVolumeGetsAnotherKeyUnderIO(t *testing.T) {
	ctx := context.Background()
	for _, integrity := range []Integrity{"", HMACSHA256, AEGIS128} {
		t.Run(string("integrity "+integrity), func(t *testing.T) {
			device := blankDevice(t, 48<<20)
			dek, next := dataKey(t), logsKey(t)
			h, err := NewHeader(ctx, idData, Layout{Integrity: integrity, DeviceBytes: 48 << 20}, dek)
			must(t, err)
			must(t, Write(ctx, WriteRequest{device, idData, h, DeadlineIn(time.Minute)}, dek))
			v := volume{device: device, id: idData, dek: dek, macs: h.MACs()}
			req := v.request("data", OpenOptions{})
			req.FreshTags = integrity != ""
			m, _, err := Open(ctx, req, dek)
			must(t, err)
			t.Cleanup(func() { _ = exec.Command("dmsetup", "remove", "data").Run() })
			if integrity != "" { // what has no tag yet cannot be read
				run(t, "dd", "if=/dev/zero", "of="+m.Path, "bs=64k", "oflag=direct", "status=none", "count="+fmt.Sprint(m.Bytes/(64<<10)))
			}
			run(t, "mkfs.ext4", "-q", m.Path, fmt.Sprint(m.Bytes/(64<<10)*64)+"k")
			dir := t.TempDir()
			run(t, "mount", m.Path, dir)

			stop, wrote := make(chan bool), make(chan error, 1)
			sum := sha256.New()
			go func() {
				f, err := os.Create(dir + "/file")
				for i := 0; err == nil; i++ {
					select {
					case <-stop:
						wrote <- f.Close()
						return
					default:
					}
					line := bytes.Repeat([]byte{byte(i)}, 4096)
					if i < 1000 {
						sum.Write(line)
						_, err = f.Write(line)
					}
					if err == nil {
						err = f.Sync()
					}
				}
				wrote <- err
			}()
			coming, err := NewNextHeader(ctx, h, idData, dek, next)
			must(t, err)
			must(t, KeepNext(ctx, device, coming, DeadlineIn(time.Minute)))
			must(t, PutNext(ctx, device, coming, DeadlineIn(time.Minute)))
			must(t, Matches(ctx, device, coming))
			wantError(t, Matches(ctx, device, h), ErrHeaderChanged)
			must(t, ForgetNext(ctx, device, DeadlineIn(time.Minute)))
			time.Sleep(200 * time.Millisecond)
			close(stop)
			must(t, <-wrote)

			// The mapping is the next header's as well: it is proved, suspended and resumed.
			e := Existing{Device: device, Name: "data", Identity: idData, MACs: coming.MACs()}
			_, err = Prove(ctx, e, next)
			must(t, err)
			must(t, Suspend(ctx, "data", idData.UUID))
			_, err = Resume(ctx, e, dek)
			wantError(t, err, ErrHeaderMAC)
			_, err = Resume(ctx, e, next)
			must(t, err)
			run(t, "umount", dir)
			must(t, v.close("data"))

			_, err = v.open("data")
			wantError(t, err, ErrHeaderMAC)
			if out, err := exec.Command("cryptsetup", "open", "--test-passphrase", "--key-file", keyFile(t, dek), device).CombinedOutput(); err == nil {
				t.Errorf("cryptsetup opens it with the old DEK: %s", out)
			}
			run(t, "cryptsetup", "open", "--test-passphrase", "--key-file", keyFile(t, next), device)
			v.dek, v.macs = next, coming.MACs()
			m, err = v.open("data")
			must(t, err)
			run(t, "mount", m.Path, dir)
			got, err := os.ReadFile(dir + "/file")
			must(t, err)
			if want := sum.Sum(nil); len(got) == 0 || !bytes.Equal(sumOf(got), want) {
				t.Errorf("the file of %d bytes is not what was written", len(got))
			}
			run(t, "umount", dir)
			must(t, v.close("data"))
		})
	}
}

func sumOf(p []byte) []byte { s := sha256.Sum256(p); return s[:] }

// The next header opens the volume from where it is kept, while the one in front is torn.
func TestLiveAVolumeOpensByTheHeaderThatIsKept(t *testing.T) {
	ctx := context.Background()
	v := newVolume(t, idData, dataKey(t))
	next := logsKey(t)
	h, err := ReadHeader(ctx, HeaderRequest{v.device, v.id, v.macs}, v.dek)
	must(t, err)
	coming, err := NewNextHeader(ctx, h, v.id, v.dek, next)
	must(t, err)
	must(t, KeepNext(ctx, v.device, coming, DeadlineIn(time.Minute)))
	patch(t, v.device, coming.raw[sectorSize:100_000], sectorSize)
	_, err = v.open("data")
	wantError(t, err, ErrHeaderRefused)
	kept, err := NextHeader(ctx, HeaderRequest{v.device, v.id, coming.MACs()}, next)
	must(t, err)
	req := v.request("data", OpenOptions{})
	req.MACs, req.Header = coming.MACs(), kept
	wrong := req
	wrong.MACs = v.macs
	_, _, err = Open(ctx, wrong, v.dek)
	wantError(t, err, ErrHeaderMAC)
	_, _, err = Open(ctx, req, next)
	must(t, err)
	must(t, PutNext(ctx, v.device, kept, DeadlineIn(time.Minute)))
	must(t, v.close("data"))
	v.dek, v.macs = next, coming.MACs()
	v.mustOpen(t, "data")
}
