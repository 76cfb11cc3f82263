package lab

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"
)

func lines(texts ...string) []Line {
	var out []Line
	for i, text := range texts {
		out = append(out, Line{At: time.Duration(i) * time.Second, Text: text})
	}
	return out
}

func TestConsoleDropsWhatTheFirmwareDoesToTheTerminal(t *testing.T) {
	c := newConsole(time.Now(), nil)
	c.follow(strings.NewReader("\x1b[2J\x1b[01;01H\x1b[=3hBdsDxe: loading\r\n\xff[0m\x00\t.\x1b]0;title\a\nlast"))
	got, closed, _ := c.snapshot(0)
	if !closed || len(got) != 3 {
		t.Fatalf("closed %v, lines %q", closed, got)
	}
	for i, want := range []string{"BdsDxe: loading", "?[0m?\t.?]0;title?", "last"} {
		if got[i].Text != want {
			t.Errorf("line %d: %q, want %q", i, got[i].Text, want)
		}
	}
}

func TestConsoleBoundsALine(t *testing.T) {
	c := newConsole(time.Now(), nil)
	c.follow(strings.NewReader(strings.Repeat("x", 3*maxLine)))
	got, _, _ := c.snapshot(0)
	for _, line := range got {
		if len(line.Text) > maxLine {
			t.Fatalf("a line of %d bytes", len(line.Text))
		}
	}
}

func TestWaitFindsLinesOfThePastAndOfTheFuture(t *testing.T) {
	reader, writer := io.Pipe()
	c := newConsole(time.Now(), nil)
	go c.follow(reader)
	is := func(text string) func(Line) bool { return func(l Line) bool { return l.Text == text } }
	io.WriteString(writer, "one\n")
	if _, err := c.wait(t.Context(), is("one")); err != nil {
		t.Fatal(err)
	}
	go func() { io.WriteString(writer, "two\n"); writer.Close() }()
	if _, err := c.wait(t.Context(), is("two")); err != nil {
		t.Fatal(err)
	}
	if _, err := c.wait(t.Context(), is("three")); !errors.Is(err, io.EOF) {
		t.Errorf("after the end: %v", err)
	}
}

func TestWaitEndsWithItsContext(t *testing.T) {
	c := newConsole(time.Now(), nil)
	ctx, cancel := context.WithCancelCause(t.Context())
	reason := errors.New("no patience")
	cancel(reason)
	if _, err := c.wait(ctx, func(Line) bool { return false }); !errors.Is(err, reason) {
		t.Errorf("got %v", err)
	}
}

func TestMarksAndPCRsAreParsed(t *testing.T) {
	got := lines(
		"KEYAGENT-MARK 2.75 userspace",
		"[    3.1] sh[12]: KEYAGENT-MARK 3.10 opened",
		"KEYAGENT-MARK broken", "KEYAGENT-MARK x y", "KEYAGENT-MARKS 1 z",
		"KEYAGENT-PCR 11 ABCDEF", "KEYAGENT-PCR no 00",
	)
	marks := parseMarks(got)
	if len(marks) != 2 || marks[0].Name != "userspace" || marks[1].Uptime != 3100*time.Millisecond {
		t.Errorf("marks: %+v", marks)
	}
	if pcrs := parsePCRs(got); len(pcrs) != 1 || pcrs[11] != "abcdef" {
		t.Errorf("PCRs: %v", pcrs)
	}
}

func TestSectionIsWholeOrAnError(t *testing.T) {
	content := strings.Repeat("event log ", 20)
	encoded := base64.StdEncoding.EncodeToString([]byte(content))
	half, rest := "KEYAGENT-DATA log "+encoded[:40], "KEYAGENT-DATA log "+encoded[40:]
	end := fmt.Sprintf("KEYAGENT-END log %d", len(content))
	if got, err := parseSection(lines(half, "a kernel message", rest, end), "log"); err != nil || string(got) != content {
		t.Errorf("whole: %q, %v", got, err)
	}
	for name, broken := range map[string][]Line{
		"no end":        lines(half, rest),
		"lost line":     lines(half, end),
		"other section": lines(half, rest, "KEYAGENT-END other 5"),
		"nothing":       nil,
	} {
		if _, err := parseSection(broken, "log"); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}
