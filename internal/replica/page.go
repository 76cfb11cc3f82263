package replica

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"

	"github.com/keyagent/keyagent/attestation/policy"
	"github.com/keyagent/keyagent/internal/volume"
)

// The bounds of what replicas tell each other.
const (
	PageSize    = 1000    // volumes of a page
	MaxRevision = 1 << 48 // of a volume
	MaxEpoch    = 1 << 40
)

// ErrPage means that a page cannot be read.
var ErrPage = errors.New("page of volumes cannot be read")

// EncodePage writes what was seen of volumes: a line for each, its ID, a blank, its revision.
// What no reader takes is left out.
// Text, because a message of many parts costs its reader a hundred times its size.
func EncodePage(all []volume.Sighting) []byte {
	var out []byte
	for _, v := range all {
		if v.Revision == 0 || v.Revision > MaxRevision || !policy.ValidVolume(v.Volume) {
			continue // its reader would refuse the page, and all that follow
		}
		out = append(append(out, v.Volume...), ' ')
		out = append(strconv.AppendUint(out, v.Revision, 10), '\n')
	}
	return out
}

// ParsePage is the reverse, strictly: [ErrPage].
func ParsePage(data []byte) ([]volume.Sighting, error) {
	lines := bytes.Count(data, []byte("\n"))
	if lines > PageSize {
		return nil, fmt.Errorf("%w: %d volumes, at most %d", ErrPage, lines, PageSize)
	}
	all := make([]volume.Sighting, 0, lines)
	for len(data) > 0 {
		line, rest, ended := bytes.Cut(data, []byte("\n"))
		id, number, _ := bytes.Cut(line, []byte(" "))
		revision, err := strconv.ParseUint(string(number), 10, 64)
		switch {
		case !ended || !policy.ValidVolume(string(id)):
			return nil, fmt.Errorf("%w: line %d names no volume", ErrPage, len(all)+1)
		case err != nil || strconv.FormatUint(revision, 10) != string(number) || revision == 0 || revision > MaxRevision:
			return nil, fmt.Errorf("%w: line %d has no revision", ErrPage, len(all)+1)
		}
		all, data = append(all, volume.Sighting{Volume: string(id), Revision: revision}), rest
	}
	return all, nil
}
