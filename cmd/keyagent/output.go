package main

import (
	"encoding/json"
	"fmt"
	"io"
	"log/slog"

	"github.com/spf13/cobra"

	"github.com/keyagent/keyagent/internal/failure"
)

// outputFormat is text, for people, or json, for programs.
type outputFormat string

// outputFlag adds --output. A format that there is not is refused before any work
// is done.
func outputFlag(cmd *cobra.Command) *outputFormat {
	o := outputFormat("text")
	cmd.Flags().Var(&o, "output", "text, or json for programs")
	return &o
}

// String implements pflag.Value.
func (o *outputFormat) String() string { return string(*o) }

// Type implements pflag.Value.
func (o *outputFormat) Type() string { return "string" }

// Set implements pflag.Value.
func (o *outputFormat) Set(text string) error {
	if text != "text" && text != "json" {
		return fmt.Errorf("it is text or json")
	}
	*o = outputFormat(text)
	return nil
}

// print writes v as JSON, or calls text.
func print(cmd *cobra.Command, output outputFormat, v any, text func(io.Writer)) error {
	if output == "json" {
		e := json.NewEncoder(cmd.OutOrStdout())
		e.SetIndent("", "  ")
		return e.Encode(v)
	}
	text(cmd.OutOrStdout())
	return nil
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
