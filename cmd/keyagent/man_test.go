package main

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
)

var update = flag.Bool("update", false, "write the man pages again")

// TestManPagesAreThoseOfTheCommands holds docs/man and --help together.
func TestManPagesAreThoseOfTheCommands(t *testing.T) {
	const dir = "../../docs/man"
	wanted := map[string]bool{}
	var page func(c *cobra.Command)
	page = func(c *cobra.Command) {
		for _, sub := range c.Commands() {
			if sub.IsAvailableCommand() {
				page(sub)
			}
		}
		c.DisableAutoGenTag = true
		date := time.Date(2026, 11, 22, 0, 0, 0, 0, time.UTC)
		var b bytes.Buffer
		if err := doc.GenMan(c, &doc.GenManHeader{Section: "1", Source: "keyagent", Manual: "keyagent", Date: &date}, &b); err != nil {
			t.Fatal(err)
		}
		name := filepath.Base(replaceSpaces(c.CommandPath())) + ".1"
		wanted[name] = true
		path := filepath.Join(dir, name)
		if *update {
			if err := os.WriteFile(path, b.Bytes(), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if have, err := os.ReadFile(path); err != nil || !bytes.Equal(have, b.Bytes()) {
			t.Errorf("%s is not what --help says (run: go test ./cmd/keyagent -run ManPages -update): %v", name, err)
		}
	}
	page(newRoot())
	have, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range have {
		if !wanted[f.Name()] {
			t.Errorf("%s is of no command", f.Name())
		}
	}
}

func replaceSpaces(s string) string {
	return string(bytes.ReplaceAll([]byte(s), []byte(" "), []byte("-")))
}
