package luks

import (
	"bytes"
	"crypto/pbkdf2"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"regexp"
	"strings"
	"testing"
)

// forgery is a header in the hands of a hostile host that knows the format as
// well as we do: after each edit the checksums can be made to hold again.
type forgery struct {
	t   testing.TB
	raw []byte
}

func (f forgery) json() string {
	text, _, _ := bytes.Cut(f.raw[binarySize:metadataSize], []byte{0})
	return string(text)
}

// setJSON puts text into the JSON area of both copies.
func (f forgery) setJSON(text string) {
	f.t.Helper()
	if len(text) > jsonSize {
		f.t.Fatalf("JSON of %d bytes does not fit", len(text))
	}
	for _, at := range []int{binarySize, metadataSize + binarySize} {
		area := f.raw[at : at+jsonSize]
		clear(area)
		copy(area, text)
	}
	f.reseal()
}

// replace swaps one piece of the JSON, which must be there once.
func (f forgery) replace(old, new string) {
	f.t.Helper()
	if n := strings.Count(f.json(), old); n != 1 {
		f.t.Fatalf("%s stands %d times in %s", old, n, f.json())
	}
	f.setJSON(strings.Replace(f.json(), old, new, 1))
}

// reseal makes both checksums hold.
func (f forgery) reseal() {
	for _, at := range []int{0, metadataSize} {
		sum := checksum(f.raw[at : at+metadataSize])
		copy(f.raw[at+offChecksum:], sum[:])
	}
}

// Parts of the JSON that are replaced.
const (
	segmentCipher = `"encryption":"aes-xts-plain64","sector_size"`
	areaCipher    = `"encryption":"aes-xts-plain64","key_size"`
	slotKDF       = `"kdf":{"type":"pbkdf2","hash":"sha256","iterations":1000,`
	configEnd     = `"keyslots_size":"16744448"}`
	noTokens      = `"tokens":{}`
)

// hostile is one way to tamper with a header, and the rule that refuses it.
// attack is the number of the case in docs/ATTACKS.md.
type hostile struct {
	attack int
	name   string
	edit   func(forgery)
	rule   Rule
}

func swap(old, new string) func(forgery) {
	return func(f forgery) { f.t.Helper(); f.replace(old, new) }
}

func binaryField(offset int, p ...byte) func(forgery) {
	return func(f forgery) {
		copy(f.raw[offset:], p)
		copy(f.raw[metadataSize+offset:], p)
		f.reseal()
	}
}

var hostileHeaders = []hostile{
	{1, "the segment's cipher is null", swap(segmentCipher, `"encryption":"cipher_null-ecb","sector_size"`), RuleNullCipher},
	{1, "the segment's cipher is null by another spelling", swap(segmentCipher, `"encryption":"capi:ecb(cipher_null)-plain","sector_size"`), RuleNullCipher},
	{1, "the segment's cipher is a weak one", swap(segmentCipher, `"encryption":"aes-ecb","sector_size"`), RuleCipher},
	{2, "the keyslot's cipher is null and holds the attacker's volume key", nullKeyslot, RuleNullCipher},
	{7, "a reencryption is required", swap(configEnd, `"keyslots_size":"16744448","requirements":{"mandatory":["online-reencrypt-v2"]}}`), RuleRequirement},
	{7, "an unknown requirement is named", swap(configEnd, `"keyslots_size":"16744448","requirements":{"mandatory":["x"]}}`), RuleRequirement},
	{7, "persistent flags are set", swap(configEnd, `"keyslots_size":"16744448","flags":["allow-discards"]}`), RuleFlags},
	{7, "there is a second segment", swap(`"segments":{`, `"segments":{"1":{"type":"linear","offset":"0","size":"4096"},`), RuleSegmentCount},
	{7, "the segment is a backup", swap(`"sector_size":4096`, `"sector_size":4096,"flags":["backup-final"]`), RuleSegmentFlags},
	{7, "the segment is linear", swap(`"segments":{"0":{"type":"crypt"`, `"segments":{"0":{"type":"linear"`), RuleSegmentType},
	{7, "the segment asks for integrity", swap(`"sector_size":4096`, `"sector_size":4096,"integrity":{"type":"none"}`), RuleIntegrity},
	{7, "there is a token", swap(noTokens, `"tokens":{"0":{"type":"luks2-keyring","keyslots":["0"],"key_description":"x"}}`), RuleToken},
	{7, "there is an unknown token", swap(noTokens, `"tokens":{"7":{"type":"x","keyslots":[]}}`), RuleToken},
	{7, "there is a second keyslot", swap(`"keyslots":{"0":{`, `"keyslots":{"1":{"type":"luks2"},"0":{`), RuleKeyslotCount},
	{7, "the keyslot is a reencryption's", swap(`"keyslots":{"0":{"type":"luks2"`, `"keyslots":{"0":{"type":"reencrypt"`), RuleKeyslotType},
	{7, "the keyslot has a priority", swap(`"key_size":64,"af"`, `"key_size":64,"priority":2,"af"`), RuleUnknownField},
	{7, "there is a second digest", swap(`"digests":{`, `"digests":{"1":{"type":"pbkdf2"},`), RuleDigest},
	{7, "the digest covers no segment", swap(`"segments":["0"]`, `"segments":[]`), RuleDigest},
	{8, "the segment begins elsewhere", swap(`"offset":"16777216"`, `"offset":"16781312"`), RuleOffset},
	{8, "the segment has a fixed size", swap(`"size":"dynamic"`, `"size":"1048576"`), RuleSize},
	{8, "the IV is tweaked", swap(`"iv_tweak":"0"`, `"iv_tweak":"8"`), RuleIVTweak},
	{8, "the sector size is 512", swap(`"sector_size":4096`, `"sector_size":512`), RuleSectorSize},
	{8, "the keyslot's area is moved", swap(`"offset":"32768"`, `"offset":"290816"`), RuleKeyslotArea},
	{8, "the keyslot's area overlaps the data", swap(`"size":"258048"`, `"size":"16777216"`), RuleKeyslotArea},
	{8, "the keyslots' areas are said to be larger", swap(`"keyslots_size":"16744448"`, `"keyslots_size":"134217728"`), RuleConfig},
	{8, "the volume key is half as long", swap(`"type":"luks2","key_size":64`, `"type":"luks2","key_size":32`), RuleKeySize},
	{9, "the keyslot demands 2147483647 rounds of PBKDF2", swap(slotKDF, `"kdf":{"type":"pbkdf2","hash":"sha256","iterations":2147483647,`), RuleKDFCost},
	{9, "the keyslot demands argon2 with 4 GiB", swap(slotKDF, `"kdf":{"type":"argon2id","time":2147483647,"memory":4194304,"cpus":4,`), RuleKDF},
	{9, "the digest demands 4294967295 rounds", swap(`"hash":"sha256","iterations":1000,"salt":`+digestSalt, `"hash":"sha256","iterations":4294967295,"salt":`+digestSalt), RuleKDFCost},
	{10, "the two copies' JSON differs", func(f forgery) {
		at := metadataSize + binarySize + strings.Index(f.json(), `"iv_tweak":"0"`)
		copy(f.raw[at:], `"iv_tweak":"1"`)
		f.reseal()
	}, RuleCopies},
	{10, "the two copies' sequence numbers differ", func(f forgery) { f.raw[metadataSize+offSeqID+7]++; f.reseal() }, RuleCopies},
	{10, "the two copies' UUIDs differ", func(f forgery) { copy(f.raw[metadataSize+offUUID:], idLogs.UUID); f.reseal() }, RuleCopies},
	{10, "the secondary copy is gone", func(f forgery) { clear(f.raw[metadataSize:areasOffset]) }, RuleMagic},
	{10, "the primary copy is gone", func(f forgery) { clear(f.raw[:metadataSize]) }, RuleMagic},
	{10, "a checksum does not hold", func(f forgery) { f.raw[binarySize+100] ^= 1 }, RuleChecksum},
	{10, "the checksum is of another kind", binaryField(offAlgorithm, []byte("sha512")...), RuleBinaryHeader},
	{10, "the header is said to have 4 MiB of JSON", binaryField(offSize, 0, 0, 0, 0, 0, 0x40, 0, 0), RuleBinaryHeader},
	{10, "the header is of another version", binaryField(offVersion, 0, 3), RuleMagic},
	{10, "the header has a label", binaryField(offLabel, 'x'), RuleBinaryHeader},
	{10, "the header's padding is used", binaryField(offPadding2, 'x'), RuleBinaryHeader},
	{10, "the UUID is in capitals", binaryField(offUUID, []byte(strings.ToUpper(idData.UUID))...), RuleBinaryHeader},
	{10, "a key stands twice", swap(noTokens, noTokens+","+noTokens), RuleDuplicateKey},
	{10, "a key stands twice, deep inside", swap(`"iv_tweak":"0"`, `"iv_tweak":"8","iv_tweak":"0"`), RuleDuplicateKey},
	{10, "a key is in capitals", swap(`"iv_tweak":"0"`, `"iv_tweak":"0","IV_TWEAK":"8"`), RuleUnknownField},
	{10, "a key is missing", swap(`"iv_tweak":"0",`, ``), RuleMissingField},
	{10, "a key is unknown", swap(noTokens, `"tokens":{},"x":1`), RuleUnknownField},
	{10, "a number is a text", swap(`"sector_size":4096`, `"sector_size":"4096"`), RuleSectorSize},
	{10, "a number is spelled otherwise", swap(`"sector_size":4096`, `"sector_size":4.096e3`), RuleSectorSize},
	{10, "an object is a list", swap(noTokens, `"tokens":[]`), RuleFieldType},
	{10, "a key is escaped", swap(`"iv_tweak"`, `"iv\u005ftweak"`), RuleJSONSyntax},
	{10, "there is a blank", swap(noTokens, `"tokens": {}`), RuleJSONSyntax},
	{10, "bytes trail the JSON", func(f forgery) { f.setJSON(f.json() + "\x00{}") }, RuleTrailing},
	{10, "a second document trails the JSON", func(f forgery) { f.setJSON(f.json() + "{}") }, RuleJSONSyntax},
	{10, "the JSON nests too deep", swap(noTokens, `"tokens":{"0":`+strings.Repeat("[", 2000)+strings.Repeat("]", 2000)+`}`), RuleJSONDepth},
	{10, "the JSON never ends", func(f forgery) { f.setJSON(`{"tokens":"` + strings.Repeat("x", jsonSize-11)) }, RuleJSONSize},
	{10, "the JSON is empty", func(f forgery) { f.setJSON("") }, RuleJSONSyntax},
	{10, "the JSON is a list", func(f forgery) { f.setJSON("[]") }, RuleFieldType},
	{10, "a salt is short", func(f forgery) {
		f.setJSON(regexp.MustCompile(`"salt":"[^"]{44}"`).ReplaceAllString(f.json(), `"salt":"AAAA"`))
	}, RuleKDF},
}

// digestSalt stands for the salt of the digest, whose text is random: forgery
// edits see it replaced before they run.
const digestSalt = `"ZGlnZXN0c2FsdGRpZ2VzdHNhbHRkaWdlc3RzYWx0ZGk="`

// forge returns what h makes of a good header.
func (h hostile) forge(t testing.TB, good []byte) []byte {
	t.Helper()
	f := forgery{t, append([]byte(nil), good...)}
	if h.attack == 9 {
		salts := regexp.MustCompile(`"digests":.*"salt":("[^"]*")`).FindStringSubmatch(f.json())
		f.replace(salts[1], digestSalt)
	}
	h.edit(f)
	return f.raw
}

// nullKeyslot turns the keyslot into one that every passphrase opens and that
// yields a volume key which the attacker knows: its area is taken for plaintext,
// and the digest is made for the key that this gives.
func nullKeyslot(f forgery) {
	f.t.Helper()
	volumeKey := afMerge(f.raw[areasOffset : areasOffset+volumeKeySize*4000])
	salt := make([]byte, 32)
	sum, err := pbkdf2.Key(sha256.New, string(volumeKey), salt, kdfIterations, 32)
	must(f.t, err)
	b64 := base64.StdEncoding.EncodeToString
	text := regexp.MustCompile(`("digests":.*"salt":")[^"]*(","digest":")[^"]*`).
		ReplaceAllString(f.json(), "${1}"+b64(salt)+"${2}"+b64(sum))
	f.setJSON(text)
	f.replace(areaCipher, `"encryption":"cipher_null-ecb","key_size"`)
}

// afMerge is LUKS's anti-forensic merge with SHA-256, of a 64-byte key.
func afMerge(area []byte) []byte {
	d := make([]byte, volumeKeySize)
	for stripe := range len(area) / volumeKeySize {
		for i := range d {
			d[i] ^= area[stripe*volumeKeySize+i]
		}
		if (stripe+1)*volumeKeySize == len(area) {
			break
		}
		for block := range volumeKeySize / sha256.Size {
			part := d[block*sha256.Size : (block+1)*sha256.Size]
			sum := sha256.Sum256(append(binary.BigEndian.AppendUint32(nil, uint32(block)), part...))
			copy(part, sum[:])
		}
	}
	return d
}

func (h hostile) String() string { return fmt.Sprintf("case %d: %s", h.attack, h.name) }
