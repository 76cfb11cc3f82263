package node

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/keyagent/keyagent/attestation/policy"
	"github.com/keyagent/keyagent/internal/failure"
)

// loadWith loads a configuration of a node with a crypttab.
func loadWith(t *testing.T, crypttab, more string) (*Config, error) {
	t.Helper()
	dir := t.TempDir()
	tab, path := filepath.Join(dir, "crypttab"), filepath.Join(dir, "agent.yaml")
	text := "servers: [{address: \"k:1\", pins: [\"sha256:" + strings.Repeat("ab", 32) + "\"]}]\ncrypttab: " + tab + "\n" + more
	for p, s := range map[string]string{tab: crypttab, path: text} {
		if err := os.WriteFile(p, []byte(s), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return Load(path)
}

func TestALineOfCrypttabIsAVolume(t *testing.T) {
	mount := []string{"nosuid", "nodev"}
	for line, want := range map[string]Volume{
		"data /dev/vdb none keyagent,_netdev": {ID: "data", Kind: Data, Name: "data", Device: "/dev/vdb", Filesystem: "none"},
		"data UUID=1-2 - luks,keyagent=node-1.data,keyagent-format=xfs,_netdev,nofail,discard,x-systemd.device-timeout=9s,headless=true": {
			ID: "node-1.data", Kind: Data, Name: "data", Device: "UUID=1-2", Filesystem: "xfs", Format: true, Optional: true, Discards: true},
		"data /dev/vdb none keyagent,keyagent-format,_netdev,noauto": {
			ID: "data", Kind: Data, Name: "data", Device: "/dev/vdb", Filesystem: "none", Format: true, OnRequest: true},
		"data /dev/vdb none keyagent,keyagent-format=ext4,keyagent-no-mmp,_netdev": {
			ID: "data", Kind: Data, Name: "data", Device: "/dev/vdb", Filesystem: "ext4", Format: true, NoMMP: true},
		"data /dev/vdb none keyagent,keyagent-format=ext4,keyagent-from=/dev/mapper/image,keyagent-root-hash=" + hash + ",_netdev": {
			ID: "data", Kind: Data, Name: "data", Device: "/dev/vdb", Filesystem: "ext4", Format: true, From: &Image{Path: "/dev/mapper/image", RootHash: hash}},
		"data /dev/vdb none keyagent,keyagent-offline-boots=3,keyagent-offline-for=24h,_netdev": {
			ID: "data", Kind: Data, Name: "data", Device: "/dev/vdb", Filesystem: "none", Offline: &policy.Offline{For: "24h", Boots: 3}},
		"data /dev/vdb none keyagent,keyagent-format=xfs,keyagent-source=db,_netdev": {
			ID: "data", Kind: Data, Name: "data", Device: "/dev/vdb", Filesystem: "xfs", Format: true, Source: "db"},
		"data /dev/vdb none keyagent,keyagent-measure,_netdev": {ID: "data", Kind: Data, Name: "data", Device: "/dev/vdb", Filesystem: "none", Measure: true},
		"data /dev/vdb none _netdev,keyagent,read-only":        {ID: "data", Kind: Data, Name: "data", Device: "/dev/vdb", Filesystem: "none", ReadOnly: true},
		"sw /dev/vdb none keyagent,swap,_netdev":               {ID: "sw", Kind: Swap, Name: "sw", Device: "/dev/vdb", Filesystem: "none", Format: true},
		"tmp /dev/vdb none keyagent,tmp,_netdev":               {ID: "tmp", Kind: Scratch, Name: "tmp", Device: "/dev/vdb", Filesystem: "ext4", Format: true},
		"tmp /dev/vdb none keyagent,tmp=btrfs,_netdev":         {ID: "tmp", Kind: Scratch, Name: "tmp", Device: "/dev/vdb", Filesystem: "btrfs", Format: true},
	} {
		want.Options = mount
		cfg, err := loadWith(t, "# a comment\nplain /dev/vdz none luks\n"+line+"\n", "")
		if err != nil || len(cfg.Volumes) != 1 || !reflect.DeepEqual(cfg.Volumes[0], want) {
			t.Errorf("%s:\n%+v, %v", line, cfg, err)
		}
	}
}

// hash is some digest.
var hash = strings.Repeat("ab", 32)

func TestALineOfCrypttabThatIsWrongIsNamed(t *testing.T) {
	const named = "volumes: [{id: one, device: /dev/vda}]\n"
	for line, says := range map[string]string{
		"data /dev/vdb none keyagent":                                      "_netdev",
		"data /dev/vdb /key keyagent,_netdev":                              "third field",
		"data /dev/vdb none keyagent,_netdev more":                         "four fields",
		"data /dev/vdb none keyagent,swap,keyagent-measure,_netdev":        "cannot be measured",
		"data /dev/vdb none keyagent,keyagent-measure=15,_netdev":          "takes no value",
		"data /dev/vdb none keyagent,keyagent-from=/i,_netdev":             "sha256 or root_hash",
		"data /dev/vdb none keyagent,keyagent-from=,_netdev":               "no value",
		"data /dev/vdb none keyagent,keyagent-sha256=" + hash + ",_netdev": "path must be absolute",
		"data /dev/vdb none keyagent=,_netdev":                             "names no volume",
		"data /dev/vdb none keyagent,keyagent-format=,_netdev":             "names no filesystem",
		"data /dev/vdb none keyagent,keyagent-fromat,_netdev":              "keyagent-fromat",
		"data /dev/vdb none keyagent,keyagent-format=ntfs,_netdev":         "ntfs",
		"data /dev/vdb none keyagent,keyagent=x,_netdev":                   "twice",
		"data /dev/vdb none keyagent,tpm2-device=auto,_netdev":             "tpm2-device",
		"data /dev/vdb none keyagent,header=/h,_netdev":                    "header",
		"data /dev/vdb none keyagent,nofail=yes,_netdev":                   "takes no value",
		"data /dev/vdb none keyagent,,_netdev":                             "option",
		"data /dev/vdb none keyagent,read-only,keyagent-format,_netdev":    "leave out format",
		"data vdb none keyagent,_netdev":                                   "absolute path",
		"da/ta /dev/vdb none keyagent,_netdev":                             "id",
		"control /dev/vdb none keyagent=x,_netdev":                         "device-mapper",
		"one /dev/vdb none keyagent,_netdev":                               "used twice",
		"data /dev/vda none keyagent,_netdev":                              "used twice",
		"swap /dev/vdb none keyagent,swap,tmp,_netdev":                     "exclude",
		"tmp /dev/vdb none keyagent,tmp,keyagent-format,_netdev":           "exclude",
	} {
		_, err := loadWith(t, line+"\n", named)
		if err == nil || failure.Of(err).Class != failure.Configuration || !strings.Contains(err.Error(), says) || !strings.Contains(err.Error(), "crypttab") {
			t.Errorf("%s: %v", line, err)
		}
	}
	if _, err := loadWith(t, "", "volumes:\n- {id: a, device: /dev/vda, filesystem: ext4, mount: /a, on_request: true}\n- {id: b, device: /dev/vdb, filesystem: ext4, mount: /a/b}\n"); err == nil || !strings.Contains(err.Error(), "on request") {
		t.Errorf("a volume that waits for ever: %v", err)
	}
	if cfg, err := loadWith(t, "", ""); err != nil || os.Remove(cfg.Crypttab) != nil {
		t.Fatal(err)
	} else if cfg, err = Load(filepath.Join(filepath.Dir(cfg.Crypttab), "agent.yaml")); err != nil || len(cfg.Volumes) != 0 {
		t.Errorf("a file that is not there: %v", err)
	}
	if _, err := loadWith(t, strings.Repeat("#", 300<<10), ""); err == nil {
		t.Error("a file without end is read")
	}
}

// The line's unit asks the agent as root.
func TestRootMayOpenAndCloseTheLinesOfCrypttab(t *testing.T) {
	for rule, ok := range map[string]bool{
		`{uid: 0, operations: [open, close], volumes: ["*"]}`:                                             true,
		`{uid: 0, operations: [open], volumes: ["*"]}`:                                                    false,
		`{uid: 0, operations: [open, close], volumes: ["logs"]}`:                                          false,
		`{uid: 1000, operations: [open, close], volumes: ["*"]}`:                                          false,
		`{uid: 0, operations: [open], volumes: ["data"]}, {uid: 0, operations: [close], volumes: ["d*"]}`: true,
	} {
		cfg, err := loadWith(t, "data /dev/vdb none keyagent,_netdev\n", "callers: ["+rule+"]\n")
		if err != nil {
			t.Fatal(err)
		}
		if err := cfg.CheckServing(); (err == nil) != ok {
			t.Errorf("%s: %v", rule, err)
		}
	}
}
