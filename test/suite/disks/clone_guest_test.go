//go:build umlguest

package disks

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// A disk that was cloned from a volume in use becomes a volume of its own, beside its
// source, and goes on where the attempt before was cut off.
func TestDiskACloneBecomesAVolume(t *testing.T) {
	n := patient(t)
	other := disk(t, diskSize)
	removed(t, "v-clone-other")
	n.configure(t, fmt.Sprintf("{id: v-clone-other, device: %s, format: true}", other))
	n.must(t, "unlock", "v-clone-other")
	n.must(t, "close", "v-clone-other")
	for _, kind := range some(t, 2, []string{"ext4", "xfs", "ext4 with integrity", "none"}) {
		t.Run(kind, func(t *testing.T) {
			fs, more, _ := strings.Cut(kind, " ")
			name := "v-clone-" + strings.ReplaceAll(kind, " ", "-")
			from, to := name+"-from", name+"-to"
			size := int64(diskSize)
			if fs == "xfs" {
				size = 400 * mib
			}
			file, copied := image(t, size), image(t, size+32*mib)
			device := loop(t, file)
			at := map[string]string{from: mountPoint(t, "from"), to: mountPoint(t, "to"), name + "-alias": mountPoint(t, "alias")}
			removed(t, from, to, from+"_dif", to+"_dif", name+"-alias")
			line := func(id, device, rest string) string {
				l := fmt.Sprintf("{id: %s, device: %s, format: true", id, device) + rest
				if fs != "none" {
					l += fmt.Sprintf(", filesystem: %s, mount: %s", fs, at[id])
				}
				if fs == "ext4" {
					l += ", no_mmp: true"
				}
				if more != "" {
					l += ", integrity: hmac-sha256, no_journal: true"
				}
				return l + "}"
			}
			write := func(id, text string) {
				if fs == "none" {
					overwrite(t, "/dev/mapper/"+id, 3*mib, []byte(text))
					return
				}
				put(t, filepath.Join(at[id], "note"), text)
			}
			reads := func(id, want string) {
				t.Helper()
				if fs == "none" {
					if got := string(peek(t, "/dev/mapper/"+id, 3*mib, len(want))); got != want {
						t.Errorf("%s holds %q, want %q", id, got, want)
					}
					return
				}
				holds(t, filepath.Join(at[id], "note"), want)
			}
			n.configure(t, line(from, device, ""))
			n.must(t, "unlock", from)
			write(from, "of the source")

			// As storage makes a snapshot: of a disk in use, at one moment.
			if fs != "none" {
				tool(t, "fsfreeze", "-f", at[from])
			}
			tool(t, "dd", "if="+file, "of="+copied, "bs=1M", "conv=notrunc", "status=none")
			if fs != "none" {
				tool(t, "fsfreeze", "-u", at[from])
			}
			clone := loop(t, copied)
			before := tool(t, "sha256sum", clone)
			n.configure(t, line(from, device, ""), line(to, clone, ""))
			n.fails(t, 9, "not blank", "unlock", to)
			n.configure(t, line(from, device, ""), line(to, clone, ", source: v-clone-other"))
			n.fails(t, 9, "v-clone-other", "unlock", to) // of another volume
			n.configure(t, line(from, device, ""), line(to, clone, ", source: x-1"))
			n.fails(t, 7, "x-1", "unlock", to) // no grant lets it
			if tool(t, "sha256sum", clone) != before {
				t.Fatal("it was written to, and is no clone of what was named")
			}

			if more != "" {
				// What the source cannot do, its clone cannot: known before anything is written.
				plain := strings.Replace(line(to, clone, ", discards: true, source: "+from), ", integrity: hmac-sha256, no_journal: true", "", 1)
				n.configure(t, line(from, device, ""), plain)
				n.fails(t, 2, "the source has integrity", "unlock", to)
				if tool(t, "sha256sum", clone) != before {
					t.Error("it was written to")
				}
			}
			if fs == "ext4" {
				// Of another filesystem: unfinished, until the configuration is right.
				n.configure(t, line(from, device, ""), strings.Replace(line(to, clone, ", source: "+from), "filesystem: ext4", "filesystem: xfs", 1))
				n.fails(t, 3, "holds no xfs", "unlock", to)
				n.configure(t, line(from, device, ""), line(to, clone, ""))
				n.fails(t, 15, "begun as a clone", "unlock", to)
			}
			n.configure(t, line(from, device, ""), line(to, clone, ", source: "+from))
			n.must(t, "unlock", to)
			reads(to, "of the source")
			reads(from, "of the source")
			if fs != "none" {
				if free := tool(t, "df", "-B1", "--output=size", at[to]); free == tool(t, "df", "-B1", "--output=size", at[from]) && more == "" {
					t.Error("the filesystem did not grow to the clone's size")
				}
			}
			write(to, "of the clone")
			for _, id := range []string{to, from} {
				n.must(t, "close", id)
				n.must(t, "unlock", id)
			}
			reads(to, "of the clone")
			reads(from, "of the source")
			if more != "" && !mapped(to+"_dif") {
				t.Error("the clone has no tags")
			}
			n.must(t, "close", to)
			// From now on it is a volume as any other, and its source is not asked for.
			n.configure(t, line(to, clone, ""))
			if fs != "xfs" { // whose source is mounted, with the same UUID
				n.must(t, "unlock", to)
				reads(to, "of the clone")
				n.must(t, "close", to)
			}
			n.configure(t, line(from, device, ""))
			n.must(t, "close", from)
			// The disk of the source itself, by another name, is no clone of it.
			alias := filepath.Join(t.TempDir(), "alias")
			check(t, os.Symlink(device, alias))
			n.configure(t, line(from, device, ""), line(name+"-alias", alias, ", source: "+from))
			before = tool(t, "sha256sum", device)
			n.fails(t, 3, "no clone of it", "unlock", name+"-alias")
			if tool(t, "sha256sum", device) != before {
				t.Error("the source's disk was written to")
			}
		})
	}
}

// A clone whose agent is killed in the middle, at each step, is gone on with.
func TestDiskACloneThatWasCutOffGoesOn(t *testing.T) {
	n := first(t)
	file := image(t, diskSize)
	device := loop(t, file)
	removed(t, "v-cutclone-from", "v-cutclone-to")
	source := fmt.Sprintf("{id: v-cutclone-from, device: %s, format: true}", device)
	n.configure(t, source)
	n.must(t, "unlock", "v-cutclone-from")
	overwrite(t, "/dev/mapper/v-cutclone-from", 3*mib, []byte("of the source"))
	n.must(t, "close", "v-cutclone-from")
	for _, when := range some(t, 2, []string{"pwrite64:when=1", "pwrite64:when=2", "pwrite64:when=3", "pwrite64:when=4"}) {
		id := "v-cutclone-" + strings.ReplaceAll(when, ":when=", "-")
		copied := image(t, diskSize)
		tool(t, "dd", "if="+file, "of="+copied, "bs=1M", "status=none")
		clone := loop(t, copied)
		removed(t, id)
		n.configure(t, source, fmt.Sprintf("{id: %s, device: %s, format: true, source: v-cutclone-from}", id, clone))
		args := []string{"-f", "-qq", "-o", filepath.Join(t.TempDir(), "strace"), "-P", clone, "-e", "trace=pwrite64", "-e", "inject=" + strings.Replace(when, ":", ":signal=SIGKILL:", 1)}
		cmd := n.command("unlock", id)
		killed := exec.Command("strace", append(args, append([]string{cmd.Path}, cmd.Args[1:]...)...)...)
		killed.Dir = cmd.Dir
		err := killed.Run()
		t.Logf("%s: %v", when, err)
		if os.Getenv("KEYAGENT_TEST_ROUNDS") != "" || when == "pwrite64:when=3" {
			_ = exec.Command("dmsetup", "remove", "--retry", id).Run() // as after a reboot
		}
		n.must(t, "unlock", id)
		if got := string(peek(t, "/dev/mapper/"+id, 3*mib, 13)); got != "of the source" {
			t.Errorf("%s: it holds %q", when, got)
		}
		n.must(t, "close", id)
	}
}
