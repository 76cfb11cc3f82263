package luks

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strconv"
)

// A header of a form with tags begins as a plain one whose keyslot has a key for
// no segment, with a digest of its own. What libcryptsetup writes where it can map the
// device differs in the JSON alone, and in the length, which is fixed here: how much room
// there is would be the word of dm-integrity's superblock, which is the host's.

// bindKeyslot makes the primary copy of a header that has an unbound keyslot one of
// a form with tags, with a length. The secondary is made from it.
func bindKeyslot(raw []byte, f *form, bytesOfData int64) error {
	area := raw[binarySize:metadataSize]
	text, _, _ := bytes.Cut(area, []byte{0})
	var root struct {
		Keyslots json.RawMessage `json:"keyslots"`
		Tokens   json.RawMessage `json:"tokens"`
		Segments struct {
			Only map[string]any `json:"0"`
		} `json:"segments"`
		Digests map[string]map[string]any `json:"digests"`
		Config  json.RawMessage           `json:"config"`
	}
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.UseNumber()
	if err := dec.Decode(&root); err != nil {
		return fmt.Errorf("%w: its JSON area: %w", ErrLibrary, err)
	}
	const ofSegment, ofKeyslot = "0", "1"
	digest := root.Digests[ofKeyslot]
	if digest == nil || root.Segments.Only == nil {
		return fmt.Errorf("%w: an unbound keyslot has no digest", ErrLibrary)
	}
	digest["segments"] = []string{"0"}
	root.Digests = map[string]map[string]any{ofSegment: digest}
	root.Segments.Only["size"] = strconv.FormatInt(bytesOfData, 10)
	root.Segments.Only["encryption"] = f.encryption
	root.Segments.Only["integrity"] = map[string]string{
		"type": f.tags, "journal_encryption": "none", "journal_integrity": "none",
	}
	made, err := json.Marshal(root)
	if err != nil {
		return fmt.Errorf("%w: its JSON area: %w", ErrLibrary, err)
	}
	if len(made) >= len(area) {
		return fmt.Errorf("%w: its JSON area is full", ErrLibrary)
	}
	clear(area[copy(area, made):])
	sum := checksum(raw[:metadataSize])
	copy(raw[offChecksum:], sum[:])
	return nil
}
