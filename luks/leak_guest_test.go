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
	_, err = Adopt(context.Background(), v.device, v.id, v.dek)
	must(t, err)
	v.mustOpen(t, "data")
	must(t, v.close("data"))
	must(t, dek.Close())
	runtime.GC()
	runtime.GC()
	inC, all := copies(t, masked, mask, false), copies(t, masked, mask, true)
	t.Logf("copies left: %d outside the Go heap, %d in all; runtimesecret: %v", inC, all, secret.Erases)
	if inC != 0 || secret.Erases && all != 0 {
		t.Error("copies of the DEK are left")
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
		p := make([]byte, to-from)
		if _, err := mem.ReadAt(p, int64(from)); err != nil {
			continue // a guard page, or memory that the kernel keeps to itself
		}
		here := 0
		for i := 0; i+len(masked) <= len(p); i++ {
			j := 0
			for j < len(masked) && p[i+j]^mask == masked[j] {
				j++
			}
			if j == len(masked) {
				here++
			}
		}
		secret.Wipe(p)
		if here > 0 {
			t.Logf("%d in %s", here, lines.Text())
		}
		found += here
	}
	return found
}
