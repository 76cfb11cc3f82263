package initrd

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/keyagent/keyagent/internal/config"
	"github.com/keyagent/keyagent/internal/crypttab"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/node"
)

// DefaultConfig is the configuration for the initrd. Where it is not there, keyagent
// stays out of initrds.
const DefaultConfig = "/etc/keyagent/initrd.yaml"

// maxFile bounds a file that is copied.
const maxFile = 4 << 20

// Install copies the configuration at path, and the files that it names, below the
// folder root of an initrd that is being built, each where it has its place on this
// machine. With units, the mappings' device units in it wait as long as it takes:
// systemd would end the boot after a minute and a half, and the agent knows better when
// to give up.
func Install(path, root string, units bool) error {
	c, err := node.Load(path)
	if err != nil {
		return err
	}
	if len(c.Volumes) == 0 || c.Crypttab != "" {
		return failure.Newf(failure.Configuration, "list in it what is needed before the root file system is there, under volumes", "%s: an initrd opens volumes of its own configuration, and this one has none, or names crypttab", path)
	}
	files, err := c.Files()
	if err != nil {
		return err
	}
	for _, f := range append([]string{path}, files...) {
		if err := copyFile(f, root); err != nil {
			return failure.New(failure.Configuration, fmt.Errorf("copy into the initrd: %w", err), "")
		}
	}
	if !units {
		return nil
	}
	for _, v := range c.Volumes {
		dir := filepath.Join(root, "etc/systemd/system", crypttab.DeviceUnit("/dev/mapper/"+v.Name)+".d")
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, "keyagent.conf"), []byte("[Unit]\nJobRunningTimeoutSec=infinity\nJobTimeoutSec=infinity\n"), 0o644); err != nil {
			return err
		}
	}
	return nil
}

func copyFile(path, root string) error {
	abs, err := filepath.Abs(path)
	if err != nil {
		return err
	}
	data, err := config.ReadPublicFile(abs, maxFile)
	if err != nil {
		return err
	}
	// A link in the image that leads out of it must not overwrite this machine's file.
	r, err := os.OpenRoot(root)
	if err != nil {
		return err
	}
	defer r.Close()
	rel := strings.TrimPrefix(abs, "/")
	if err := r.MkdirAll(filepath.Dir(rel), 0o755); err != nil {
		return err
	}
	return r.WriteFile(rel, data, 0o644)
}
