package shell

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"strings"
	"testing"
	"time"
)

var errEnough = errors.New("enough")

func TestHowACommandEnds(t *testing.T) {
	for name, tt := range map[string]struct {
		text   string
		stdout func(io.Reader) error
		want   error
		says   string
	}{
		"well":                         {"cat", nil, nil, ""},
		"with a status":                {"exit 3", nil, nil, "exit status 3"},
		"because nobody reads further": {"yes", func(r io.Reader) error { return errEnough }, errEnough, ""},
		"because its time is over":     {"sleep 1000", nil, ErrDeadline, "2s"},
		"it does not exist":            {"/no/such/command", nil, nil, "exit status 127"},
	} {
		t.Run(name, func(t *testing.T) {
			var out bytes.Buffer
			if tt.stdout == nil {
				tt.stdout = func(r io.Reader) error { _, err := io.Copy(&out, r); return err }
			}
			err := Run(t.Context(), Command{
				Name: "test", Text: tt.text, Stdin: strings.NewReader("input"), Deadline: 2 * time.Second, Stdout: tt.stdout, Log: slog.New(slog.DiscardHandler),
			})
			if name == "well" {
				if err != nil || out.String() != "input" {
					t.Errorf("%q, %v", &out, err)
				}
				return
			}
			if err == nil || (tt.want != nil && !errors.Is(err, tt.want)) || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("got %v, want %v that says %q", err, tt.want, tt.says)
			}
		})
	}
}

func TestACallerThatGoesEndsTheCommand(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	started, stop := io.Pipe()
	go func() { _, _ = started.Read(make([]byte, 1)); cancel() }()
	err := Run(ctx, Command{
		Name: "test", Text: "echo; exec sleep 1000", Deadline: time.Minute, Log: slog.New(slog.DiscardHandler),
		Stdout: func(r io.Reader) error { _, err := io.Copy(stop, r); return err },
	})
	if !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func TestStandardErrorIsLoggedWithinBounds(t *testing.T) {
	var log bytes.Buffer
	err := Run(t.Context(), Command{
		Name: "the command", Text: "yes trouble | head -n 1000 >&2", Deadline: time.Minute, Log: slog.New(slog.NewTextHandler(&log, nil)),
		Stdout: func(r io.Reader) error { _, err := io.Copy(io.Discard, r); return err },
	})
	if n := strings.Count(log.String(), "stderr=trouble"); err != nil || n != maxLogged {
		t.Errorf("%d lines, %v", n, err)
	}
}
