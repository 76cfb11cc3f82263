package main

import (
	"encoding/json"
	"io"
	"log/slog"

	"github.com/spf13/cobra"

	"github.com/keyagent/keyagent/internal/failure"
)

// outputFlag adds --output, for people or for programs.
func outputFlag(cmd *cobra.Command) *string {
	return cmd.Flags().String("output", "text", "text, or json for programs")
}

// print writes v as JSON, or calls text.
func print(cmd *cobra.Command, output string, v any, text func(io.Writer)) error {
	switch output {
	case "json":
		e := json.NewEncoder(cmd.OutOrStdout())
		e.SetIndent("", "  ")
		return e.Encode(v)
	case "text":
		text(cmd.OutOrStdout())
		return nil
	}
	return failure.Newf(failure.Usage, "text or json", "unknown output %q", output)
}

// logFlags adds the flags of a command that logs.
type logFlags struct {
	format string
	level  string
}

func (l *logFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&l.format, "log-format", "text", "text or json")
	cmd.Flags().StringVar(&l.level, "log-level", "info", "debug, info, warn or error")
}

func (l *logFlags) logger(w io.Writer) (*slog.Logger, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(l.level)); err != nil {
		return nil, failure.Newf(failure.Usage, "debug, info, warn or error", "unknown log level %q", l.level)
	}
	opts := &slog.HandlerOptions{Level: level}
	switch l.format {
	case "text":
		return slog.New(slog.NewTextHandler(w, opts)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(w, opts)), nil
	}
	return nil, failure.Newf(failure.Usage, "text or json", "unknown log format %q", l.format)
}
