package policy

import (
	"bytes"
)

// The versions of the file. Version 2 is version 1 with an end: a beginning of it, as
// a write that was cut off leaves it, is no policy. It may allow what the whole one
// does not, for instance because a grant lost its condition.
const (
	openEnded = 1
	withEnd   = 2
)

// end is YAML's own mark for the end of a document.
const end = "..."

// hasEnd reports whether the last line of a file is its end.
func hasEnd(data []byte) bool {
	data = bytes.TrimRight(data, "\r\n\t ")
	rest, ok := bytes.CutSuffix(data, []byte(end))
	return ok && (len(rest) == 0 || rest[len(rest)-1] == '\n')
}
