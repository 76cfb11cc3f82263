package lab

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
)

// injectFiles puts files into an ext4 image, with debugfs: no mount, so no root
// and no loop device, and a fraction of the time of making the image anew.
func injectFiles(ctx context.Context, image string, files []File) error {
	temp, err := os.MkdirTemp(filepath.Dir(image), ".inject-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(temp)
	var script strings.Builder
	made := map[string]bool{"/": true}
	for i, f := range files {
		name := path.Clean(f.Path)
		if strings.ContainsAny(name+f.Link, " \t\n\"") {
			return fmt.Errorf("file %q: blanks in a path are not supported", f.Path)
		}
		mode, data, err := f.read()
		if err != nil {
			return fmt.Errorf("file %s: %w", f.Path, err)
		}
		makeParents(&script, made, path.Dir(name))
		fmt.Fprintf(&script, "cd %s\nrm %s\n", inFolder(path.Dir(name)), path.Base(name))
		if mode&fs.ModeSymlink != 0 {
			fmt.Fprintf(&script, "symlink %s %s\n", path.Base(name), data)
			continue
		}
		content := filepath.Join(temp, fmt.Sprint(i))
		if err := os.WriteFile(content, data, 0o600); err != nil {
			return err
		}
		fmt.Fprintf(&script, "write %s %s\nsif %s mode %#o\n", content, path.Base(name), path.Base(name), typeRegular|mode.Perm())
	}
	return debugfs(ctx, image, script.String())
}

func makeParents(script *strings.Builder, made map[string]bool, dir string) {
	if made[dir] {
		return
	}
	makeParents(script, made, path.Dir(dir))
	made[dir] = true
	fmt.Fprintf(script, "cd %s\nmkdir %s\n", inFolder(path.Dir(dir)), path.Base(dir))
}

// inFolder names a folder such that debugfs follows it if it is a link, as /lib
// is: it follows all but the last part of a path.
func inFolder(dir string) string { return strings.TrimSuffix(dir, "/") + "/." }

// debugfs runs commands on an image. It goes on after a failed command and ends
// with status 0, so what it says decides: mkdir of what is there and rm of what
// is not are the two complaints that are expected.
func debugfs(ctx context.Context, image, script string) error {
	program, err := tool("debugfs")
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, program, "-w", "-f", "-", image)
	cmd.Stdin = strings.NewReader(script)
	cmd.Env = append(os.Environ(), "LC_ALL=C", "DEBUGFS_PAGER=__none__")
	cmd.WaitDelay = killDelay
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("debugfs: %w: %s", err, tail(out, 800))
	}
	for line := range strings.Lines(string(out)) {
		line = strings.TrimSpace(line)
		switch {
		case line == "", strings.HasPrefix(line, "debugfs"), strings.HasPrefix(line, "Allocated inode"):
		case strings.Contains(line, "mkdir: Ext2 directory already exists"):
		case strings.HasPrefix(line, "rm:") && strings.Contains(line, "not found"):
		default:
			return fmt.Errorf("debugfs: %s", line)
		}
	}
	return nil
}
