package luks

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"testing"
)

// authenticatedHeader is a header with integrity, of idData and dataKey.
func authenticatedHeader(t testing.TB) *Header {
	t.Helper()
	h, err := NewHeader(context.Background(), idData, Layout{HMACSHA256, 100 << 20}, dataKey(t))
	must(t, err)
	return h
}

func TestAHeaderWithIntegrityHasItsOwnForm(t *testing.T) {
	for _, f := range []*form{authenticated, aead} {
		t.Run(string(f.integrity), func(t *testing.T) { headerWithIntegrityHasItsOwnForm(t, f) })
	}
}

func headerWithIntegrityHasItsOwnForm(t *testing.T, f *form) {
	dek, size := dataKey(t), f.size()
	h, err := NewHeader(t.Context(), idData, Layout{f.integrity, 100 << 20}, dek)
	must(t, err)
	if h.Integrity() != f.integrity || len(h.Bytes()) != size {
		t.Fatalf("integrity %q, %d bytes", h.Integrity(), len(h.Bytes()))
	}
	must(t, h.opens(dek))
	vk, err := h.volumeKey(dek)
	must(t, err)
	if vk.Len() != f.keySize {
		t.Errorf("its volume key has %d bytes", vk.Len())
	}
	must(t, vk.Close())
	// It is rebuilt from either copy, and kept and restored as others are.
	for i, name := range copyNames {
		raw := h.Bytes()
		raw[i*metadataSize+offSalt] ^= 1
		got, err := verify(raw, idData, h.MACs(), dek)
		must(t, err)
		if damaged, _ := got.Damaged(); damaged != name || !bytes.Equal(got.Bytes(), h.Bytes()) {
			t.Errorf("%s copy damaged: %q is said to be", name, damaged)
		}
	}
	kept, err := KeptHeader(h.Bytes(), idData.UUID, h.MACs())
	must(t, err)
	if kept.Integrity() != f.integrity {
		t.Error("kept, it has no integrity")
	}
	var backup bytes.Buffer
	must(t, h.WriteBackup(&backup))
	if backup.Len() != BackupSize {
		t.Errorf("a backup has %d bytes", backup.Len())
	}
	path := image(t, 20<<20)
	_, err = RestoreHeader(t.Context(), HeaderRequest{path, idData, h.MACs()}, dek, backup.Bytes())
	must(t, err)
	read, err := ReadHeader(t.Context(), HeaderRequest{path, idData, h.MACs()}, dek)
	must(t, err)
	if read.Integrity() != f.integrity {
		t.Error("restored, it has no integrity")
	}
	must(t, Matches(t.Context(), path, read))
	patch(t, path, []byte{h.raw[size-1] ^ 1}, int64(size-1))
	_, err = ReadHeader(t.Context(), HeaderRequest{path, idData, h.MACs()}, dek)
	wantError(t, err, ErrHeaderMAC)
	wantError(t, Matches(t.Context(), path, read), ErrHeaderChanged)
	if _, err := guard(h.raw[:size-1]); !errors.Is(err, ErrShortHeader) {
		t.Errorf("cut short: %v", err)
	}
	_, err = NewHeader(t.Context(), idData, Layout{Integrity: "crc32"}, dek)
	wantError(t, err, ErrInvalid)
	_, err = NewHeader(t.Context(), idData, Layout{f.integrity, 18 << 20}, dek)
	wantError(t, err, ErrDeviceSize)
}

// wantForgeryRefused changes words of a header, and demands that the guard refuses it for them.
func wantForgeryRefused(t *testing.T, h *Header, name, of, to string, rule Rule) {
	t.Helper()
	f := forgery{t, bytes.Clone(h.raw)}
	if !strings.Contains(f.json(), of) {
		t.Fatalf("%s: the header does not have %q: %s", name, of, f.json())
	}
	f.replace(of, to)
	_, err := guard(f.raw)
	var refusal *HeaderError
	if !errors.As(err, &refusal) || refusal.Rule != rule {
		t.Errorf("%s: %v, want %s", name, err, rule)
	}
}

// The two forms do not mix: neither passes with a word of the other.
func TestTheFormsOfAHeaderDoNotMix(t *testing.T) {
	h := authenticatedHeader(t)
	const integrity = `"integrity":{"journal_encryption":"none","journal_integrity":"none","type":"hmac(sha256)"}`
	length := fmt.Sprintf(`"size":"%d"`, Room(100<<20, HMACSHA256))
	for name, c := range map[string]struct {
		of, to string
		rule   Rule
	}{
		"no length":            {length, `"size":"dynamic"`, RuleSize},
		"half a sector":        {length, `"size":"1234567"`, RuleSize},
		"a sign":               {length, `"size":"+4096"`, RuleSize},
		"no end":               {length, `"size":"4611686018427387904"`, RuleSize},
		"no integrity":         {"," + integrity, "", RuleMissingField},
		"another MAC":          {"hmac(sha256)", "hmac(sha512)", RuleIntegrity},
		"no MAC":               {"hmac(sha256)", "none", RuleIntegrity},
		"a poly1305":           {"hmac(sha256)", "poly1305", RuleIntegrity},
		"encrypted journal":    {`"journal_encryption":"none"`, `"journal_encryption":"cbc(aes)"`, RuleIntegrity},
		"one more word":        {`"type":"hmac(sha256)"}`, `"type":"hmac(sha256)","key_size":32}`, RuleUnknownField},
		"a plain key":          {`"key_size":96`, `"key_size":64`, RuleKeyslotArea},
		"a plain area":         {`"size":"385024"`, `"size":"258048"`, RuleKeyslotArea},
		"a smaller sector":     {`"sector_size":4096`, `"sector_size":512`, RuleSectorSize},
		"the null cipher":      {`"encryption":"aes-xts-plain64","integrity"`, `"encryption":"cipher_null-ecb","integrity"`, RuleNullCipher},
		"a second requirement": {`"config":{`, `"config":{"requirements":{"mandatory":["x"]},`, RuleRequirement},
	} {
		wantForgeryRefused(t, h, name, c.of, c.to, c.rule)
	}
	// What libcryptsetup reads of it is what the guard read.
	if formIn(&node{}) != plain {
		t.Error("nothing at all is not the plain form")
	}
}

// A header with AEGIS-128 is none with HMAC-SHA256, and none with another AEAD.
func TestAHeaderWithAnAEADIsOfNoOtherForm(t *testing.T) {
	h, err := NewHeader(t.Context(), idData, Layout{AEGIS128, 100 << 20}, dataKey(t))
	must(t, err)
	const cipher = `"encryption":"aegis128-random"`
	for name, c := range map[string]struct {
		of, to string
		rule   Rule
	}{
		"a MAC":             {`"type":"aead"`, `"type":"hmac(sha256)"`, RuleIntegrity},
		"no tags":           {`"type":"aead"`, `"type":"none"`, RuleIntegrity},
		"a short nonce":     {cipher, `"encryption":"aes-gcm-random"`, RuleCipher},
		"nonces in order":   {cipher, `"encryption":"aegis128-plain64"`, RuleCipher},
		"no AEAD":           {cipher, `"encryption":"aes-xts-plain64"`, RuleCipher},
		"the null cipher":   {cipher, `"encryption":"cipher_null-ecb"`, RuleNullCipher},
		"a longer key":      {`"key_size":16`, `"key_size":32`, RuleKeySize},
		"a key for a MAC":   {`"key_size":16`, `"key_size":96`, RuleKeyslotArea},
		"a plain key":       {`"key_size":16`, `"key_size":64`, RuleKeyslotArea},
		"a plain area":      {`"size":"65536"`, `"size":"258048"`, RuleKeyslotArea},
		"a cipher for keys": {`"encryption":"aes-xts-plain64"`, cipher, RuleCipher},
	} {
		wantForgeryRefused(t, h, name, c.of, c.to, c.rule)
	}
}

// superblock is one that the kernel would make.
func superblock(sectors uint64) []byte {
	sb := make([]byte, sectorSize)
	copy(sb, tagsMagic)
	sb[offTagsVersion] = 4
	binary.LittleEndian.PutUint16(sb[offTagsTagSize:], tagSize)
	binary.LittleEndian.PutUint64(sb[offTagsProvided:], sectors)
	binary.LittleEndian.PutUint32(sb[offTagsFlags:], tagsFixedPadding)
	sb[offTagsBlock] = tagsLog2Block
	return sb
}

// The superblock is the host's to write: only what the kernel makes for us is taken.
func TestASuperblockOfAnotherKindIsRefused(t *testing.T) {
	const sectors, room = 1 << 11, 1 << 20
	if n, err := parseSuperblock(superblock(sectors), room); err != nil || n != room {
		t.Fatalf("one of ours: %d, %v", n, err)
	}
	for name, change := range map[string]func([]byte){
		"another magic":          func(sb []byte) { sb[0]++ },
		"no version":             func(sb []byte) { sb[offTagsVersion] = 0 },
		"a version to come":      func(sb []byte) { sb[offTagsVersion] = tagsMaxVersion + 1 },
		"shorter tags":           func(sb []byte) { sb[offTagsTagSize] = 4 },
		"tags made anew":         func(sb []byte) { sb[offTagsFlags] |= 2 },
		"a MAC of the journal":   func(sb []byte) { sb[offTagsFlags] |= 1 },
		"the older padding":      func(sb []byte) { sb[offTagsFlags] = 0 },
		"smaller blocks":         func(sb []byte) { sb[offTagsBlock] = 0 },
		"no room":                func(sb []byte) { clear(sb[offTagsProvided:offTagsFlags]) },
		"half a block":           func(sb []byte) { sb[offTagsProvided] = 4 },
		"more than the disk has": func(sb []byte) { sb[offTagsProvided+7] = 1 },
	} {
		sb := superblock(sectors)
		change(sb)
		_, err := parseSuperblock(sb, room)
		wantRule(t, err, RuleIntegrity)
		if err == nil {
			t.Errorf("%s is taken", name)
		}
	}
}

func FuzzSuperblock(f *testing.F) {
	f.Add(superblock(8), int64(1<<20))
	f.Add(superblock(1<<62), int64(1<<40))
	f.Add(make([]byte, sectorSize), int64(-1))
	f.Fuzz(func(t *testing.T, sb []byte, room int64) {
		if len(sb) != sectorSize {
			return
		}
		n, err := parseSuperblock(sb, room)
		if err != nil {
			wantError(t, err, ErrHeaderRefused)
			return
		}
		if n <= 0 || n > room || n%dataSectorSize != 0 {
			t.Errorf("%d bytes of %d are accepted", n, room)
		}
	})
}

// What the kernel says of the lower mapping is held against the one form that it may
// have.
func TestTheTableOfTagsIsChecked(t *testing.T) {
	dev := DevNum{7, 3}
	good := tagsParams(dev, true)
	upper := func(tags string) liveMapping {
		lower, err := parseLive(liveAnswer(tagsUUID(idData.UUID, "data"), 8192, "integrity", tags))
		must(t, err)
		lower.dev = DevNum{254, 9}
		params := cryptParams(authenticated, authenticated.volumeKeyRef(idData.UUID), lower.dev, 0, OpenOptions{Workqueues: true})
		m, err := parseLive(liveAnswer(dmUUID(idData.UUID, "data"), 8192, "crypt", params))
		must(t, err)
		if !m.verifiesTags() {
			t.Fatal("it does not look like one that has tags")
		}
		m.tags = &lower
		return m
	}
	m, err := checkTable(upper(good), "data", idData.UUID)
	must(t, err)
	if m.DataDevice != dev || m.Integrity != HMACSHA256 || m.NoJournal {
		t.Errorf("it is %+v", m)
	}
	for name, edit := range map[string][2]string{
		"another offset":   {" 32768 ", " 0 "},
		"shorter tags":     {" 32 J", " 4 J"},
		"recovery":         {" J ", " R "},
		"a bitmap":         {" J ", " B "},
		"its own hash":     {"2 block_size", "3 internal_hash:crc32c block_size"},
		"recalculation":    {"2 block_size", "3 recalculate block_size"},
		"other tags' disk": {"2 block_size", "3 meta_device:7:9 block_size"},
		"a wrong count":    {"2 block_size", "1 block_size"},
		"small blocks":     {"block_size:4096", "block_size:512"},
		"no device":        {"7:3", "sda"},
	} {
		if !strings.Contains(good, edit[0]) {
			t.Fatalf("%s: %q is not in %q", name, edit[0], good)
		}
		if _, err := checkTable(upper(strings.Replace(good, edit[0], edit[1], 1)), "data", idData.UUID); !errors.Is(err, ErrTableMismatch) {
			t.Errorf("%s: %v", name, err)
		}
	}
	other := upper(good)
	other.tags.dev.Minor++
	if _, err := checkTable(other, "data", idData.UUID); !errors.Is(err, ErrTableMismatch) {
		t.Errorf("tags of another mapping: %v", err)
	}
	other = upper(good)
	other.tags.uuid = tagsUUID(idLogs.UUID, "data")
	if _, err := checkTable(other, "data", idData.UUID); !errors.Is(err, ErrTableMismatch) {
		t.Errorf("tags of another volume: %v", err)
	}
	// A table that verifies nothing is not one of the form, whatever it is called.
	bare := upper(good)
	bare.table[0].params = strings.Replace(bare.table[0].params, "2 sector_size:4096 integrity:32:aead", "1 sector_size:4096", 1)
	if _, err := checkTable(bare, "data", idData.UUID); !errors.Is(err, ErrTableMismatch) {
		t.Errorf("without tags: %v", err)
	}
}
