package node

import (
	"log/slog"
	"slices"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/internal/measured"
)

// Register is where volumes of this machine are measured: its TPM, or, if the configuration
// names the evidence and no TPM's is among it, a TD's own register. A TPM that is late is
// waited for, since a choice that depends on the moment would leave a profile that
// demands the volume without it.
func (c *Config) Register(log *slog.Logger) measured.Register {
	named := func(kinds ...attestation.Kind) bool {
		return slices.ContainsFunc(kinds, func(k attestation.Kind) bool { return slices.Contains(c.Evidence, string(k)) })
	}
	switch {
	case len(c.Evidence) == 0 || named(attestation.TPM, attestation.Azure, attestation.SVSM, attestation.Nitro):
		return &measured.TPM{Device: c.TPM.Device, Warn: func(err error) {
			log.Warn("a profile's measured_volumes refuses this machine until it restarts", "error", err)
		}}
	case named(attestation.TDX):
		return &measured.RTMR{}
	}
	return measured.None{}
}
