//go:build umlguest

package disks

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/keyagent/keyagent/test/sim/seed"
)

// rounds is how many a race has: some in ordinary runs, all of them on request.
func rounds(t *testing.T, ordinary int) int {
	t.Helper()
	text := os.Getenv("KEYAGENT_TEST_ROUNDS")
	if text == "" {
		return ordinary
	}
	return must[int](t)(strconv.Atoi(text))
}

// some are as many of a matrix, by a seed that is printed; all of it on request.
func some(t *testing.T, ordinary int, all []string) []string {
	t.Helper()
	seed.Rand(t).Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	return all[:min(rounds(t, ordinary), len(all))]
}

// two nodes see one disk, each behind a delay of its own.
type shared struct {
	image   string
	devices [2]string
}

// share makes a blank disk that two nodes see, each with its own delay in
// milliseconds for reads and writes.
func share(t *testing.T, round int, delays [2]int) *shared {
	t.Helper()
	s := &shared{image: filepath.Join(t.TempDir(), "disk")}
	f := must[*os.File](t)(os.Create(s.image))
	check(t, f.Truncate(diskSize))
	check(t, f.Close())
	for i := range s.devices {
		lo := tool(t, "losetup", "-f", "--show", s.image)
		name := fmt.Sprintf("delay-%d-%d", round, i)
		tool(t, "dmsetup", "create", name, "--table", fmt.Sprintf("0 %d delay %s 0 %d", diskSize/512, lo, delays[i]))
		tool(t, "dmsetup", "mknodes", name)
		s.devices[i] = "/dev/mapper/" + name
		t.Cleanup(func() {
			_ = exec.Command("dmsetup", "remove", "--retry", "--force", name).Run()
			_ = exec.Command("losetup", "-d", lo).Run()
		})
	}
	return s
}

// attempt is one node's way through a round.
type attempt struct {
	n    *machine
	out  []byte
	err  error
	at   string
	name string
}

// disturb kills a process, or freezes it for a while, at a random moment.
func disturb(r *rand.Rand, cmd *exec.Cmd) (what string, wait func()) {
	after := time.Duration(r.IntN(1500)) * time.Millisecond
	freeze := time.Duration(200+r.IntN(2500)) * time.Millisecond
	kind := r.IntN(4)
	done := make(chan struct{})
	go func() {
		defer close(done)
		if kind < 2 {
			return
		}
		time.Sleep(after)
		if kind == 2 {
			_ = cmd.Process.Kill()
			return
		}
		_ = cmd.Process.Signal(syscall.SIGSTOP)
		time.Sleep(freeze)
		_ = cmd.Process.Signal(syscall.SIGCONT)
	}()
	return []string{"nothing", "nothing", fmt.Sprintf("killed after %v", after), fmt.Sprintf("frozen after %v for %v", after, freeze)}[kind], func() { <-done }
}

// sourceOfClones makes the volume of which disks are cloned, and returns its image. It holds
// a file with this text.
func sourceOfClones(t *testing.T, n *machine, id, text string) (file string) {
	t.Helper()
	file = image(t, diskSize)
	at := mountPoint(t, "source")
	removed(t, id)
	n.configure(t, fmt.Sprintf("{id: %s, device: %s, format: true, filesystem: ext4, no_mmp: true, mount: %s}", id, loop(t, file), at))
	n.must(t, "unlock", id)
	put(t, filepath.Join(at, "of-the-source"), text)
	n.must(t, "close", id)
	return file
}

// TestRaceTwoNodesForOneBlankDisk is cases 47 and 48. Two nodes create and open one
// volume on one disk, which is blank or a clone of another volume's, at random moments,
// over delays, kills and freezes. What either of them was told is on the disk (fsync) is
// there at the end, and never do both have the volume.
func TestRaceTwoNodesForOneBlankDisk(t *testing.T) {
	r := seed.Rand(t)
	w, nodes := lab()
	opened, clones := [2]int{}, 0
	source := sourceOfClones(t, nodes[0], "v-race-source", "of the source")
	for round := range rounds(t, 6) {
		ok := t.Run(fmt.Sprint(round), func(t *testing.T) {
			id := fmt.Sprintf("v-race-%d", round)
			s := share(t, round, [2]int{r.IntN(5), r.IntN(5)})
			more := ""
			if r.IntN(2) == 0 {
				clones++
				more = ", source: v-race-source"
				tool(t, "dd", "if="+source, "of="+s.image, "bs=1M", "conv=notrunc", "status=none")
			}
			var all [2]*attempt
			var group sync.WaitGroup
			for i, n := range nodes {
				a := &attempt{n: n, at: mountPoint(t, "data"), name: fmt.Sprintf("%s-%d", id, i)}
				removed(t, a.name)
				n.configure(t, fmt.Sprintf("{id: %s, name: %s, device: %s, format: true, filesystem: ext4, no_mmp: true, mount: %s%s}", id, a.name, s.devices[i], a.at, more))
				all[i] = a
				cmd := n.command("unlock", id)
				var out bytes.Buffer
				cmd.Stdout, cmd.Stderr = &out, &out
				delay := time.Duration(r.IntN(1200)) * time.Millisecond
				seedOfNode := rand.New(rand.NewPCG(r.Uint64(), 0))
				group.Go(func() {
					time.Sleep(delay)
					if a.err = cmd.Start(); a.err != nil {
						return
					}
					what, wait := disturb(seedOfNode, cmd)
					a.err = cmd.Wait()
					wait()
					a.out = []byte(fmt.Sprintf("(after %v, %s)\n%s", delay, what, out.String()))
				})
			}
			group.Wait()
			w.settle(t, id, nodes, all, s, &opened)
			if more != "" {
				nodes[0].must(t, "unlock", id)
				holds(t, filepath.Join(all[0].at, "of-the-source"), "of the source")
				nodes[0].must(t, "close", id)
			}
		})
		if !ok {
			return
		}
	}
	t.Logf("the nodes had the volume %d and %d times; %d were clones", opened[0], opened[1], clones)
}

// settle looks at what a round left: at most one node has the volume, what it writes
// is there after it gave the volume back, and the other one then finds it.
func (w *world) settle(t *testing.T, id string, nodes [2]*machine, all [2]*attempt, s *shared, opened *[2]int) {
	t.Helper()
	say := func() {
		for i, a := range all {
			t.Logf("node %d: %v\n%s", i+1, a.err, a.out)
		}
		t.Logf("the service:\n%s", tail(w.log.String()))
	}
	have := -1
	for i, a := range all {
		if !mounted(a.at) {
			continue
		}
		if have >= 0 {
			say()
			t.Fatal("both nodes have the volume")
		}
		have = i
	}
	if have < 0 {
		// Both were killed, refused or late: a node comes up again, and gets it.
		have = 0
		if out, code := nodes[0].run(t, "unlock", id); code != 0 {
			if have = 1; code != 16 {
				say()
				t.Fatalf("nobody has the volume, and node 1 says: %s", out)
			}
			nodes[1].must(t, "unlock", id)
		}
	}
	opened[have]++
	text := strings.Repeat("acknowledged\n", 1000)
	put(t, filepath.Join(all[have].at, "note"), text)
	other := 1 - have
	if out, code := nodes[other].run(t, "unlock", id); code != 16 {
		say()
		t.Errorf("the other node is not told who has the volume: %d, %s", code, out)
	}
	if mounted(all[other].at) || mapped(all[other].name) {
		say()
		t.Fatal("the other node has it, too")
	}
	nodes[have].must(t, "close", id)
	if out, code := nodes[other].run(t, "unlock", id); code != 0 {
		say()
		t.Fatalf("the volume is lost: %d, %s", code, out)
	}
	if got, err := os.ReadFile(filepath.Join(all[other].at, "note")); err != nil || string(got) != text {
		say()
		t.Fatalf("what was acknowledged is lost: %d bytes, %v", len(got), err)
	}
	nodes[other].must(t, "close", id)
}

// TestRaceASecondWriterIsToldWhoHasTheVolume is case 48: failover while the old node
// lives, and an operator's word.
func TestRaceASecondWriterIsToldWhoHasTheVolume(t *testing.T) {
	w, nodes := lab()
	a, b := nodes[0], nodes[1]
	s := share(t, 1000, [2]int{0, 0})
	atA, atB := mountPoint(t, "a"), mountPoint(t, "b")
	removed(t, "w-a", "w-b")
	a.configure(t, fmt.Sprintf("{id: v-two, name: w-a, device: %s, format: true, filesystem: ext4, no_mmp: true, mount: %s}", s.devices[0], atA))
	b.configure(t, fmt.Sprintf("{id: v-two, name: w-b, device: %s, filesystem: ext4, no_mmp: true, mount: %s}", s.devices[1], atB))
	running := a.start(t)
	running.waitFor(t, "msg=ready")
	put(t, filepath.Join(atA, "note"), "of a")
	b.fails(t, 16, "until it gives the volume back", "unlock")
	if out := a.must(t, "status"); !strings.Contains(out, "held") {
		t.Errorf("status says\n%s", out)
	}
	// A restart of the service changes nothing, nor one of the agent.
	w.stop()
	w.serve(t)
	b.fails(t, 16, "", "unlock")
	running.kill()
	running = a.start(t)
	running.waitFor(t, "msg=ready")
	holds(t, filepath.Join(atA, "note"), "of a")
	// An operator ends the lease. The old node is cut off its disk.
	tool(t, program(), "volume", "takeover", "v-two", "--admin", filepath.Join(w.dir, "admin.sock"), "--the-holder-has-stopped")
	b.must(t, "unlock")
	holds(t, filepath.Join(atB, "note"), "of a")
	put(t, filepath.Join(atB, "note"), "of b")
	running.waitFor(t, "the volume is cut off its disk")
	if f, err := os.Create(filepath.Join(atA, "late")); err == nil {
		if _, err = f.WriteString("late"); err == nil {
			err = f.Sync()
		}
		if err == nil {
			t.Error("the old node still writes")
		}
		_ = f.Close()
	}
	a.must(t, "close", "v-two")
	holds(t, filepath.Join(atB, "note"), "of b")
	b.must(t, "close", "v-two")
	b.must(t, "unlock")
	holds(t, filepath.Join(atB, "note"), "of b")
	b.must(t, "close", "v-two")
}

// TestRaceABoundHolderStopsByItself is case 48: with takeover: expiry the holder that
// cannot renew suspends itself before another node may have the volume.
func TestRaceABoundHolderStopsByItself(t *testing.T) {
	w, nodes := lab()
	a, b := nodes[0], nodes[1]
	s := share(t, 1001, [2]int{0, 0})
	atA, atB := mountPoint(t, "a"), mountPoint(t, "b")
	removed(t, "x-a", "x-b")
	// The first node reaches the service by a way that can be cut.
	relay := newRelay(t, "127.0.0.1:"+w.port)
	cut := *a // the same machine, by that way
	a = &cut
	a.world = &world{dir: w.dir, port: relay.port, log: w.log}
	a.configure(t, fmt.Sprintf("{id: x-bound, name: x-a, device: %s, format: true, filesystem: ext4, no_mmp: true, mount: %s}", s.devices[0], atA))
	b.configure(t, fmt.Sprintf("{id: x-bound, name: x-b, device: %s, filesystem: ext4, no_mmp: true, mount: %s}", s.devices[1], atB))
	running := a.start(t)
	running.waitFor(t, "msg=ready")
	put(t, filepath.Join(atA, "note"), "of a")
	b.fails(t, 16, "", "unlock")
	relay.cut()
	running.waitFor(t, "suspending a volume")
	eventually(t, "the lease ends and the other node gets the volume", func() bool {
		_, code := b.run(t, "unlock")
		return code == 0
	})
	holds(t, filepath.Join(atB, "note"), "of a")
	put(t, filepath.Join(atB, "note"), "of b")
	relay.mend()
	running.waitFor(t, "another node has it")
	a.must(t, "close", "x-bound")
	holds(t, filepath.Join(atB, "note"), "of b")
	b.must(t, "close", "x-bound")
}
