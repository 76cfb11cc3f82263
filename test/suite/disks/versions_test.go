//go:build !umlguest && versions

package disks

import (
	"os"
	"testing"
	"time"
)

// This program beside one of an earlier release, which make test-full builds. It needs the
// project's history, and stands behind a build tag for that.
func TestTwoVersionsOfTheProgram(t *testing.T) {
	if os.Getenv("KEYAGENT_TEST_OLD_PROGRAM") == "" {
		t.Fatal("KEYAGENT_TEST_OLD_PROGRAM names no program (hint: make test-full builds one)")
	}
	boot(t, "^TestVersions", 10*time.Minute)
}
