// Package crypttab reads the lines of crypttab(5) that keyagent is to open, and writes
// the units that stand in for systemd's own.
//
// A line is keyagent's if one of its options is keyagent, with or without a value, or
// begins with "keyagent-": also one that is wrong otherwise. Nobody else may open it,
// least of all a program that asks the console for a passphrase.
package crypttab

import "strings"

// Path is where systemd looks for the file.
const Path = "/etc/crypttab"

// MaxFile bounds the file in bytes.
const MaxFile = 256 << 10

// Line is one line of keyagent's. Nothing of it is checked.
type Line struct {
	Number  int    // in the file, from 1
	Name    string // of the mapping
	Device  string
	Key     string
	Options []Option
	More    bool // words follow the options
}

// Option is one of a line's options.
type Option struct {
	Name, Value string
	HasValue    bool // maybe an empty one
}

// Parse returns keyagent's lines. Lines of others are theirs, whatever is in them.
func Parse(data []byte) []Line {
	var out []Line
	number := 0
	// systemd ends a line at these as well, and knows the white space of C.
	for text := range strings.SplitSeq(strings.NewReplacer("\r\n", "\n", "\r", "\n", "\x00", "\n").Replace(string(data)), "\n") {
		number++
		words := strings.FieldsFunc(text, func(r rune) bool { return strings.ContainsRune(" \t\v\f", r) })
		if len(words) < 4 || strings.HasPrefix(words[0], "#") {
			continue
		}
		l := Line{Number: number, Name: words[0], Device: words[1], Key: words[2], More: len(words) > 4}
		mine := false
		for o := range strings.SplitSeq(words[3], ",") {
			name, value, has := strings.Cut(o, "=")
			l.Options = append(l.Options, Option{name, value, has})
			mine = mine || name == "keyagent" || strings.HasPrefix(name, "keyagent-")
		}
		if mine {
			out = append(out, l)
		}
	}
	return out
}

// ID is what the key service knows the volume by: the value of the option keyagent, or
// the name of the mapping.
func (l *Line) ID() string {
	for _, o := range l.Options {
		if o.Name == "keyagent" && o.Value != "" {
			return o.Value
		}
	}
	return l.Name
}

// Has reports whether the line has one of these options.
func (l *Line) Has(names ...string) bool {
	for _, o := range l.Options {
		for _, n := range names {
			if o.Name == n {
				return true
			}
		}
	}
	return false
}
