package node

import (
	"errors"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/keyagent/keyagent/attestation/policy"
	"github.com/keyagent/keyagent/internal/config"
	"github.com/keyagent/keyagent/internal/unixsocket"
)

// Caller is who may use the local API, and for what.
type Caller struct {
	UID *uint32 `yaml:"uid"`
	// Cgroup are patterns of control groups, as path.Match knows them: * does not cross a
	// slash. Processes in one of these, or below it, are meant. Empty: any.
	Cgroup     []string `yaml:"cgroup,omitempty"`
	Operations []string `yaml:"operations"`
	Volumes    []string `yaml:"volumes"`
}

// GetDataKey is the operation that lets a key leave the agent. No other one covers it.
const GetDataKey = "get-data-key"

// Operations are what a caller may be allowed.
var Operations = []string{"open", "format", "close", "status", "list", "resize", "suspend", "resume", "rotate", "backup-header", "restore-header", "retire", GetDataKey}

func (c *Caller) check(doc *config.Document, i int) error {
	at := func(more ...any) []any { return append([]any{"callers", i}, more...) }
	if c.UID == nil {
		return doc.Errorf(at("uid"), "must be set")
	}
	for n, p := range c.Cgroup {
		if _, err := path.Match(p, ""); err != nil || !path.IsAbs(p) || path.Clean(p) != p || p == "/" {
			return doc.Errorf(at("cgroup", n), "must be an absolute path below /, in which * stands for any run of characters but slashes")
		}
	}
	if len(c.Operations) == 0 {
		return doc.Errorf(at("operations"), "empty: the caller may do nothing")
	}
	for n, op := range c.Operations {
		if !slices.Contains(Operations, op) {
			return doc.Errorf(at("operations", n), "%q is not one of %s", op, strings.Join(Operations, ", "))
		}
	}
	if len(c.Volumes) == 0 {
		return doc.Errorf(at("volumes"), "empty: the caller may touch no volume")
	}
	return nil
}

// is reports whether the rule is about this caller.
func (c *Caller) is(p unixsocket.Peer) bool {
	return *c.UID == p.UID && (len(c.Cgroup) == 0 || within(c.Cgroup, p.Cgroup))
}

// within reports whether a control group, or one above it, fits a pattern. A group that
// is not known fits none.
func within(patterns []string, group string) bool {
	for ; len(group) > len("/"); group = path.Dir(group) {
		if matchesAny(patterns, group) {
			return true
		}
	}
	return false
}

func (c *Caller) covers(volume string) bool {
	return slices.ContainsFunc(c.Volumes, func(pattern string) bool { return policy.Match(pattern, volume) })
}

// Allows reports whether a rule of callers lets a caller do something with a volume, or,
// if none is named, with any.
func (c *Config) Allows(p unixsocket.Peer, operation, volume string) bool {
	return slices.ContainsFunc(c.Callers, func(one Caller) bool {
		return one.is(p) && slices.Contains(one.Operations, operation) && (volume == "" || one.covers(volume))
	})
}

// Knows reports whether a rule names the caller at all: one whom none names is not let
// in.
func (c *Config) Knows(p unixsocket.Peer) bool {
	return slices.ContainsFunc(c.Callers, func(one Caller) bool { return one.is(p) })
}

// Constellation is the socket of Constellation's API.
type Constellation struct {
	Socket string `yaml:"socket,omitempty"`
}

func (c *Config) checkConstellation() error {
	switch s := c.Constellation.Socket; {
	case s == "":
		return nil
	case !filepath.IsAbs(s) || filepath.Clean(s) != s:
		return errors.New("must be a plain absolute path")
	case s == c.Socket || s == c.KeySocket.Path:
		return errors.New("is another socket's path")
	case !slices.ContainsFunc(c.Callers, func(one Caller) bool { return slices.Contains(one.Operations, GetDataKey) }):
		return errors.New("no rule of callers has the operation " + GetDataKey + ": nobody could use it")
	}
	return nil
}
