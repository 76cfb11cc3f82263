package secret

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

const canary = "canary-7f3a-must-not-be-seen"

func canaryBytes(t *testing.T) *Bytes {
	t.Helper()
	b, err := From([]byte(canary))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	return b
}

func TestASecretHasNoPrintableForm(t *testing.T) {
	b := canaryBytes(t)
	var log bytes.Buffer
	slog.New(slog.NewJSONHandler(&log, nil)).Info("x", "key", b, "in", struct{ K *Bytes }{b})
	shown := log.String()
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%T%v", "%p"} {
		shown += fmt.Sprintf(verb, b) + fmt.Sprintf(verb, struct{ K *Bytes }{b})
	}
	if strings.Contains(shown, canary) || strings.Contains(shown, fmt.Sprintf("%x", canary)) {
		t.Fatalf("the content is visible: %s", shown)
	}
	if _, err := json.Marshal(map[string]any{"k": b}); err == nil {
		t.Fatal("a secret was marshalled to JSON")
	}
}

func TestFromWipesItsSource(t *testing.T) {
	p := []byte(canary)
	b, err := From(p)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if !bytes.Equal(p, make([]byte, len(p))) {
		t.Fatalf("the source still holds %q", p)
	}
}

func TestAClosedSecretIsWipedAndRefusesUse(t *testing.T) {
	b, err := From([]byte(canary))
	if err != nil {
		t.Fatal(err)
	}
	c, err := b.Clone()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if !b.Equal(c) {
		t.Fatal("a clone differs")
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	if err := b.Close(); err != nil {
		t.Fatalf("second close: %v", err)
	}
	if err := b.Use(func([]byte) error { return nil }); !errors.Is(err, ErrClosed) {
		t.Fatalf("use after close: %v", err)
	}
	if b.Equal(c) || b.Equal(b) {
		t.Fatal("a closed secret equals something")
	}
	if err := (&Bytes{}).Use(func([]byte) error { return nil }); !errors.Is(err, ErrClosed) {
		t.Fatalf("the zero value can be used: %v", err)
	}
}

func TestReadIsBounded(t *testing.T) {
	for _, tt := range []struct {
		name  string
		in    string
		limit int
		want  error
	}{
		{"an empty input is refused", "", 8, ErrSize},
		{"an input at the limit is read", "12345678", 8, nil},
		{"one byte over the limit is refused", "123456789", 8, ErrSize},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b, err := Read(strings.NewReader(tt.in), tt.limit)
			if !errors.Is(err, tt.want) {
				t.Fatalf("got %v, want %v", err, tt.want)
			}
			if err == nil {
				defer b.Close()
				_ = b.Use(func(p []byte) error {
					if string(p) != tt.in {
						t.Errorf("read %q", p)
					}
					return nil
				})
			}
		})
	}
}

func TestSizesOutsideTheBoundsAreRefused(t *testing.T) {
	for _, n := range []int{-1, 0, 1<<20 + 1} {
		if b, err := New(n); !errors.Is(err, ErrSize) {
			b.Close()
			t.Errorf("New(%d): %v", n, err)
		}
	}
}

func TestThePagesAreLocked(t *testing.T) {
	b := canaryBytes(t)
	_ = b.Use(func(p []byte) error {
		smaps, err := os.ReadFile("/proc/self/smaps")
		if err != nil {
			t.Fatal(err)
		}
		rest := ""
		for _, line := range regexp.MustCompile(`(?m)^([0-9a-f]+)-([0-9a-f]+) `).FindAllStringSubmatchIndex(string(smaps), -1) {
			from, _ := strconv.ParseUint(string(smaps[line[2]:line[3]]), 16, 64)
			to, _ := strconv.ParseUint(string(smaps[line[4]:line[5]]), 16, 64)
			if at := uint64(uintptrOf(p)); from <= at && at < to {
				rest = string(smaps[line[0]:])
			}
		}
		if rest == "" {
			t.Fatal("the secret is in no mapping")
		}
		_, flags, _ := strings.Cut(rest, "VmFlags:")
		flags, _, _ = strings.Cut(flags, "\n")
		if !strings.Contains(flags, " lo") {
			t.Errorf("pages are not locked: %s (protection %s)", flags, InForce())
		}
		if InForce() == Mlock && !strings.Contains(flags, " dd") {
			t.Errorf("pages would be dumped: %s", flags)
		}
		return nil
	})
}

func TestBothKindsOfMappingWork(t *testing.T) {
	for name, f := range map[string]func(int) (*mapping, error){"locked": mapLocked, "memfd": mapMemfd} {
		m, err := f(4096)
		if name == "memfd" && errors.Is(err, unix.ENOSYS) {
			t.Logf("this kernel has no memfd_secret; %s is in force", InForce())
			continue
		}
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		copy(m.data, canary)
		if err := m.destroy(); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
}

// Secrets that share pages do not share bytes, whatever is closed in between, and
// a slot is zeros before anybody gets it.
func TestSecretsThatSharePagesKeepToThemselves(t *testing.T) {
	var wg sync.WaitGroup
	for worker := range 8 {
		wg.Go(func() {
			r := mathrand.New(mathrand.NewPCG(1, uint64(worker)))
			held := map[*Bytes]byte{}
			for range 3000 {
				if len(held) > 100 || len(held) > 0 && r.IntN(3) == 0 {
					for b, fill := range held {
						_ = b.Use(func(p []byte) error {
							if len(p) != b.Len() || bytes.Count(p, []byte{fill}) != len(p) {
								t.Errorf("%d bytes of %d changed", len(p)-bytes.Count(p, []byte{fill}), len(p))
							}
							if cap(p) != len(p) {
								t.Error("an append would reach a neighbour")
							}
							return nil
						})
						b.Close()
						delete(held, b)
						break
					}
					continue
				}
				b, err := New(1 + r.IntN(2*slotSize))
				if err != nil {
					t.Error(err)
					return
				}
				fill := byte(1 + r.IntN(255))
				_ = b.Use(func(p []byte) error {
					if bytes.Count(p, []byte{0}) != len(p) {
						t.Error("what somebody else left is in it")
					}
					for i := range p {
						p[i] = fill
					}
					return nil
				})
				held[b] = fill
			}
			for b := range held {
				b.Close()
			}
		})
	}
	wg.Wait()
	shared.mu.Lock()
	defer shared.mu.Unlock()
	if shared.empty > spare {
		t.Errorf("%d pages without a secret are kept", shared.empty)
	}
}

func BenchmarkAKeyIsMadeAndClosed(b *testing.B) {
	for b.Loop() {
		k, err := New(32)
		if err != nil {
			b.Fatal(err)
		}
		k.Close()
	}
}

func TestCloseWaitsForUse(t *testing.T) {
	b := canaryBytes(t)
	inside, release := make(chan struct{}), make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		_ = b.Use(func(p []byte) error {
			close(inside)
			<-release
			if string(p) != canary {
				t.Error("the content was wiped under its reader")
			}
			return nil
		})
	})
	<-inside
	wg.Go(func() { b.Close() })
	close(release)
	wg.Wait()
}

func TestHardenedProcessIsNotDumpable(t *testing.T) {
	if os.Getenv("SECRET_CHILD") == "1" {
		if _, err := HardenProcess(); err != nil {
			fmt.Println("refused:", err)
			os.Exit(1)
		}
		d, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0)
		var lim unix.Rlimit
		_ = unix.Getrlimit(unix.RLIMIT_CORE, &lim)
		fmt.Println("dumpable", d, err, "core", lim.Cur, lim.Max)
		os.Exit(0)
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestHardenedProcessIsNotDumpable$")
	cmd.Env = append(os.Environ(), "SECRET_CHILD=1")
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "dumpable 0 <nil> core 0 0") {
		t.Fatalf("%v: %s", err, out)
	}
}
