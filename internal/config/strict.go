// Package config reads keyagent's configuration files: YAML, one document,
// strictly decoded. An unknown field, a duplicate field or a second document is
// an error that names the line.
package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/keyagent/keyagent/internal/pattern"
)

// ErrInvalid is wrapped by every error about a file's content.
var ErrInvalid = errors.New("invalid configuration")

// maxFile bounds a configuration file in bytes.
const maxFile = 4 << 20

// Document is a decoded file that still knows where its fields stood.
type Document struct {
	name string
	root *yaml.Node
}

// ReadFile decodes the file at path into v. See [Decode].
func ReadFile(path string, v any) (*Document, []byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, nil, err
	}
	d, err := Decode(path, data, v)
	return d, data, err
}

// Decode decodes data into v, a pointer to a struct with yaml tags. name stands
// in errors.
func Decode(name string, data []byte, v any) (*Document, error) {
	if len(data) > maxFile {
		return nil, fmt.Errorf("%w: %s: larger than %d bytes", ErrInvalid, name, maxFile)
	}
	dec := yaml.NewDecoder(bytes.NewReader(data))
	dec.KnownFields(true)
	switch err := dec.Decode(v); {
	case errors.Is(err, io.EOF):
		return nil, fmt.Errorf("%w: %s: the file is empty", ErrInvalid, name)
	case err != nil:
		return nil, fmt.Errorf("%w: %s: %s", ErrInvalid, name, readable(err))
	}
	var extra yaml.Node
	if err := dec.Decode(&extra); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("%w: %s: more than one document", ErrInvalid, name)
	}
	d := &Document{name: name, root: &yaml.Node{}}
	if err := yaml.Unmarshal(data, d.root); err != nil {
		return nil, fmt.Errorf("%w: %s: %s", ErrInvalid, name, readable(err))
	}
	return d, nil
}

// Hint says what to do about an error of ReadFile.
func Hint(err error) string {
	if errors.Is(err, fs.ErrNotExist) {
		return "name the file with --config"
	}
	return "docs/configuration.md lists every field"
}

var unknownField = pattern.New(`field (\S+) not found in type \S+`)

// readable turns the decoder's words into a person's.
func readable(err error) string {
	s := strings.TrimPrefix(err.Error(), "yaml: ")
	s = strings.TrimPrefix(s, "unmarshal errors:\n  ")
	s = strings.ReplaceAll(s, "\n  ", "; ")
	return unknownField.ReplaceAllString(s, `unknown field "$1"`)
}

// Decoding words an error of the decoder as [Decode] does, for a part of the file that was
// decoded later.
func (d *Document) Decoding(err error) error {
	return fmt.Errorf("%w: %s: %s", ErrInvalid, d.name, readable(err))
}

// Errorf makes an error about the field at path, which consists of field names
// and list indices: "profiles", 0, "name".
func (d *Document) Errorf(path []any, format string, args ...any) error {
	return fmt.Errorf("%w: %s: line %d: %s: %w", ErrInvalid, d.name, d.line(path), pathString(path), fmt.Errorf(format, args...))
}

// line returns where the deepest existing part of path stands.
func (d *Document) line(path []any) int {
	if len(d.root.Content) == 0 {
		return 1
	}
	n := d.root.Content[0]
	line := n.Line
	for _, step := range path {
		next := child(n, step, &line)
		if next == nil {
			break
		}
		n = next
	}
	return line
}

func child(n *yaml.Node, step any, line *int) *yaml.Node {
	switch step := step.(type) {
	case string:
		if n.Kind != yaml.MappingNode {
			return nil
		}
		for i := 0; i+1 < len(n.Content); i += 2 {
			if n.Content[i].Value == step {
				*line = n.Content[i].Line
				return n.Content[i+1]
			}
		}
	case int:
		if n.Kind == yaml.SequenceNode && step < len(n.Content) {
			*line = n.Content[step].Line
			return n.Content[step]
		}
	}
	return nil
}

func pathString(path []any) string {
	var b strings.Builder
	for _, step := range path {
		switch step := step.(type) {
		case string:
			if b.Len() > 0 {
				b.WriteByte('.')
			}
			b.WriteString(step)
		case int:
			b.WriteString("[" + strconv.Itoa(step) + "]")
		}
	}
	return b.String()
}
