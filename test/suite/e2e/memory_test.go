//go:build linux && amd64

package e2e

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"math/bits"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/keyagent/keyagent/internal/lab"
	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/kms/cluster"
)

// memoryScript holds a known pattern in memory while the host looks. Its encoding
// comes with the script, it itself is only in memory.
const memoryScript = `
systemctl is-active keyagent-agent.service
echo "E2E findmnt $(findmnt -n -o SOURCE /data)"
echo "written before the dump" >/data/hello
keyagent status --output json
base64 -d /bed/planted.b64 >/run/planted
modprobe loop
truncate -s 32M /run/scratch.img
losetup /dev/loop0 /run/scratch.img
keyagent unlock --standalone --config /bed/scratch.yaml
echo "E2E scratch $(findmnt -n -o SOURCE /scratch)"
await scratch
keyagent close --standalone --config /bed/scratch.yaml scratch
await open
until keyagent status --output json | grep -q '"suspended"'; do sleep 0.2; done
await suspended
until keyagent status --output json | grep -q '"mounted"'; do sleep 0.2; done
echo "E2E resumed: $(cat /data/hello)"
systemctl stop keyagent-agent.service
echo "E2E stopped: $(systemctl is-active keyagent-agent.service) $(cat /data/hello)"
await stopped
journalctl -b --no-pager -o verbose | gzip >/run/journal.gz
section journal /run/journal.gz
`

// scratchConfig is of a volume whose key the kernel makes.
const scratchConfig = `servers:
  - {address: "192.0.2.1:8443", name: nobody.example, ca: /etc/keyagent/ca.pem}
state_dir: /run/scratch
volumes:
  - {id: scratch, kind: scratch, device: /dev/loop0, format: true, filesystem: ext4, no_mmp: true, mount: /scratch}
`

// Show 7: after the unlock the DEK is nowhere: not in the memory of the whole
// guest, where the agent still runs and the volume is mounted, nor after the
// agent has ended; and not in anything that the guest or the service has written.
// The first boot is the one with the most to forget: it formats, too.
func TestTheDEKIsGone(t *testing.T) {
	n := newMachine(t, false)
	n.expect(t, commandLine("e2e"))
	policy, err := os.ReadFile(n.path("service/policy.yaml"))
	must(t, err)
	policy = bytes.Replace(policy, []byte("operations: [open, format]"), []byte("operations: [open, format]\n    lease: 30s"), 1)
	must(t, os.WriteFile(n.path("service/policy.yaml"), policy, 0o644))
	n.start(t)
	revoke := func(more ...string) {
		t.Helper()
		_, err := n.service.Run(t.Context(), append([]string{"revoke", "--config", "serve.yaml", "--volume", "data"}, more...)...)
		must(t, err)
	}
	planted := make([]byte, 32)
	rand.Read(planted)
	root := n.root(t, memoryScript, lab.File{Path: "/bed/planted.b64", Data: []byte(base64.StdEncoding.EncodeToString(planted))},
		lab.File{Path: "/bed/scratch.yaml", Data: []byte(scratchConfig), Mode: 0o600})
	g := n.boot(t, n.path("expected.esp"), root)
	dumps := map[string]string{}
	for _, moment := range []string{"scratch", "open", "suspended", "stopped"} {
		if _, err := g.WaitMark(t.Context(), moment); err != nil {
			t.Fatal(err)
		}
		dumps[moment] = n.path("memory." + moment)
		must(t, g.DumpMemory(t.Context(), dumps[moment]))
		switch moment {
		case "open":
			revoke()
		case "suspended":
			revoke("--lift")
		}
		must(t, g.Continue())
	}
	wantStatus(t, g, 0)
	wantLines(t, g, "E2E findmnt /dev/mapper/data", "E2E resumed: written before the dump", "E2E scratch /dev/mapper/scratch", "E2E stopped: inactive written before the dump")
	status := statusOf(t, g)

	dek := n.dek(t, "data")
	volumeKey := n.volumeKey(t, dek)
	t.Run("scratch", func(t *testing.T) { throwawayIsGone(t, dumps, volumeKey) })
	delete(dumps, "scratch")
	missing := append([]byte(nil), planted...)
	missing[0] ^= 1
	for moment, dump := range dumps {
		t.Run(moment, func(t *testing.T) {
			// The search finds what is there: a copy that was planted, and the volume
			// key, which dm-crypt needs as long as the volume is mapped. The kernel has
			// it as the beginnings of two key schedules, one per half. While the volume is
			// suspended, because it was revoked, nobody has it.
			for name, want := range map[string][]byte{
				"the planted pattern": planted, "the volume key's first half": volumeKey[:32], "its second half": volumeKey[32:],
			} {
				count := search(t, dump, want)
				t.Logf("%s is %d times in memory", name, count)
				gone := moment == "suspended" && name != "the planted pattern"
				if (count == 0) != gone {
					t.Errorf("the search finds %s %d times:%s", name, count, around(t, dump, want))
				}
			}
			if count := search(t, dump, missing); count != 0 {
				t.Errorf("a pattern that was never there is %d times in memory", count)
			}
			for name, form := range memoryForms(dek) {
				if count := search(t, dump, form); count != 0 {
					t.Errorf("the DEK (%s) is %d times in memory:%s", name, count, around(t, dump, form))
				}
			}
			for name, label := range map[string]string{"header MAC": "keyagent luks2 header mac v1", "format marker": "keyagent luks2 format marker v1"} {
				for half, form := range halves(derived(t, dek, label, status)) {
					if count := search(t, dump, form); count != 0 {
						t.Errorf("the key of the %s (%s) is %d times in memory:%s", name, half, count, around(t, dump, form))
					}
				}
			}
		})
	}
	n.nowhereWritten(t, g, dek)
}

// throwawayIsGone finds the keys of the scratch volume by what AES makes of them, since
// nobody knows them: they are in memory while it is mapped, and nowhere afterwards.
func throwawayIsGone(t *testing.T, dumps map[string]string, volumeKey []byte) {
	var keys [][]byte
	known := 0
	for key := range aesKeys(t, dumps["scratch"]) {
		if bytes.Contains(volumeKey, []byte(key)) {
			known++ // of the volume data, which stays
			continue
		}
		keys = append(keys, []byte(key))
	}
	t.Logf("%d keys of AES-256 are in memory besides those of the volume", len(keys))
	if known != 2 || len(keys) < 2 {
		t.Fatalf("%d halves of the volume's key and %d others were found", known, len(keys))
	}
	// Keys that others have, such as TLS connections, may stay; two of them are gone
	// wherever they were, as schedules and as they are.
	for _, moment := range []string{"open", "stopped"} {
		gone := 0
		still := aesKeys(t, dumps[moment])
		for _, key := range keys {
			if still[string(key)] || search(t, dumps[moment], key[:16])+search(t, dumps[moment], key[16:]) > 0 {
				continue
			}
			gone++
		}
		if gone < 2 {
			t.Errorf("%s: of %d keys %d are gone, not the two of the scratch volume", moment, len(keys), gone)
		}
		if gone < len(keys) {
			t.Logf("%s: %d keys of others are still there", moment, len(keys)-gone)
		}
	}
}

// aesKeys are the keys of AES-256 in a dump: 32 bytes with the rest of their schedule
// behind them, as every implementation keeps it (FIPS 197, section 5.2).
func aesKeys(t *testing.T, path string) map[string]bool {
	t.Helper()
	data, err := os.ReadFile(path)
	must(t, err)
	box := sBox()
	found := map[string]bool{}
	for at := 0; at+aesSchedule <= len(data); at += 4 {
		// Most places are told by one byte.
		if data[at+32] == data[at]^box[data[at+29]]^1 && isSchedule(data[at:at+aesSchedule], &box) {
			found[string(data[at:at+32])] = true
		}
	}
	return found
}

// aesSchedule is the size of a schedule of AES-256 in bytes: 15 round keys.
const aesSchedule = 15 * 16

func isSchedule(w []byte, box *[256]byte) bool {
	rcon := byte(1)
	for i := 32; i < aesSchedule; i += 4 {
		x := [4]byte(w[i-4 : i])
		switch i % 32 {
		case 0:
			x = [4]byte{box[x[1]] ^ rcon, box[x[2]], box[x[3]], box[x[0]]}
			rcon <<= 1
		case 16:
			x = [4]byte{box[x[0]], box[x[1]], box[x[2]], box[x[3]]}
		}
		for j := range x {
			if w[i+j] != w[i-32+j]^x[j] {
				return false
			}
		}
	}
	return true
}

// sBox is the substitution of AES (FIPS 197, section 5.1.1): the inverse in GF(2^8), and
// an affine map.
func sBox() (box [256]byte) {
	p, q := byte(1), byte(1)
	for {
		p ^= p<<1 ^ byte(int8(p)>>7)&0x1B // times 3
		q ^= q << 1
		q ^= q << 2
		q ^= q << 4
		q ^= byte(int8(q)>>7) & 0x09 // divided by 3
		box[p] = q ^ bits.RotateLeft8(q, 1) ^ bits.RotateLeft8(q, 2) ^ bits.RotateLeft8(q, 3) ^ bits.RotateLeft8(q, 4) ^ 0x63
		if p == 1 {
			break
		}
	}
	box[0] = 0x63
	return box
}

// A schedule that is known, from FIPS 197, appendix A.3.
func TestSchedulesOfAESAreRecognised(t *testing.T) {
	key, err := hex.DecodeString("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
	must(t, err)
	box := sBox()
	w := append([]byte(nil), key...)
	for rcon := byte(1); len(w) < aesSchedule; {
		x := [4]byte(w[len(w)-4:])
		switch len(w) % 32 {
		case 0:
			x = [4]byte{box[x[1]] ^ rcon, box[x[2]], box[x[3]], box[x[0]]}
			rcon <<= 1
		case 16:
			x = [4]byte{box[x[0]], box[x[1]], box[x[2]], box[x[3]]}
		}
		for j := range x {
			w = append(w, w[len(w)-32]^x[j])
		}
	}
	if got := hex.EncodeToString(w[len(w)-16:]); got != "fe4890d1e6188d0b046df344706c631e" {
		t.Errorf("the last round key is %s", got)
	}
	path := filepath.Join(t.TempDir(), "dump")
	must(t, os.WriteFile(path, append(make([]byte, 444), w...), 0o600))
	if found := aesKeys(t, path); len(found) != 1 || !found[string(key)] {
		t.Errorf("%d keys were found", len(found))
	}
	w[100] ^= 1
	must(t, os.WriteFile(path, w, 0o600))
	if found := aesKeys(t, path); len(found) != 0 {
		t.Errorf("%d keys were found in what is none", len(found))
	}
}

// dek is the key of a volume, which anyone who has the master secret and the volume's record
// can derive.
func (n *node) dek(t *testing.T, volume string) []byte {
	t.Helper()
	master, err := cluster.LoadMasterSecret(n.service.MasterSecret())
	must(t, err)
	defer master.Close()
	k, err := cluster.New(cluster.Options{MasterSecret: master})
	must(t, err)
	defer k.Close()
	object, err := os.ReadFile(n.path("service/records/volumes/" + volume + ".obj"))
	must(t, err)
	var record struct {
		Keys []struct {
			Version uint32
			Length  int
			Salt    string
		}
	}
	must(t, json.Unmarshal(object[bytes.IndexByte(object, '{'):], &record))
	in := record.Keys[0]
	key, _, err := k.Generate(context.Background(), kms.Binding{VolumeID: volume, Purpose: kms.VolumeDEK, Version: in.Version, Length: in.Length, Salt: in.Salt})
	must(t, err)
	defer key.Close()
	var dek []byte
	must(t, key.Use(func(p []byte) error { dek = append(dek, p...); return nil }))
	return dek
}

// volumeKey opens the keyslot on the disk, which proves that the DEK is the right
// one, and returns what is in it.
func (n *node) volumeKey(t *testing.T, dek []byte) []byte {
	t.Helper()
	out := n.path("volume.key")
	cmd := exec.Command("cryptsetup", "luksDump", "-q", "--dump-volume-key", "--volume-key-file", out, "--key-file", "-", n.disk)
	cmd.Env = append(os.Environ(), "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
	cmd.Stdin = bytes.NewReader(dek)
	if text, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("the DEK does not open the disk: %v: %s (hint: make deps)", err, text)
	}
	key, err := os.ReadFile(out)
	must(t, err)
	if len(key) != 64 {
		t.Fatalf("the volume key has %d bytes", len(key))
	}
	return key
}

// halves are what a search looks for: a buffer that was freed often has its first
// bytes overwritten by the allocator, or its last ones by the next user.
func halves(key []byte) map[string][]byte {
	return map[string][]byte{"first half": key[:len(key)/2], "second half": key[len(key)/2:]}
}

// memoryForms are the forms in which the DEK could lie in memory: as it is, as
// HMAC keeps a key, and as text.
func memoryForms(dek []byte) map[string][]byte {
	forms := textForms(dek)
	for name, mask := range map[string]byte{"as it is": 0, "HMAC's inner pad": 0x36, "HMAC's outer pad": 0x5c} {
		masked := make([]byte, len(dek))
		for i := range dek {
			masked[i] = dek[i] ^ mask
		}
		for half, form := range halves(masked) {
			forms[name+", "+half] = form
		}
	}
	return forms
}

// textForms are the forms in which it could stand in a log or a file.
func textForms(dek []byte) map[string][]byte {
	text := hex.EncodeToString(dek)
	return map[string][]byte{
		"binary": dek, "hex": []byte(text[:32]), "HEX": []byte(strings.ToUpper(text[:32])),
		// Of each three bytes' four letters; the last ones depend on padding.
		"base64": []byte(base64.StdEncoding.EncodeToString(dek[:24])), "base64url": []byte(base64.URLEncoding.EncodeToString(dek[:24])),
	}
}

// derived is a key that package luks derives from the DEK, by its specification.
func derived(t *testing.T, dek []byte, label string, v volumeStatus) []byte {
	t.Helper()
	info := binary.BigEndian.AppendUint32([]byte(label), uint32(len(v.ID)))
	info = append(info, v.ID...)
	info = binary.BigEndian.AppendUint64(info, v.Generation)
	info = binary.BigEndian.AppendUint32(info, uint32(len(v.UUID)))
	info = append(info, v.UUID...)
	key, err := hkdf.Key(sha256.New, dek, nil, string(info), 32)
	must(t, err)
	return key
}

// nowhereWritten searches everything that was written during the boot.
func (n *node) nowhereWritten(t *testing.T, g *lab.Guest, dek []byte) {
	t.Helper()
	packed, err := g.Section("journal")
	must(t, err)
	reader, err := gzip.NewReader(bytes.NewReader(packed))
	must(t, err)
	journal, err := io.ReadAll(reader)
	must(t, err)
	if !bytes.Contains(journal, []byte("keyagent-agent.service")) {
		t.Error("the journal does not mention the unit: it is not the one that was meant")
	}
	var console strings.Builder
	for _, l := range g.Lines() {
		console.WriteString(l.Text + "\n")
	}
	must(t, os.WriteFile(n.path("journal.txt"), journal, 0o600))
	must(t, os.WriteFile(n.path("console.txt"), []byte(console.String()), 0o600))
	must(t, os.WriteFile(n.path("service.txt"), []byte(strings.Join(n.service.Log(), "\n")), 0o600))
	files := []string{n.disk, n.path("journal.txt"), n.path("console.txt"), n.path("service.txt"), n.service.AuditLog()}
	files = append(files, filesBelow(t, n.tpm.Dir)...)
	files = append(files, filesBelow(t, filepath.Join(n.service.Dir, "records"))...)
	for _, path := range files {
		for name, form := range textForms(dek) {
			if count := search(t, path, form); count != 0 {
				t.Errorf("the DEK (%s) is %d times in %s", name, count, path)
			}
		}
	}
	t.Logf("searched %d files: %s", len(files), strings.Join(files, " "))
}

func filesBelow(t *testing.T, dir string) (files []string) {
	t.Helper()
	must(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			files = append(files, path)
		}
		return err
	}))
	if len(files) == 0 {
		t.Fatalf("%s is empty", dir)
	}
	return files
}

// around shows what stands before and behind each occurrence, which often tells
// whose buffer it is.
func around(t *testing.T, path string, needle []byte) string {
	t.Helper()
	data, err := os.ReadFile(path)
	must(t, err)
	const context = 48
	var out strings.Builder
	for at := 0; ; at++ {
		i := bytes.Index(data[at:], needle)
		if i < 0 {
			return out.String()
		}
		at += i
		end := at + len(needle)
		fmt.Fprintf(&out, "\n  at %#x: %x [%d bytes] %x", at, data[max(at-context, 0):at], len(needle), data[end:min(end+context, len(data))])
	}
}

func search(t *testing.T, path string, needle []byte) int {
	t.Helper()
	count, err := lab.SearchFile(path, needle)
	must(t, err)
	return count
}
