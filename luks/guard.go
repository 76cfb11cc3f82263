package luks

import (
	"bytes"
	"encoding/base64"
	"strings"
)

// guarded is a header that satisfies the guard. Nothing is known yet of who
// wrote it: that is [Header].
type guarded struct {
	raw  []byte // the guarded bytes, guardedSize of them
	uuid string
}

// guard checks the first guardedSize bytes of a device against version 1 of the
// whitelist. Whatever the whitelist does not name is refused.
func guard(raw []byte) (guarded, error) {
	if len(raw) != guardedSize {
		return guarded{}, ErrShortHeader
	}
	uuid, err := guardMetadata(raw[:areasOffset])
	if err != nil {
		return guarded{}, err
	}
	return guarded{raw: raw, uuid: uuid}, nil
}

// guardMetadata checks the two copies of the metadata and returns the UUID.
func guardMetadata(metadata []byte) (string, error) {
	first, err := parseBinary(metadata[:metadataSize], 0)
	if err != nil {
		return "", err
	}
	second, err := parseBinary(metadata[metadataSize:areasOffset], 1)
	if err != nil {
		return "", err
	}
	switch {
	case first.uuid != second.uuid:
		return "", refuse(RuleCopies, "secondary UUID", second.uuid)
	case first.seqID != second.seqID:
		return "", refuse(RuleCopies, "secondary sequence number", "")
	case !bytes.Equal(first.json, second.json):
		return "", refuse(RuleCopies, "secondary JSON area", "")
	}
	return first.uuid, first.guardJSON()
}

// guardCopy checks one copy of the metadata by itself and returns the UUID.
func guardCopy(metadata []byte, i int) (string, error) {
	h, err := parseBinary(metadata, i)
	if err != nil {
		return "", err
	}
	return h.uuid, h.guardJSON()
}

func (h binaryHeader) guardJSON() error {
	root, err := parseArea(h.json)
	if err != nil {
		return err
	}
	return whitelist.check("", root)
}

// whitelist is version 1: the one form of metadata that this package writes and
// opens.
var whitelist = object{
	{"keyslots", object{
		{"0", object{
			{"type", text{"luks2", RuleKeyslotType}},
			{"key_size", number{"64", RuleKeySize}},
			{"af", object{
				{"type", text{"luks1", RuleKeyslotType}},
				{"stripes", number{"4000", RuleKeyslotType}},
				{"hash", text{"sha256", RuleKeyslotType}},
			}},
			{"area", object{
				{"type", text{"raw", RuleKeyslotArea}},
				{"encryption", cipher{}},
				{"key_size", number{"64", RuleKeySize}},
				{"offset", text{"32768", RuleKeyslotArea}},
				{"size", text{"258048", RuleKeyslotArea}},
			}},
			{"kdf", object{
				{"type", text{"pbkdf2", RuleKDF}},
				{"hash", text{"sha256", RuleKDF}},
				{"iterations", number{"1000", RuleKDFCost}},
				{"salt", binaryText{32, RuleKDF}},
			}},
		}},
		{"*", forbidden{RuleKeyslotCount}},
	}},
	{"segments", object{
		{"0", object{
			{"type", text{"crypt", RuleSegmentType}},
			{"encryption", cipher{}},
			{"offset", text{"16777216", RuleOffset}},
			{"size", text{"dynamic", RuleSize}},
			{"iv_tweak", text{"0", RuleIVTweak}},
			{"sector_size", number{"4096", RuleSectorSize}},
			{"flags", forbidden{RuleSegmentFlags}},
			{"integrity", forbidden{RuleIntegrity}},
		}},
		{"*", forbidden{RuleSegmentCount}},
	}},
	{"digests", object{
		{"0", object{
			{"type", text{"pbkdf2", RuleDigest}},
			{"keyslots", only{"0", RuleDigest}},
			{"segments", only{"0", RuleDigest}},
			{"hash", text{"sha256", RuleDigest}},
			{"iterations", number{"1000", RuleKDFCost}},
			{"salt", binaryText{32, RuleDigest}},
			{"digest", binaryText{32, RuleDigest}},
		}},
		{"*", forbidden{RuleDigest}},
	}},
	{"tokens", object{
		{"*", forbidden{RuleToken}},
	}},
	{"config", object{
		{"json_size", text{"12288", RuleConfig}},
		{"keyslots_size", text{"16744448", RuleConfig}},
		{"flags", forbidden{RuleFlags}},
		{"requirements", forbidden{RuleRequirement}},
	}},
}

// rule is what the whitelist demands of one value.
type rule interface {
	check(where string, n *node) error
}

// object demands the named members and no others. A member that is forbidden
// has a rule of its own for the refusal; "*" stands for every other member.
type object []struct {
	name string
	rule rule
}

func (o object) check(where string, n *node) error {
	if n.kind != kindObject {
		return refuse(RuleFieldType, where, n.text)
	}
	at := func(name string) string { return strings.TrimPrefix(where+"."+name, ".") }
	known := make(map[string]rule, len(o))
	for _, member := range o {
		known[member.name] = member.rule
		if _, no := member.rule.(forbidden); no {
			continue
		}
		value, there := n.child[member.name]
		if !there {
			return refuse(RuleMissingField, at(member.name), "")
		}
		if err := member.rule.check(at(member.name), value); err != nil {
			return err
		}
	}
	for _, name := range n.keys {
		r, ok := known[name]
		if !ok || name == "*" {
			r, ok = known["*"]
		}
		if !ok {
			r = forbidden{RuleUnknownField}
		}
		if f, no := r.(forbidden); no {
			return f.check(strings.TrimPrefix(join(where, name), "."), n.child[name])
		}
	}
	return nil
}

// forbidden refuses a member wherever it occurs.
type forbidden struct{ rule Rule }

func (f forbidden) check(where string, n *node) error { return refuse(f.rule, where, n.text) }

// text demands one string.
type text struct {
	want string
	rule Rule
}

func (t text) check(where string, n *node) error {
	if n.kind != kindText || n.text != t.want {
		return refuse(t.rule, where, n.text)
	}
	return nil
}

// number demands one number in one spelling: 1e3 is not 1000 here.
type number struct {
	want string
	rule Rule
}

func (u number) check(where string, n *node) error {
	if n.kind != kindNumber || n.text != u.want {
		return refuse(u.rule, where, n.text)
	}
	return nil
}

// cipher demands the one cipher, and gives the null cipher its own refusal: with
// it the right key would open the volume and plaintext would go to the disk.
type cipher struct{}

func (cipher) check(where string, n *node) error {
	switch {
	case n.kind == kindText && n.text == cipherSpec:
		return nil
	case strings.Contains(strings.ToLower(n.text), "null"):
		return refuse(RuleNullCipher, where, n.text)
	default:
		return refuse(RuleCipher, where, n.text)
	}
}

// only demands a list of exactly one string.
type only struct {
	want string
	rule Rule
}

func (o only) check(where string, n *node) error {
	if n.kind != kindList || len(n.items) != 1 || n.items[0].kind != kindText || n.items[0].text != o.want {
		return refuse(o.rule, where, "")
	}
	return nil
}

// binaryText demands base64 of exactly size bytes, in the one way to write it.
type binaryText struct {
	size int
	rule Rule
}

func (b binaryText) check(where string, n *node) error {
	p, err := base64.StdEncoding.Strict().DecodeString(n.text)
	if n.kind != kindText || err != nil || len(p) != b.size {
		return refuse(b.rule, where, n.text)
	}
	return nil
}
