package csiproxy

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestEachHandleHasAnIDOfItsOwn(t *testing.T) {
	c := &Config{Prefix: "csi-"}
	long := strings.Repeat("a", 125)
	for handle, want := range map[string]string{
		"vol-0abc": "csi-vol-0abc", "x-1": c.Prefix + hashed, "projects/p/zones/z/disks/d": c.Prefix + hashed, "a..b": c.Prefix + hashed, long: c.Prefix + hashed,
		"ü": c.Prefix + hashed, "a\nb": c.Prefix + hashed,
	} {
		id := c.volumeID(handle)
		if strings.HasSuffix(want, hashed) != (len(id) == len(want)+64 && strings.HasPrefix(id, want)) || !strings.HasPrefix(id, want) {
			t.Errorf("%q is %s", handle, id)
		}
		if name := mappingName(id); len(name) > maxMapping || name == "" && len(id) > maxMapping {
			t.Errorf("%q is mapped as %q", handle, name)
		}
	}
}

func FuzzVolumeID(f *testing.F) {
	c := &Config{Prefix: "csi-"}
	f.Add("vol-1", "vol-2")
	f.Add("a/b", c.volumeID("a/b")[len(c.Prefix):])
	f.Fuzz(func(t *testing.T, a, b string) {
		if (a == b) != (c.volumeID(a) == c.volumeID(b)) {
			t.Errorf("%q and %q are %s and %s", a, b, c.volumeID(a), c.volumeID(b))
		}
		for _, one := range splitOptions(a) {
			if one == "" {
				t.Errorf("%q has an empty option", a)
			}
		}
	})
}

func TestAConfigurationIsStrict(t *testing.T) {
	dir := t.TempDir()
	good := "driver: /d.sock\nlisten: /l.sock\nprivate: /var/lib/kubelet/p\nprefix: csi-\n"
	for text, want := range map[string]string{
		good: "", good + "plain_classes: [scratch]\nshared_classes: [ocfs2]\nregistration: /r.sock\nfilesystem: xfs\n": "",
		"driver: /d.sock\n": "listen", good + "unknown: 1\n": "unknown", "driver: /d\nlisten: /d\nprivate: /p\nprefix: a-\n": "own socket", "driver: d\nlisten: /l\nprivate: /p\n": "driver",
		"driver: /d\nlisten: /l\nprivate: /p\nprefix: a/b\n": "prefix", "driver: /d\nlisten: /l\nprivate: /p\n": "prefix", good + "filesystem: ntfs\n": "filesystem", good + "integrity: crc32\n": "integrity",
		good + "integrity: hmac-sha256\ndiscards: true\n": "discards", good + "integrity: hmac-sha256\nshared_classes: [a]\n": "shared_classes", good + "plain_classes: ['']\n": "plain_classes", good + "plain_classes: ['*']\n": "plain_classes",
		good + "plain_classes: [a]\nshared_classes: [a]\n": "plain class too", "driver: /d\nlisten: /l\nprivate: /a/../b\n": "private",
	} {
		path := filepath.Join(dir, "csi.yaml")
		must(t, 0, os.WriteFile(path, []byte(text), 0o600))
		_, err := Load(path)
		if (err == nil) != (want == "") || want != "" && !strings.Contains(fmt.Sprint(err), want) {
			t.Errorf("%q: %v", text, err)
		}
	}
}

func TestAFolderOfKubeletsThatIsALink(t *testing.T) {
	dir := t.TempDir()
	must(t, 0, os.Mkdir(filepath.Join(dir, "real"), 0o700))
	must(t, 0, os.Symlink("real", filepath.Join(dir, "link")))
	path := filepath.Join(dir, "csi.yaml")
	must(t, 0, os.WriteFile(path, []byte(fmt.Sprintf("driver: /d\nlisten: /l\nprivate: /p\nprefix: a-\nkubelet: %s/link\n", dir)), 0o600))
	c, err := Load(path)
	must(t, 0, err)
	for name, want := range map[string]bool{"link/x": true, "real/x": true, "other/x": false, "real": false} {
		if c.within(filepath.Join(dir, name)) != want {
			t.Errorf("%s: %v", name, !want)
		}
	}
}
