package policy

import (
	"strings"

	"github.com/keyagent/keyagent/internal/pattern"
)

// A volume ID is what grants, records and key derivation speak of. The grammar
// leaves no room for paths, control characters or look-alikes.
var volumePattern = pattern.New(`^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$`)

var globPattern = pattern.New(`^[A-Za-z0-9*][A-Za-z0-9._*-]{0,127}$`)

// ValidVolume reports whether id is a volume ID: 1 to 128 ASCII letters, digits,
// dots, dashes and underscores, the first one a letter or digit, and no "..".
func ValidVolume(id string) bool {
	return volumePattern.MatchString(id) && !strings.Contains(id, "..")
}

func validPattern(p string) bool {
	return globPattern.MatchString(p) && !strings.Contains(p, "..") && !strings.Contains(p, "**")
}

// Match reports whether pattern covers id. A star stands for any run of
// characters; everything else stands for itself.
func Match(pattern, id string) bool {
	parts := strings.Split(pattern, "*")
	if len(parts) == 1 {
		return pattern == id
	}
	rest, ok := strings.CutPrefix(id, parts[0])
	if !ok {
		return false
	}
	for _, part := range parts[1 : len(parts)-1] {
		_, after, found := strings.Cut(rest, part)
		if !found {
			return false
		}
		rest = after
	}
	return strings.HasSuffix(rest, parts[len(parts)-1])
}
