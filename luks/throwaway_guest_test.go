//go:build umlguest

package luks

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestLiveAThrowawayMappingHasAKeyThatNobodyKnows(t *testing.T) {
	ctx := context.Background()
	device := blankDevice(t, 8<<20+3*sectorSize)
	m, err := OpenThrowaway(ctx, device, "swap", OpenOptions{})
	must(t, err)
	if m.Bytes != 8<<20 || !m.Throwaway || m.UUID != "" {
		t.Errorf("mapping is %+v", m)
	}
	again, err := OpenThrowaway(ctx, device, "swap", OpenOptions{})
	if err != nil || again != m {
		t.Errorf("mapping is %+v, %v", again, err)
	}
	table := run(t, "dmsetup", "table", "--showkeys", "swap")
	if !strings.Contains(table, " :64:encrypted:keyagent:throwaway-swap 0 ") {
		t.Errorf("table is %s", table)
	}
	keys, err := os.ReadFile("/proc/keys")
	must(t, err)
	for line := range strings.Lines(string(keys)) {
		if strings.Contains(line, "keyagent") && !strings.HasPrefix(strings.Fields(line)[1], "IR") {
			t.Errorf("a keyring holds a key: %s", line)
		}
	}
	plain := bytes.Repeat([]byte("plaintext in swap"), 1000)
	patch(t, m.Path, plain, 0)
	raw, err := os.ReadFile(device)
	must(t, err)
	if bytes.Contains(raw, plain[:34]) {
		t.Error("plaintext is on the disk")
	}
	run(t, "mkswap", m.Path)
	run(t, "swapon", m.Path)
	wantError(t, Close(ctx, CloseRequest{Name: "swap", Throwaway: true}), ErrDeviceBusy)
	run(t, "swapoff", m.Path)
	must(t, Close(ctx, CloseRequest{Name: "swap", Throwaway: true}))

	// The next one has another key: nothing is left of the first.
	m, err = OpenThrowaway(ctx, device, "swap", OpenOptions{AllowDiscards: true})
	must(t, err)
	got, err := os.ReadFile(m.Path)
	must(t, err)
	if bytes.Contains(got, []byte("SWAPSPACE2")) || bytes.Contains(got, plain[:34]) {
		t.Error("what was written under the last key can be read")
	}
	must(t, Close(ctx, CloseRequest{Name: "swap", Throwaway: true, Device: m.DataDevice}))
}

// A program that this process starts has its claim of another volume's disk until it runs.
func TestLiveAClaimThatIsOverSoonIsWaitedFor(t *testing.T) {
	ctx := context.Background()
	device := blankDevice(t, 8<<20)
	claim, err := os.OpenFile(device, os.O_RDONLY|unix.O_EXCL, 0)
	must(t, err)
	c := creation{name: "late", uuid: "KEYAGENT-TEST-late", kind: "linear", bytes: 8 << 20, params: fmt.Sprintf("%v 0", blockNumber(device))}
	wantError(t, c.create(ctx), ErrDeviceBusy)
	time.AfterFunc(8*claimPause, func() { claim.Close() })
	must(t, c.create(ctx))
	must(t, remove(ctx, c.name, c.uuid))
}

func TestLiveAThrowawayMappingGoesOverNothingThatSomebodyMisses(t *testing.T) {
	ctx := context.Background()
	for name, prepare := range map[string]func(device string){
		"an ext4 filesystem": func(d string) { run(t, "mkfs.ext4", "-q", d) },
		"a LUKS2 volume":     func(d string) { _, err := formatDevice(d, idData, dataKey(t)); must(t, err) },
		"an old LVM label":   func(d string) { patch(t, d, lvmLabel(), 512) },
	} {
		t.Run(name, func(t *testing.T) {
			device := blankDevice(t, deviceSize)
			prepare(device)
			wantError(t, untouched(t, device, func() error {
				_, err := OpenThrowaway(ctx, device, "swap", OpenOptions{})
				return err
			}), ErrNotBlank)
		})
	}
	device := blankDevice(t, deviceSize)
	run(t, "mkswap", device)
	_, err := OpenThrowaway(ctx, device, "swap", OpenOptions{})
	must(t, err)
	must(t, Close(ctx, CloseRequest{Name: "swap", Throwaway: true}))
}
