//go:build umlguest

package luks

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// stopped is a volume on a device that can be made to hang.
func stopped(t *testing.T) (v volume, stop, goOn func()) {
	v = newVolume(t, idData, dataKey(t))
	below := v.device
	run(t, "dmsetup", "create", "slow", "--table", fmt.Sprintf("0 %d linear %s 0", deviceSize/sectorSize, below))
	v.device = "/dev/" + run(t, "dmsetup", "info", "-c", "--noheadings", "-o", "blkdevname", "slow")
	hangs := false
	stop = func() {
		must(t, os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0o200))
		run(t, "dmsetup", "suspend", "--noflush", "slow")
		hangs = true
	}
	goOn = func() {
		run(t, "dmsetup", "resume", "slow")
		hangs = false
	}
	t.Cleanup(func() {
		if hangs {
			goOn()
		}
		run(t, "dmsetup", "remove", "--retry", "slow")
	})
	return v, stop, goOn
}

// Case 55: one disk never answers. Its own calls end in time, and nothing else waits.
func TestAttack55ADiskThatNeverAnswersStopsNothingElse(t *testing.T) {
	hanging, stop, goOn := stopped(t)
	good := newVolume(t, idLogs, logsKey(t))
	h, err := ReadHeader(context.Background(), HeaderRequest{hanging.device, hanging.id, hanging.macs}, hanging.dek)
	must(t, err)
	stop()

	const limit = 2 * time.Second
	ctx := WithPatience(context.Background(), limit)
	var wg sync.WaitGroup
	began := time.Now()
	wg.Go(func() {
		_, _, err := Open(ctx, hanging.request("data", OpenOptions{}), hanging.dek)
		if !errors.Is(err, ErrDeviceHung) {
			t.Errorf("error is %v", err)
		}
		t.Log(err)
	})
	_, err = good.open("logs")
	must(t, err)
	must(t, good.close("logs"))
	t.Logf("another volume was opened and closed in %v", time.Since(began))
	wg.Wait()
	if took := time.Since(began); took < limit || took > 3*limit {
		t.Errorf("the call ended after %v", took)
	}

	// As long as the answer is owed, nobody asks again.
	began = time.Now()
	for name, f := range map[string]func() error{
		"open":       func() error { _, _, err := Open(ctx, hanging.request("data", OpenOptions{}), hanging.dek); return err },
		"probe":      func() error { _, err := Probe(ctx, hanging.device, hanging.id, hanging.dek); return err },
		"compare":    func() error { return Matches(ctx, hanging.device, h) },
		"signatures": func() error { _, err := Signatures(ctx, hanging.device); return err },
		"write": func() error {
			return Write(ctx, WriteRequest{hanging.device, hanging.id, h, DeadlineIn(time.Minute)}, hanging.dek)
		},
	} {
		if err := f(); !errors.Is(err, ErrDeviceHung) {
			t.Errorf("%s: error is %v", name, err)
		}
	}
	if took := time.Since(began); took > 5*(time.Second+limit/2) {
		t.Errorf("five calls took %v", took)
	}

	goOn()
	deadline := time.Now().Add(10 * time.Second)
	for { // the worker that was left behind ends when it has its answer
		if _, err = hanging.open("data"); err == nil || time.Now().After(deadline) {
			break
		}
	}
	must(t, err)
	must(t, hanging.close("data"))
}

func TestAttack55AProcessEndsWhileItsDiskHangs(t *testing.T) {
	hanging, stop, _ := stopped(t)
	stop()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), hangEnv+"="+hanging.device)
	must(t, cmd.Start())
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	select {
	case err := <-ended:
		t.Fatalf("it did not hang: %v", err)
	case <-time.After(2 * time.Second):
	}
	must(t, cmd.Process.Signal(unix.SIGTERM))
	select {
	case <-ended:
	case <-time.After(5 * time.Second):
		stacks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stack", cmd.Process.Pid))
		for _, p := range stacks {
			text, _ := os.ReadFile(p)
			t.Logf("%s:\n%s", p, text)
		}
		t.Error("it does not end")
	}
}

// The mapping of a volume whose disk hangs is described, and others are closed.
func TestLiveAMappingOverAHungDiskIsDescribed(t *testing.T) {
	ctx := context.Background()
	hanging, stop, goOn := stopped(t)
	good := newVolume(t, idLogs, logsKey(t))
	m := hanging.mustOpen(t, "data")
	good.mustOpen(t, "logs")
	stop()
	began := time.Now()
	got, err := Status(ctx, "data")
	if err != nil || got != m {
		t.Errorf("mapping is %+v, %v", got, err)
	}
	must(t, good.close("logs"))
	cancelled, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	_, err = Prove(cancelled, hanging.existing("data"), hanging.dek)
	wantError(t, err, context.DeadlineExceeded)
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("it took %v", took)
	}
	goOn()
}
