package node

import (
	"strings"
	"testing"
)

func TestTheOverflowUserIsPointedAt(t *testing.T) {
	root, nobody := uint32(0), uint32(65534)
	c := &Config{Callers: []Caller{{UID: &root}, {UID: &nobody}}}
	if got := c.Advice(); len(got) != 1 || !strings.Contains(got[0], "callers[1]") || !strings.Contains(got[0], "user namespace") {
		t.Errorf("%q", got)
	}
}
