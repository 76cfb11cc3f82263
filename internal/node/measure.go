package node

import (
	"log/slog"
	"slices"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/internal/measured"
)

// Register is where volumes of this machine are measured: its TPM, or else a TD's own
// register. If the configuration names the evidence, it is a register that this
// evidence covers.
func (c *Config) Register(log *slog.Logger) measured.Register {
	covered := func(kinds ...attestation.Kind) bool {
		return len(c.Evidence) == 0 || slices.ContainsFunc(kinds, func(k attestation.Kind) bool { return slices.Contains(c.Evidence, string(k)) })
	}
	var all measured.First
	if covered(attestation.TPM, attestation.Azure, attestation.SVSM, attestation.Nitro) {
		all = append(all, &measured.TPM{Device: c.TPM.Device, Warn: func(err error) {
			log.Warn("a profile's measured_volumes refuses this machine until it restarts", "error", err)
		}})
	}
	if covered(attestation.TDX) {
		all = append(all, &measured.RTMR{})
	}
	return all
}
