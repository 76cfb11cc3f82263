package main

import (
	"slices"
	"strings"
	"testing"
)

func TestFlagsOf2018HaveOneDash(t *testing.T) {
	for name, tt := range map[string]struct {
		args, want string
		warnings   int
	}{
		"as in 2018":             {"kubekms -command=cat -endpoint unix:///s -timeout=1m -mode aescbc", "kubekms --command=cat --endpoint unix:///s --timeout=1m --mode aescbc", 4},
		"as today":               {"kubekms --command cat --endpoint unix:///s", "kubekms --command cat --endpoint unix:///s", 0},
		"a value like a flag":    {"kubekms --command -mode --endpoint -timeout", "kubekms --command -mode --endpoint -timeout", 0},
		"a flag without a value": {"kubekms --init -mode aescbc", "kubekms --init --mode aescbc", 1},
		"another flag":           {"kubekms -volume=x", "kubekms -volume=x", 0},
		"behind the flags":       {"kubekms -- -mode", "kubekms -- -mode", 0},
		"another command":        {"serve -command=x", "serve -command=x", 0},
		"nothing":                {"", "", 0},
	} {
		var said strings.Builder
		got := of2018(strings.Fields(tt.args), &said)
		if !slices.Equal(got, strings.Fields(tt.want)) || strings.Count(said.String(), "warning") != tt.warnings {
			t.Errorf("%s: %q, said %q", name, got, said.String())
		}
	}
}
