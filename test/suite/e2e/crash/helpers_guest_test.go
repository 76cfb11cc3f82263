//go:build umlguest

package crash

import (
	"errors"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/keyagent/keyagent/test/suite/e2e/inject"
)

func TestMain(m *testing.M) {
	inject.Main()
	os.Exit(m.Run())
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// command runs a tool of the system and returns what it printed.
func command(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

func errClose(err error, c io.Closer) error { return errors.Join(err, c.Close()) }

func readAll(r io.ReadCloser) string {
	defer r.Close()
	text, _ := io.ReadAll(r)
	return string(text)
}
