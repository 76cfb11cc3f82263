package eventlog

import (
	"strings"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"
)

const (
	// maxDetail bounds what of an event's data is shown to people.
	maxDetail = 256
	// maxText bounds text that is compared word by word, such as a kernel command
	// line: the kernel takes 2048 bytes on most machines.
	maxText = 4096
)

// text reads bytes as what they are: UTF-16 if every second byte is zero, as all
// of firmware's own text is, else bytes of text.
func text(b []byte) string {
	if !isUTF16(b) {
		return string(b)
	}
	u := make([]uint16, 0, len(b)/2)
	for i := 0; i+1 < len(b); i += 2 {
		u = append(u, uint16(b[i])|uint16(b[i+1])<<8)
	}
	return string(utf16.Decode(u))
}

// isUTF16 takes text for UTF-16 if its high bytes are zero and its low bytes are
// not, but for the end. Other scripts than Latin are shown byte by byte, which no
// boot loader has been seen to need.
func isUTF16(b []byte) bool {
	if len(b) < 2 || len(b)%2 != 0 || b[0] == 0 {
		return false
	}
	for i := 1; i < len(b); i += 2 {
		if b[i] != 0 {
			return false
		}
	}
	return true
}

// isText reports whether bytes are meant to be read.
func isText(b []byte) bool {
	s := strings.TrimRight(text(b), "\x00")
	if s == "" || !utf8.ValidString(s) {
		return false
	}
	for _, r := range s {
		if !unicode.IsPrint(r) && r != '\n' && r != '\t' {
			return false
		}
	}
	return true
}

// Text shows bytes as text that people compare: at most 4096 characters,
// without control characters.
func Text(b []byte) string { return bounded(text(b), maxText) }

// printable keeps control characters and endless data out of terminals and
// logs.
func printable(s string) string { return bounded(s, maxDetail) }

func bounded(s string, limit int) string {
	s = strings.TrimRight(s, "\x00")
	var out strings.Builder
	for _, r := range s {
		if out.Len() >= limit {
			out.WriteString("…")
			break
		}
		if !unicode.IsPrint(r) {
			r = '·'
		}
		out.WriteRune(r)
	}
	return out.String()
}
