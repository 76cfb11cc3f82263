//go:build umlguest

package disks

import (
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// rootImage is an ext4 with a file in it, and its SHA-256.
func rootImage(t *testing.T, size int64) (path, sum string) {
	t.Helper()
	tree := t.TempDir()
	put(t, filepath.Join(tree, "hello"), "from the image")
	path = image(t, size)
	tool(t, "mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-d", tree, path)
	return path, digest(t, path)
}

func digest(t *testing.T, path string) string {
	t.Helper()
	return fmt.Sprintf("%x", sha256.Sum256(must[[]byte](t)(os.ReadFile(path))))
}

func (m *machine) fromImage(t *testing.T, id, device, mount, from string) {
	t.Helper()
	m.configure(t, fmt.Sprintf("{id: %s, device: %s, filesystem: ext4, mount: %s, format: true, from: %s}", id, device, mount, from))
}

// A volume begins with the image, once; what is written to it later stays.
func TestDiskAVolumeBeginsWithAnImage(t *testing.T) {
	m := first(t)
	from, sum := rootImage(t, 24*mib)
	device, at := disk(t, 96*mib), mountPoint(t, "root")
	removed(t, "v-image")
	m.fromImage(t, "v-image", device, at, fmt.Sprintf("{path: %s, sha256: %s}", from, sum))
	m.must(t, "unlock", "--standalone")
	holds(t, filepath.Join(at, "hello"), "from the image")
	var st unix.Statfs_t
	check(t, unix.Statfs(at, &st))
	if size := int64(st.Blocks) * st.Bsize; size < 60*mib {
		t.Errorf("the filesystem has %d MiB of 80", size/mib)
	}
	put(t, filepath.Join(at, "hello"), "mine by now")
	m.must(t, "close", "v-image", "--standalone")
	m.must(t, "provision", "v-image")
	holds(t, filepath.Join(at, "hello"), "mine by now")
	m.must(t, "close", "v-image", "--standalone")
}

// An agent that runs hears of a volume that is provisioned beside it, and renews its lease,
// which the command does no longer.
func TestDiskARunningAgentHearsOfAProvision(t *testing.T) {
	m := first(t)
	from, sum := rootImage(t, 24*mib)
	removed(t, "x-image")
	m.configure(t, fmt.Sprintf("{id: x-image, device: %s, filesystem: ext4, format: true, on_request: true, from: {path: %s, sha256: %s}}", disk(t, 96*mib), from, sum))
	a := m.start(t)
	a.waitFor(t, "msg=ready")
	m.must(t, "provision", "x-image")
	first := m.leaseUntil(t, "x-image")
	for deadline := time.Now().Add(time.Minute); m.leaseUntil(t, "x-image") == first; time.Sleep(time.Second) {
		if time.Now().After(deadline) {
			t.Fatalf("nobody renews the lease:\n%s", tail(a.log.String()))
		}
	}
	m.must(t, "close", "x-image")
	a.kill()
}

// leaseUntil is the end of a lease as the state of a volume has it.
func (m *machine) leaseUntil(t *testing.T, id string) string {
	t.Helper()
	text := must[[]byte](t)(os.ReadFile(filepath.Join(m.dir, "state", id+".json")))
	return regexp.MustCompile(`"lease_until":\d+`).FindString(string(text))
}

// The kernel checks what is read from dm-verity.
func TestDiskAVolumeBeginsWithAnImageOfVerity(t *testing.T) {
	tool(t, "/run/modprobe", "dm-verity")
	m := first(t)
	file, _ := rootImage(t, 24*mib)
	hashes := image(t, 4*mib)
	out := tool(t, "veritysetup", "format", file, hashes)
	root := regexp.MustCompile(`Root hash:\s+([0-9a-f]{64})`).FindStringSubmatch(out)
	if root == nil {
		t.Fatal(out)
	}
	data, tree := loop(t, file), loop(t, hashes, "-r")
	open := func(options ...string) {
		t.Helper()
		tool(t, "veritysetup", append([]string{"open", data, "v-source", tree, root[1]}, options...)...)
	}
	shut := func() { tool(t, "veritysetup", "close", "v-source") }
	device, at := disk(t, 96*mib), mountPoint(t, "root")
	removed(t, "v-verity", "v-source")
	m.fromImage(t, "v-verity", device, at, "{path: /dev/mapper/v-source, root_hash: "+root[1]+"}")

	open("--ignore-corruption")
	m.fails(t, 14, "ignore_corruption", "unlock", "--standalone")
	shut()
	open()
	m.fails(t, 14, "its root hash is", "provision", "v-verity", "--from", "/dev/mapper/v-source", "--root-hash", strings.Repeat("0", 64))
	m.fails(t, 14, "not one target of dm-verity", "provision", "v-verity", "--from", m.linear(t, data), "--root-hash", root[1])
	tool(t, "dmsetup", "remove", "v-linear")
	if strings.Contains(m.log.String(), "volume=v-verity operation=format") {
		t.Error("the key service was told of an attempt")
	}

	// A block that the host changed meanwhile.
	shut()
	was := peek(t, data, 20*mib, 4096)
	overwrite(t, data, 20*mib, []byte("not the image"))
	open()
	m.fails(t, 14, "read it at byte", "unlock", "--standalone")
	if mapped("v-verity") {
		t.Error("it is mapped")
	}
	shut()
	overwrite(t, data, 20*mib, was)
	open()
	m.must(t, "unlock", "--standalone")
	holds(t, filepath.Join(at, "hello"), "from the image")
	m.must(t, "close", "v-verity", "--standalone")
}

// linear is a mapping of a device as it is.
func (m *machine) linear(t *testing.T, device string) string {
	t.Helper()
	removed(t, "v-linear")
	tool(t, "dmsetup", "create", "--readonly", "v-linear", "--table", "0 "+tool(t, "blockdev", "--getsz", device)+" linear "+device+" 0")
	tool(t, "dmsetup", "mknodes", "v-linear")
	return "/dev/mapper/v-linear"
}

// What is not the image, or does not fit, becomes no volume; the right one does, later.
func TestDiskAnotherImageBecomesNoVolume(t *testing.T) {
	m := first(t)
	from, sum := rootImage(t, 24*mib)
	device, at := disk(t, 96*mib), mountPoint(t, "root")
	removed(t, "v-other", "v-large")
	m.fromImage(t, "v-other", device, at, fmt.Sprintf("{path: %s, sha256: %s}", from, strings.Repeat("0", 64)))
	for range 2 {
		m.fails(t, 14, "its SHA-256 is "+sum, "unlock", "--standalone")
		if mapped("v-other") || mounted(at) {
			t.Errorf("mapped: %v, mounted: %v", mapped("v-other"), mounted(at))
		}
	}
	if regexp.MustCompile(`event=confirm-volume .*volume=v-other `).MatchString(m.log.String()) {
		t.Errorf("the volume became active:\n%s", tail(m.log.String()))
	}
	small := image(t, 24*mib)
	tool(t, "mke2fs", "-q", "-F", "-t", "ext4", "-b", "1024", small)
	m.fails(t, 3, "blocks of 1024 bytes", "provision", "v-other", "--from", small, "--sha256", digest(t, small))
	m.fails(t, 3, "holds no xfs", "provision", "v-other", "--config", m.written(t, "xfs.yaml", "v-other", device, "xfs"), "--from", from, "--sha256", sum)
	m.fromImage(t, "v-other", device, at, fmt.Sprintf("{path: %s, sha256: %s}", from, sum))
	m.must(t, "unlock", "--standalone")
	holds(t, filepath.Join(at, "hello"), "from the image")
	m.must(t, "close", "v-other", "--standalone")

	m.fromImage(t, "v-large", disk(t, 32*mib), at, fmt.Sprintf("{path: %s, sha256: %s}", from, sum))
	m.fails(t, 3, "the image is larger than the volume", "unlock", "--standalone")
	if strings.Contains(m.log.String(), "volume=v-large operation=format") {
		t.Error("the key service was told of an attempt")
	}
}

// written is the node's configuration for one volume with another filesystem.
func (m *machine) written(t *testing.T, name, id, device, fs string) string {
	t.Helper()
	m.configure(t, fmt.Sprintf("{id: %s, device: %s, filesystem: %s}", id, device, fs))
	path := filepath.Join(m.dir, name)
	check(t, os.Rename(filepath.Join(m.dir, "agent.yaml"), path))
	return path
}

// A power cut in the middle of the copy: the next run copies all of it again.
func TestDiskACopyThatWasCutOffBeginsAgain(t *testing.T) {
	m := first(t)
	from, sum := rootImage(t, 24*mib)
	source := loop(t, from)
	removed(t, "v-cut", "v-slow")
	sectors := tool(t, "blockdev", "--getsz", source)
	tool(t, "dmsetup", "create", "--readonly", "v-slow", "--table", "0 "+sectors+" delay "+source+" 0 300")
	tool(t, "dmsetup", "mknodes", "v-slow")
	device, at := disk(t, 96*mib), mountPoint(t, "root")
	m.fromImage(t, "v-cut", device, at, fmt.Sprintf("{path: /dev/mapper/v-slow, sha256: %s}", sum))
	said := &log{}
	cmd := m.command("unlock", "--standalone")
	cmd.Stderr = said
	check(t, cmd.Start())
	eventually(t, "the copy begins", func() bool {
		return strings.Contains(said.String(), "copying the image") && peek(t, "/dev/mapper/v-cut", 1080, 1)[0] == 0x53 // a superblock's
	})
	check(t, cmd.Process.Signal(syscall.SIGKILL))
	_ = cmd.Wait()
	if strings.Contains(said.String(), "step=copied") || !mapped("v-cut") {
		t.Errorf("it was not cut off in the middle:\n%s", said.String())
	}
	m.fromImage(t, "v-cut", device, at, fmt.Sprintf("{path: %s, sha256: %s}", from, sum))
	m.must(t, "unlock", "--standalone")
	holds(t, filepath.Join(at, "hello"), "from the image")
	m.must(t, "close", "v-cut", "--standalone")
}
