package policy

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/keyagent/keyagent/attestation"
)

// Offline is what a grant says of openings without the key service. Both fields are
// needed: neither a time nor a number of boots is a bound by itself.
type Offline struct {
	For   string `yaml:"for"`   // of the TPM's clock, which stands still while the machine is off
	Boots int    `yaml:"boots"` // resets of the TPM
}

// OfflineLimits are the same as numbers. Zero allows nothing.
type OfflineLimits struct {
	For   time.Duration
	Boots uint32
}

// The bounds of both, in a grant and in what a node asks for.
const (
	minOffline      = time.Hour
	MaxOffline      = 30 * 24 * time.Hour
	maxOfflineBoots = 64
)

// Limits parses and bounds what a grant, or a node, says.
func (o *Offline) Limits() (OfflineLimits, error) {
	d, err := time.ParseDuration(o.For)
	if err != nil || d < minOffline || d > MaxOffline {
		return OfflineLimits{}, fmt.Errorf("for must be a duration from %s to %s, such as 24h", minOffline, MaxOffline)
	}
	if o.Boots < 1 || o.Boots > maxOfflineBoots {
		return OfflineLimits{}, fmt.Errorf("boots must be a number from 1 to %d", maxOfflineBoots)
	}
	return OfflineLimits{d, uint32(o.Boots)}, nil
}

// Least is the smaller of each.
func (l OfflineLimits) Least(o OfflineLimits) OfflineLimits {
	return OfflineLimits{min(l.For, o.For), min(l.Boots, o.Boots)}
}

// offline checks what a grant says of openings without the key service: nobody else may
// come to write the volume meanwhile.
func (c *Checker) offline(g *Grant, i int) {
	if g.Offline == nil {
		return
	}
	var err error
	if g.offline, err = g.Offline.Limits(); err != nil {
		c.Fail("%w", []any{err}, "grants", i, "offline")
	}
	c.Demand(slices.Contains(g.Operations, Open), "needs the operation open", "grants", i, "offline")
	c.Demand(g.Writers == WritersOne, "needs one writer, whose lease keeps others away meanwhile", "grants", i, "offline")
	c.Demand(g.Takeover == "", "cannot be with takeover: a lease that ends lets another node write meanwhile", "grants", i, "offline")
}

// ErrNotSealable means that a machine has no TPM that a key can be left with.
var ErrNotSealable = errors.New("no key can be left with this machine")

// SealedTo are the registers that keep a key on a machine whose profile this is: those
// that the profile enforces, ascending, and the SHA-256 of the values that the verified
// quote covers, in that order. It errs where no TPM inside the protected machine is part
// of the evidence. The error wraps [ErrNotSealable].
func (a *Appraisal) SealedTo() (pcrs []uint32, digest [sha256.Size]byte, err error) {
	claims, ok := a.verified.Claims(attestation.TPM)
	switch {
	case !ok || !slices.Contains(a.kinds, attestation.TPM):
		return nil, digest, fmt.Errorf("%w: profile %q demands no TPM", ErrNotSealable, a.Profile)
	case claims.Via == attestation.SVSM:
		return nil, digest, fmt.Errorf("%w: the TPM of an SVSM may be another one after a reset", ErrNotSealable)
	case claims.Via == "" && len(a.verified.All()) > 1:
		// Whatever the profile says of it: beside a report of the processor, a TPM that this
		// does not cover may be the host's.
		return nil, digest, fmt.Errorf("%w: its TPM is beside the hardware that it shows, and no report covers it", ErrNotSealable)
	}
	var section *TPMProfile
	for i := range a.policy.profiles {
		if p := &a.policy.profiles[i]; p.Name == a.Profile {
			section = p.TPM()
		}
	}
	if len(section.Measured) > 0 {
		return nil, digest, fmt.Errorf("%w: its profile demands measured_volumes, which come in any order", ErrNotSealable)
	}
	for _, r := range section.PCRs {
		if !r.WarnOnly {
			pcrs = append(pcrs, *r.PCR)
		}
	}
	slices.Sort(pcrs)
	h := sha256.New()
	for _, n := range pcrs {
		m, ok := claims.Measurements[fmt.Sprintf("pcr%d", n)]
		if !ok || len(m.Value) != sha256.Size {
			return nil, digest, fmt.Errorf("%w: the quote does not cover PCR %d", ErrNotSealable, n)
		}
		h.Write(m.Value)
	}
	return pcrs, [sha256.Size]byte(h.Sum(nil)), nil
}
