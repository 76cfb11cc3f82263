package node

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/keyagent/keyagent/attestation/policy"
)

func TestAVolumeIsCheckedWithoutAFile(t *testing.T) {
	good := Volume{ID: "data", Device: "/dev/vdb", Filesystem: "ext4", Mount: "/data/"}
	v := good
	if err := v.Validate(); err != nil || v.Name != "data" || v.Mount != "/data" || v.Kind != Data || fmt.Sprint(v.Options) != "[nosuid nodev]" {
		t.Fatalf("%+v, %v", v, err)
	}
	for name, tt := range map[string]struct {
		change func(*Volume)
		field  string
	}{
		"no ID":                         {func(v *Volume) { v.ID = "" }, "id"},
		"a path for an ID":              {func(v *Volume) { v.ID = "../x" }, "id"},
		"a name of 81 characters":       {func(v *Volume) { v.Name = strings.Repeat("x", 81) }, "name"},
		"a name of a mapping below":     {func(v *Volume) { v.Name = "data_dif" }, "name"},
		"a name of a proof":             {func(v *Volume) { v.Name = "data_prf" }, "name"},
		"the device-mapper's own name":  {func(v *Volume) { v.Name = "control" }, "name"},
		"no device":                     {func(v *Volume) { v.Device = "" }, "device"},
		"a relative device":             {func(v *Volume) { v.Device = "vdb" }, "device"},
		"a device with dots":            {func(v *Volume) { v.Device = "/dev/../etc/x" }, "device"},
		"an empty label":                {func(v *Volume) { v.Device = "LABEL=" }, "device"},
		"a label that climbs":           {func(v *Volume) { v.Device = "LABEL=../../sda" }, "device"},
		"an unknown filesystem":         {func(v *Volume) { v.Filesystem = "ntfs" }, "filesystem"},
		"a label of 17 bytes":           {func(v *Volume) { v.Label = strings.Repeat("x", 17) }, "label"},
		"a label that is a flag":        {func(v *Volume) { v.Label = "-d" }, "label"},
		"a mount point of nothing":      {func(v *Volume) { v.Filesystem = "none" }, "mount"},
		"the root":                      {func(v *Volume) { v.Mount = "//" }, "mount"},
		"integrity":                     {func(v *Volume) { v.Integrity = "crc32c" }, "integrity"},
		"a journal elsewhere":           {func(v *Volume) { v.Options = []string{"noatime", "journal_path=/dev/sda"} }, "options"},
		"a btrfs device elsewhere":      {func(v *Volume) { v.Options = []string{"device=/dev/sda"} }, "options"},
		"two options within quotes":     {func(v *Volume) { v.Options = []string{`context="a",bind,x="b"`} }, "options"},
		"two options in one":            {func(v *Volume) { v.Options = []string{"noatime,bind"} }, "options"},
		"errors that are passed over":   {func(v *Volume) { v.Options = []string{"errors=continue"} }, "options"},
		"itself as what it comes after": {func(v *Volume) { v.After = []string{"data"} }, "after"},
		"created and read-only":         {func(v *Volume) { v.Format, v.ReadOnly = true, true }, "read_only"},
		"swap with a filesystem":        {func(v *Volume) { v.Kind, v.Format = Swap, true }, "kind"},
		"offline without an end":        {func(v *Volume) { v.Offline = &policy.Offline{Boots: 3} }, "offline"},
		"offline for any boots":         {func(v *Volume) { v.Offline = &policy.Offline{For: "24h"} }, "offline"},
		"offline, and only read":        {func(v *Volume) { v.Offline, v.ReadOnly = &policy.Offline{For: "24h", Boots: 3}, true }, "offline"},
		"offline, and mounted read-only": {func(v *Volume) {
			v.Offline, v.Options = &policy.Offline{For: "24h", Boots: 3}, []string{"ro"}
		}, "offline"},
		"offline swap": {func(v *Volume) {
			v.Kind, v.Format, v.Mount, v.Filesystem, v.Offline = Swap, true, "", "", &policy.Offline{For: "24h", Boots: 3}
		}, "offline"},
		"measured swap":             {func(v *Volume) { v.Kind, v.Format, v.Measure, v.Mount, v.Filesystem = Swap, true, true, "", "" }, "kind"},
		"image by a relative path":  {func(v *Volume) { v.From = &Image{Path: "root.img", SHA256: strings.Repeat("0", 64)} }, "from"},
		"image without a proof":     {func(v *Volume) { v.From = &Image{Path: "/root.img"} }, "from"},
		"image with a short digest": {func(v *Volume) { v.From = &Image{Path: "/root.img", SHA256: "ab"} }, "from"},
		"image in upper case":       {func(v *Volume) { v.From = &Image{Path: "/root.img", RootHash: strings.Repeat("A", 64)} }, "from"},
		"image with two proofs": {func(v *Volume) {
			v.From = &Image{Path: "/root.img", SHA256: strings.Repeat("0", 64), RootHash: strings.Repeat("0", 64)}
		}, "from"},
		"image of btrfs": {func(v *Volume) {
			v.Filesystem, v.From = "btrfs", &Image{Path: "/root.img", SHA256: strings.Repeat("0", 64)}
		}, "from"},
		"image and a label": {func(v *Volume) {
			v.Filesystem, v.Label, v.From = "ext4", "root", &Image{Path: "/root.img", SHA256: strings.Repeat("0", 64)}
		}, "from"},
		"image and read-only": {func(v *Volume) {
			v.ReadOnly, v.Format, v.From = true, false, &Image{Path: "/root.img", SHA256: strings.Repeat("0", 64)}
		}, "from"},
		"image into swap": {func(v *Volume) {
			v.Kind, v.Format, v.Mount, v.Filesystem, v.From = Swap, true, "", "", &Image{Path: "/root.img", SHA256: strings.Repeat("0", 64)}
		}, "from"},
		"a source that is no ID":    {func(v *Volume) { v.Source = "a/b" }, "source"},
		"itself as its source":      {func(v *Volume) { v.Source = "data" }, "source"},
		"a source and an image":     {func(v *Volume) { v.Source, v.From = "db", &Image{Path: "/root.img", SHA256: strings.Repeat("0", 64)} }, "source"},
		"a clone by its UUID":       {func(v *Volume) { v.Source, v.Device = "db", "UUID=6f1d3a52-1c6b-4f0c-9a53-0d8a4a6b7c11" }, "source"},
		"a clone by udev's link":    {func(v *Volume) { v.Source, v.Device = "db", "/dev/disk/by-label/db" }, "source"},
		"a clone of btrfs":          {func(v *Volume) { v.Source, v.Filesystem = "db", "btrfs" }, "source"},
		"a clone that gets a label": {func(v *Volume) { v.Source, v.Filesystem, v.Label = "db", "ext4", "new" }, "source"},
		"a clone for swap":          {func(v *Volume) { v.Kind, v.Format, v.Mount, v.Filesystem, v.Source = Swap, true, "", "", "db" }, "source"},
		"swap without format":       {func(v *Volume) { v.Kind, v.Mount, v.Filesystem = Swap, "", "" }, "kind"},
		"integrity of a throw-away volume": {func(v *Volume) {
			v.Kind, v.Mount, v.Filesystem, v.Format, v.Integrity = Swap, "", "", true, "hmac-sha256"
		}, "integrity"},
		"integrity and TRIM":         {func(v *Volume) { v.Integrity, v.Discards = "hmac-sha256", true }, "integrity"},
		"integrity and a long name":  {func(v *Volume) { v.Integrity, v.Name = "hmac-sha256", strings.Repeat("n", 77) }, "integrity"},
		"integrity and read-only":    {func(v *Volume) { v.Integrity, v.Format, v.ReadOnly = "hmac-sha256", false, true }, "read_only"},
		"integrity, mounted ro":      {func(v *Volume) { v.Integrity, v.Format, v.Options = "hmac-sha256", false, []string{"ro"} }, "read_only"},
		"no journal of no integrity": {func(v *Volume) { v.NoJournal = true }, "integrity"},
		"another kind":               {func(v *Volume) { v.Kind = "tape" }, "kind"},
	} {
		v := good
		tt.change(&v)
		var f *FieldError
		if err := v.Validate(); !errors.As(err, &f) || f.Field != tt.field || !errors.Is(err, ErrVolume) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, o := range []string{"ro", "noatime", "relatime", "discard", "data=ordered", "compress=zstd:3", "subvol=@data", "x-systemd.automount", "context=system_u:object_r:data_t:s0", `context="system_u:object_r:container_file_t:s0:c1,c2"`} {
		if err := CheckOption(o); err != nil {
			t.Errorf("%s: %v", o, err)
		}
	}
}

func TestAReadOnlyMountHasAReadOnlyMapping(t *testing.T) {
	v := Volume{ID: "data", Device: "/dev/vdb", Filesystem: "ext4", Mount: "/data", Options: []string{"ro"}}
	if err := v.Validate(); err != nil || !v.ReadOnly {
		t.Errorf("%+v, %v", v, err)
	}
}

func TestADeviceByTagIsUdevsLink(t *testing.T) {
	for device, want := range map[string]string{
		"/dev/vdb":           "/dev/vdb",
		"UUID=0b5f-11":       "/dev/disk/by-uuid/0b5f-11",
		"PARTLABEL=my data":  `/dev/disk/by-partlabel/my\x20data`,
		"LABEL=größe":        "/dev/disk/by-label/größe",
		"PARTUUID=1-2":       "/dev/disk/by-partuuid/1-2",
		"/dev/disk/a=b":      "/dev/disk/a=b",
		"LABEL=a=b":          "/dev/disk/by-label/a=b",
		"LABEL=semi;quote\"": `/dev/disk/by-label/semi\x3bquote\x22`,
	} {
		v := Volume{ID: "data", Device: device}
		if err := v.Validate(); err != nil || v.DevicePath() != want {
			t.Errorf("%s is %s, %v", device, v.DevicePath(), err)
		}
	}
}

func TestVolumesComeUpInAnOrder(t *testing.T) {
	all := []Volume{
		{ID: "deep", Device: "/dev/a", Filesystem: "ext4", Mount: "/m/sub/deep"},
		{ID: "m", Device: "/dev/b", Filesystem: "ext4", Mount: "/m"},
		{ID: "alike", Device: "/dev/c", Filesystem: "ext4", Mount: "/mm"},
		{ID: "sub", Device: "/dev/d", Filesystem: "ext4", Mount: "/m/sub"},
		{ID: "swap", Device: "/dev/e", Kind: Swap, Format: true, After: []string{"alike"}},
	}
	for i := range all {
		if err := all[i].Validate(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := CheckVolumes(all); err != nil {
		t.Fatal(err)
	}
	stages, stuck := Order(all)
	if got := fmt.Sprint(stages); got != "[[1 2] [3 4] [0]]" || stuck != -1 {
		t.Errorf("stages are %s, stuck %d", got, stuck)
	}
	if got := Needs(all, &all[0]); !slices.Equal(got, []string{"m", "sub"}) {
		t.Errorf("deep needs %v", got)
	}
	all[1].After = []string{"deep"}
	if i, err := CheckVolumes(all); err == nil || !strings.Contains(err.Error(), "waits for itself") {
		t.Errorf("%d, %v", i, err)
	}
}

func TestWhatIsNamedTwiceIsAnErrorOfTheConfiguration(t *testing.T) {
	for name, second := range map[string]Volume{
		"device": {ID: "b", Device: "/dev/disk/by-uuid/x"},
		"id":     {ID: "a", Device: "/dev/b"},
		"name":   {ID: "b", Name: "a", Device: "/dev/b"},
		"mount":  {ID: "b", Device: "/dev/b", Filesystem: "ext4", Mount: "/m"},
		"after":  {ID: "b", Device: "/dev/b", After: []string{"c"}},
	} {
		all := []Volume{{ID: "a", Device: "UUID=x", Filesystem: "ext4", Mount: "/m"}, second}
		for i := range all {
			if err := all[i].Validate(); err != nil {
				t.Fatal(err)
			}
		}
		var f *FieldError
		if i, err := CheckVolumes(all); !errors.As(err, &f) || f.Field != name || i != 1 {
			t.Errorf("%s: volume %d, %v", name, i, err)
		}
	}
}

const head = `servers: [{address: "127.0.0.1:1", pins: ["sha256:0000000000000000000000000000000000000000000000000000000000000000"]}]
`

func TestANodeWithoutVolumesIsAGoodNode(t *testing.T) {
	load := func(text string) (*Config, error) {
		path := filepath.Join(t.TempDir(), "agent.yaml")
		if err := os.WriteFile(path, []byte(head+text), 0o600); err != nil {
			t.Fatal(err)
		}
		return Load(path)
	}
	for _, text := range []string{"", "volumes: []\n", `dynamic: [{uids: [0], volumes: ["pvc-*"], devices: ["/dev/disk/by-id/*"], format: true}]` + "\n"} {
		if _, err := load(text); err != nil {
			t.Errorf("%q: %v", text, err)
		}
	}
	for text, want := range map[string]string{
		`dynamic: [{volumes: ["*"], devices: ["/dev/*"]}]`:                              "dynamic[0].uids: empty",
		`dynamic: [{uids: [0], devices: ["/dev/*"]}]`:                                   "dynamic[0].volumes: empty",
		`dynamic: [{uids: [0], volumes: ["*"]}]`:                                        "dynamic[0].devices: empty",
		`dynamic: [{uids: [0], volumes: ["*"], devices: ["dev/*"]}]`:                    "dynamic[0].devices[0]: must be an absolute path",
		`dynamic: [{uids: [0], volumes: ["*"], devices: ["/dev/[a"]}]`:                  "dynamic[0].devices[0]",
		`dynamic: [{uids: [0], volumes: ["*"], devices: ["/dev/*"], options: [bind]}]`:  "dynamic[0].options[0]",
		`dynamic: [{uids: [0], volumes: ["*"], devices: ["/dev/*"], filesystem: ntfs}]`: "must be of ext4",
		`volumes: [{id: a, device: /dev/a, options: [noatime, bind]}]`:                  "volumes[0].options[1]",
		"watch: 1ms": "watch: must be a duration",
	} {
		if _, err := load(text + "\n"); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", text, err)
		}
	}
}

func FuzzVolume(f *testing.F) {
	f.Add("data", "/dev/vdb", "data", "ext4", "/data", "noatime")
	f.Add("a", "LABEL=x y", "", "none", "", "ro")
	f.Fuzz(func(t *testing.T, id, device, name, fs, mount, option string) {
		v := Volume{ID: id, Device: device, Name: name, Filesystem: fs, Mount: mount, Options: []string{option}}
		if v.Validate() != nil {
			return
		}
		again := v
		if err := again.Validate(); err != nil || again.Name != v.Name || again.Mount != v.Mount {
			t.Errorf("%+v does not stay valid: %v", v, err)
		}
		if p := v.DevicePath(); !filepath.IsAbs(p) || filepath.Clean(p) != p {
			t.Errorf("device is %q", p)
		}
		if strings.ContainsAny(option, ", \n") {
			t.Errorf("option %q", option)
		}
	})
}
