package agent

import (
	"context"
	"fmt"
	"log/slog"

	"github.com/keyagent/keyagent/attestation/policy"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/node"
	"github.com/keyagent/keyagent/internal/unixsocket"
)

// callers decides about those who call on a unix socket, by the kernel's word on them,
// and keeps a line of each decision.
type callers struct {
	cfg *node.Config
	log *slog.Logger
}

// admit decides about a connection.
func (c callers) admit(p unixsocket.Peer) error {
	if c.cfg.Knows(p) {
		return nil
	}
	c.log.Warn("local caller refused: no rule names it", described(p)...)
	return fmt.Errorf("uid %d is not in callers", p.UID)
}

// allow decides about a call.
func (c callers) allow(ctx context.Context, operation, volume string) error {
	p, ok := unixsocket.PeerOf(ctx)
	if !ok {
		return answer(failure.Newf(failure.PolicyDenied, "", "the caller is unknown"))
	}
	if !c.cfg.Allows(p, operation, volume) {
		return c.refuse(p, operation, volume, failure.Newf(failure.PolicyDenied,
			"callers in the agent's configuration says who may do what", "uid %d may not %s this volume", p.UID, operation))
	}
	c.log.Info("local call allowed", append(described(p), "operation", operation, "volume", printable(volume))...)
	return nil
}

// refuse says so to the caller, and in the log.
func (c callers) refuse(p unixsocket.Peer, operation, volume string, why error) error {
	c.log.Warn("local call refused", append(described(p), "operation", operation, "volume", printable(volume), "error", why)...)
	return answer(why)
}

// described is who calls. Of the control group nothing is shown that is no plain path.
func described(p unixsocket.Peer) []any {
	out := []any{"uid", p.UID, "gid", p.GID, "pid", p.PID, "cgroup", p.Cgroup}
	if p.NoCgroup != nil {
		out = append(out, "no_cgroup", p.NoCgroup)
	}
	return out
}

// printable is a volume's ID as a caller gives it, in the log.
func printable(id string) string {
	if policy.ValidVolume(id) {
		return id
	}
	return fmt.Sprintf("%.128q", id)
}
