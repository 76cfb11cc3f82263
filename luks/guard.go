package luks

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"strconv"
	"strings"
)

// guarded is a header that satisfies the guard. Nothing is known yet of who
// wrote it: that is [Header].
type guarded struct {
	raw  []byte // the guarded bytes, as many as the form has
	uuid string
	form *form
	// bytes is the length of a volume with integrity; 0: as long as the device.
	bytes int64
}

// guard checks the first bytes of a device against the whitelist, and takes as many
// of them as the header's form has. Whatever the whitelist does not name is refused.
func guard(raw []byte) (guarded, error) {
	if len(raw) < areasOffset {
		return guarded{}, ErrShortHeader
	}
	g, err := guardMetadata(raw[:areasOffset])
	if err != nil {
		return guarded{}, err
	}
	return g.within(raw)
}

// within takes the guarded bytes from raw.
func (g guarded) within(raw []byte) (guarded, error) {
	if len(raw) < g.form.size() {
		return guarded{}, ErrShortHeader
	}
	g.raw = raw[:g.form.size():g.form.size()]
	return g, nil
}

// guardMetadata checks the two copies of the metadata.
func guardMetadata(metadata []byte) (guarded, error) {
	first, err := parseBinary(metadata[:metadataSize], 0)
	if err != nil {
		return guarded{}, err
	}
	second, err := parseBinary(metadata[metadataSize:areasOffset], 1)
	if err != nil {
		return guarded{}, err
	}
	switch {
	case first.uuid != second.uuid:
		return guarded{}, refuse(RuleCopies, "secondary UUID", second.uuid)
	case first.seqID != second.seqID:
		return guarded{}, refuse(RuleCopies, "secondary sequence number", "")
	case !bytes.Equal(first.json, second.json):
		return guarded{}, refuse(RuleCopies, "secondary JSON area", "")
	}
	return first.guardJSON()
}

// guardCopy checks one copy of the metadata by itself.
func guardCopy(metadata []byte, i int) (guarded, error) {
	h, err := parseBinary(metadata, i)
	if err != nil {
		return guarded{}, err
	}
	return h.guardJSON()
}

func (h binaryHeader) guardJSON() (guarded, error) {
	root, err := parseArea(h.json)
	if err != nil {
		return guarded{}, err
	}
	g := guarded{uuid: h.uuid, form: formIn(root)}
	if err := g.form.whitelist.check("", root); err != nil {
		return guarded{}, err
	}
	if g.form.tagged() {
		g.bytes, err = parseLength(root.at("segments", "0", "size").text)
	}
	return g, err
}

// newWhitelist is the one form of metadata that this package writes and opens for a
// form. That of a plain volume is version 1, with HMAC-SHA256 version 2, with AEGIS-128
// version 3.
func newWhitelist(f *form) object {
	integrity, size := rule(forbidden{RuleIntegrity}), rule(text{"dynamic", RuleSize})
	if f.integrity != "" {
		size = length{}
		integrity = object{
			{"type", text{f.tags, RuleIntegrity}},
			{"journal_encryption", text{"none", RuleIntegrity}},
			{"journal_integrity", text{"none", RuleIntegrity}},
		}
	}
	return object{
		{"keyslots", object{
			{"0", object{
				{"type", text{"luks2", RuleKeyslotType}},
				{"key_size", number{fmt.Sprint(f.keySize), RuleKeySize}},
				{"af", object{
					{"type", text{"luks1", RuleKeyslotType}},
					{"stripes", number{"4000", RuleKeyslotType}},
					{"hash", text{"sha256", RuleKeyslotType}},
				}},
				{"area", object{
					{"type", text{"raw", RuleKeyslotArea}},
					{"encryption", cipher{cipherSpec}},
					{"key_size", number{"64", RuleKeySize}},
					{"offset", text{"32768", RuleKeyslotArea}},
					{"size", text{fmt.Sprint(f.areaSize), RuleKeyslotArea}},
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
				{"encryption", cipher{f.encryption}},
				{"offset", text{"16777216", RuleOffset}},
				{"size", size},
				{"iv_tweak", text{"0", RuleIVTweak}},
				{"sector_size", number{"4096", RuleSectorSize}},
				{"flags", forbidden{RuleSegmentFlags}},
				{"integrity", integrity},
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

// length demands a number of bytes, of whole sectors, in its one spelling.
type length struct{}

func (length) check(where string, n *node) error {
	if _, err := parseLength(n.text); n.kind != kindText || err != nil {
		return refuse(RuleSize, where, n.text)
	}
	return nil
}

// maxLength keeps sums of lengths from going over.
const maxLength = 1 << 60

func parseLength(text string) (int64, error) {
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil || n < dataSectorSize || n > maxLength || n%dataSectorSize != 0 || strconv.FormatInt(n, 10) != text {
		return 0, refuse(RuleSize, "segments.0.size", text)
	}
	return n, nil
}

// cipher demands the one cipher, and gives the null cipher its own refusal: with
// it the right key would open the volume and plaintext would go to the disk.
type cipher struct{ want string }

func (c cipher) check(where string, n *node) error {
	switch {
	case n.kind == kindText && n.text == c.want:
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
