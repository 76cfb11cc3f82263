package node

import (
	"maps"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// section is the part of docs/configuration.md under one heading.
func section(t *testing.T, heading string) string {
	t.Helper()
	text, err := os.ReadFile("../../docs/configuration.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, ok := strings.Cut(string(text), "\n"+heading+"\n")
	if !ok {
		t.Fatalf("there is no %q", heading)
	}
	rest, _, _ = strings.Cut(rest, "\n## ")
	rest, _, _ = strings.Cut(rest, "\n### ")
	return rest
}

var quoted = regexp.MustCompile("`([^`]+)`")

// first are the quoted words in the first cell of each row after a heading row.
func first(text, headings string) []string {
	var out []string
	_, rest, _ := strings.Cut(text, headings+"\n")
	for line := range strings.Lines(rest) {
		cells := strings.Split(line, "|")
		if len(cells) < 3 {
			break
		}
		for _, m := range quoted.FindAllStringSubmatch(cells[1], -1) {
			out = append(out, m[1])
		}
	}
	slices.Sort(out)
	return out
}

// tags are the names of a struct's fields in the file.
func tags(of any) []string {
	var out []string
	for f := range reflect.TypeOf(of).Fields() {
		if tag := f.Tag.Get("yaml"); tag != "" {
			name, _, _ := strings.Cut(tag, ",")
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return out
}

func TestTheConfigurationsPageHasEachFieldAndEachRefusedOption(t *testing.T) {
	volumes := section(t, "### Volumes")
	for what, pair := range map[string][2][]string{
		"volumes":         {tags(Volume{}), first(volumes, "| field of `volumes[]` | meaning |")},
		"dynamic":         {tags(Dynamic{}), first(section(t, "### Dynamic volumes"), "| field of `dynamic[]` | meaning |")},
		"refused options": {slices.Sorted(maps.Keys(allRefused())), first(volumes, "| option | why |")},
	} {
		if !slices.Equal(pair[0], pair[1]) {
			t.Errorf("%s: the code has %v, the page %v", what, pair[0], pair[1])
		}
	}
	text := section(t, "## keyagent agent, and the verbs of a node")
	for _, op := range Operations {
		if !strings.Contains(text, "`"+op+"`") {
			t.Errorf("the operation %s is not in it", op)
		}
	}
	for _, field := range tags(Config{}) {
		if !strings.Contains(text, "| `"+field) {
			t.Errorf("the field %s is not in it", field)
		}
	}
}

func allRefused() map[string]string {
	all := maps.Clone(refusedOptions)
	maps.Copy(all, refusedValues)
	return all
}
