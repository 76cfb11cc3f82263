//go:build umlguest

package luks

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/keyagent/keyagent/internal/secret"
)

// Case 45, for this package: once a DEK is closed, no copy of it is left in the
// memory of the process that formatted, opened and closed a volume with it. The
// Go runtime erases what the derivations leave on its heap only in a build with
// runtimesecret; without it, the copies that C has made must be gone all the same.
func TestLiveKeysAreGoneFromTheProcess(t *testing.T) {
	const mask = 0xa5
	dek, err := secret.Random(32)
	must(t, err)
	masked := make([]byte, 32) // what is searched for must not be found as itself
	must(t, dek.Use(func(p []byte) error {
		for i := range p {
			masked[i] = p[i] ^ mask
		}
		return nil
	}))
	if n := copies(t, masked, mask, true); n == 0 && !secretIsHidden() {
		t.Fatal("the search does not find a key that is there")
	}
	v := newVolume(t, idData, dek)
	h, err := Adopt(context.Background(), v.device, v.id, v.dek)
	must(t, err)
	vk, err := h.volumeKey(dek)
	must(t, err)
	maskedVK := make([]byte, 32) // the first half: the key of the data
	must(t, vk.Use(func(p []byte) error {
		for i := range maskedVK {
			maskedVK[i] = p[i] ^ mask
		}
		return nil
	}))
	must(t, vk.Close())
	v.mustOpen(t, "data")
	v.mustOpen(t, "data") // proves the key
	must(t, Suspend(context.Background(), "data", v.id.UUID))
	_, err = Resume(context.Background(), v.existing("data"), v.dek)
	must(t, err)
	must(t, v.close("data"))
	must(t, dek.Close())
	runtime.GC()
	runtime.GC()
	for name, key := range map[string][]byte{"DEK": masked, "volume key": maskedVK} {
		inC, all := copies(t, key, mask, false), copies(t, key, mask, true)
		t.Logf("copies of the %s left: %d outside the Go heap, %d in all; runtimesecret: %v", name, inC, all, secret.Erases)
		if inC != 0 || secret.Erases && all != 0 {
			t.Errorf("copies of the %s are left", name)
		}
	}
}

// secretIsHidden says whether even this process cannot read its secrets through
// /proc/self/mem, as it is with memfd_secret.
func secretIsHidden() bool {
	fd, err := unix.MemfdSecret(unix.O_CLOEXEC)
	if err == nil {
		unix.Close(fd)
	}
	return err == nil
}

// copies counts how often the masked key occurs in this process's memory. The Go
// heap lies where Go puts it, at 0xc000000000; goHeap says whether to look there.
func copies(t *testing.T, masked []byte, mask byte, goHeap bool) (found int) {
	t.Helper()
	maps, err := os.ReadFile("/proc/self/maps")
	must(t, err)
	mem, err := os.Open("/proc/self/mem")
	must(t, err)
	defer mem.Close()
	buf := make([]byte, 1<<20+len(masked)-1)
	chunk := buf[:1<<20]
	lines := bufio.NewScanner(strings.NewReader(string(maps)))
	for lines.Scan() {
		var from, to uint64
		var perms string
		if _, err := fmt.Sscanf(lines.Text(), "%x-%x %s", &from, &to, &perms); err != nil {
			t.Fatal(err)
		}
		isHeap := from>>32 == 0xc0
		if !strings.HasPrefix(perms, "rw") || isHeap && !goHeap {
			continue
		}
		here := 0
		for at := from; at < to; at += uint64(len(chunk)) {
			// A key that lies across two chunks is found in the longer read.
			p := buf[:min(to-at, uint64(len(buf)))]
			if _, err := mem.ReadAt(p, int64(at)); err != nil {
				break // a guard page, or memory that the kernel keeps to itself
			}
			here += occurrences(p, masked, mask)
			secret.Wipe(p)
		}
		if here > 0 {
			t.Logf("%d in %s", here, lines.Text())
		}
		found += here
	}
	return found
}

func occurrences(p, masked []byte, mask byte) (n int) {
	for i := 0; i+len(masked) <= len(p); i++ {
		j := 0
		for j < len(masked) && p[i+j]^mask == masked[j] {
			j++
		}
		if j == len(masked) {
			n++
		}
	}
	return n
}
