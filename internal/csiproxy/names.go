package csiproxy

import (
	"crypto/sha256"
	"encoding/hex"
	"path/filepath"
	"strings"

	"github.com/keyagent/keyagent/attestation/policy"
)

const (
	maxPrefix = 32
	// maxHandle bounds a driver's name of a volume; the CSI specification allows 128
	// bytes, drivers of clouds use more.
	maxHandle = 1024
	// maxMapping is how long the name of a mapping may be, see node.Volume.
	maxMapping = 80
	hashed     = "x-"
)

// volumeID is the ID at the agent and the key service of a volume that the driver calls
// handle. Two handles never have one ID: what is not fit to be one, or looks like a
// digest, becomes a digest.
func (c *Config) volumeID(handle string) string {
	if id := c.Prefix + handle; policy.ValidVolume(id) && !strings.HasPrefix(handle, hashed) {
		return id
	}
	sum := sha256.Sum256([]byte(handle))
	return c.Prefix + hashed + hex.EncodeToString(sum[:])
}

// mappingName is the name of a volume's mapping, empty where the ID will do.
func mappingName(id string) string {
	if len(id) <= maxMapping {
		return ""
	}
	sum := sha256.Sum256([]byte(id))
	return "csi-" + hex.EncodeToString(sum[:16])
}

// private are the paths at which a volume's raw device is.
type private struct {
	dir    string
	stage  string // for the driver's NodeStageVolume
	device string // for its NodePublishVolume: the block device
}

func (c *Config) private(handle string) private {
	sum := sha256.Sum256([]byte(handle))
	dir := filepath.Join(c.Private, hex.EncodeToString(sum[:16]))
	return private{dir: dir, stage: filepath.Join(dir, "stage"), device: filepath.Join(dir, "device")}
}

// within reports whether path is a plain one below the folder of kubelet.
func (c *Config) within(path string) bool {
	in := func(dir string) bool { return dir != "" && strings.HasPrefix(path, dir+"/") }
	return len(path) <= 4096 && filepath.Clean(path) == path && !strings.ContainsRune(path, 0) && (in(c.Kubelet) || in(c.resolved))
}
