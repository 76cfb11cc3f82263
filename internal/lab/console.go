package lab

import (
	"bufio"
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"

	"github.com/keyagent/keyagent/internal/pattern"
)

// Line is one line of a guest's serial console.
type Line struct {
	At   time.Duration // since power on, by this machine's clock
	Text string        // without line end and without terminal control sequences
}

// Mark is a milestone that the guest printed.
type Mark struct {
	Name   string
	Uptime time.Duration // since its kernel started, by the guest's clock
	At     time.Duration // since power on, by this machine's clock
}

// maxLine bounds what a guest can make this process keep of one line.
const maxLine = 64 << 10

// escape matches the terminal control sequences that firmware prints.
var escape = pattern.New(`\x1b(\[[0-9;?=]*[a-zA-Z]|[()][0-9A-Z]|[=>cDEHMNOZ78])`)

// console keeps the lines of a guest and wakes those who wait for one.
type console struct {
	start  time.Time
	notify func(Line) // or nil; called in order, from one goroutine

	mu      sync.Mutex
	lines   []Line
	closed  bool
	changed chan struct{} // closed, and made anew, at each change
}

func newConsole(start time.Time, notify func(Line)) *console {
	return &console{start: start, notify: notify, changed: make(chan struct{})}
}

// follow reads lines until the stream ends.
func (c *console) follow(stream io.Reader) {
	reader := bufio.NewReaderSize(stream, maxLine)
	for {
		// A line longer than the buffer comes in pieces.
		raw, err := reader.ReadSlice('\n')
		if len(raw) > 0 {
			c.add(Line{At: time.Since(c.start), Text: cleanLine(raw)})
		}
		if err != nil && err != bufio.ErrBufferFull {
			break
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	c.wake()
}

// cleanLine leaves nothing that would do something to the terminal on which the
// line is shown: a guest may print anything.
func cleanLine(raw []byte) string {
	text := strings.TrimRight(escape.ReplaceAllString(strings.ToValidUTF8(string(raw), "?"), ""), "\r\n")
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) && r != '\t' {
			return '?'
		}
		return r
	}, text)
}

func (c *console) add(line Line) {
	c.mu.Lock()
	c.lines = append(c.lines, line)
	c.wake()
	c.mu.Unlock()
	if c.notify != nil {
		c.notify(line)
	}
}

// wake is called with the lock held.
func (c *console) wake() {
	close(c.changed)
	c.changed = make(chan struct{})
}

// snapshot returns the lines from index from on.
func (c *console) snapshot(from int) (lines []Line, closed bool, changed <-chan struct{}) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.lines[from:len(c.lines):len(c.lines)], c.closed, c.changed
}

// wait returns the first line, of those already there or still to come, that
// match accepts.
func (c *console) wait(ctx context.Context, match func(Line) bool) (Line, error) {
	seen := 0
	for {
		lines, closed, changed := c.snapshot(seen)
		for _, line := range lines {
			if match(line) {
				return line, nil
			}
		}
		seen += len(lines)
		if closed {
			return Line{}, fmt.Errorf("the console ended first: %w", io.EOF)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return Line{}, context.Cause(ctx)
		}
	}
}

// directive finds a line's words behind KEYAGENT-kind, wherever in the line it
// stands: systemd puts a unit's name before it, the firmware leaves a remainder.
func directive(line Line, kind string) ([]string, bool) {
	_, rest, found := strings.Cut(line.Text, "KEYAGENT-"+kind+" ")
	return strings.Fields(rest), found
}

func parseMark(line Line) (Mark, bool) {
	words, found := directive(line, "MARK")
	if !found || len(words) != 2 {
		return Mark{}, false
	}
	seconds, err := strconv.ParseFloat(words[0], 64)
	if err != nil {
		return Mark{}, false
	}
	return Mark{Name: words[1], Uptime: time.Duration(seconds * float64(time.Second)), At: line.At}, true
}

func parseMarks(lines []Line) []Mark {
	var marks []Mark
	for _, line := range lines {
		if mark, ok := parseMark(line); ok {
			marks = append(marks, mark)
		}
	}
	return marks
}

// parsePCRs returns the values that the guest printed, in lower-case hex.
func parsePCRs(lines []Line) map[int]string {
	values := map[int]string{}
	for _, line := range lines {
		words, found := directive(line, "PCR")
		if !found || len(words) != 2 {
			continue
		}
		if index, err := strconv.Atoi(words[0]); err == nil {
			values[index] = strings.ToLower(words[1])
		}
	}
	return values
}

// parseSection puts a file together again that the guest printed. If it printed
// one name twice, the last one counts.
func parseSection(lines []Line, name string) ([]byte, error) {
	var encoded strings.Builder
	var content []byte
	complete := false
	for _, line := range lines {
		if words, found := directive(line, "DATA"); found && len(words) == 2 && words[0] == name {
			encoded.WriteString(words[1])
			continue
		}
		words, found := directive(line, "END")
		if !found || len(words) != 2 || words[0] != name {
			continue
		}
		data, err := base64.StdEncoding.DecodeString(encoded.String())
		if err != nil {
			return nil, fmt.Errorf("section %q: %w", name, err)
		}
		if words[1] != strconv.Itoa(len(data)) {
			return nil, fmt.Errorf("section %q: got %d bytes, the guest sent %s", name, len(data), words[1])
		}
		content, complete = data, true
		encoded.Reset()
	}
	if !complete {
		return nil, fmt.Errorf("section %q: not on the console, or cut off", name)
	}
	return content, nil
}
