package keyservice

import (
	"crypto/sha256"
	"encoding/hex"
	"strings"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/internal/volume"
)

// machineOf names the machine that verified evidence is of, so that no other one has
// the name and it has it again after a reboot; or "" if the evidence cannot tell.
//
//   - A TPM's claims are of its EK, or of the AK that its cloud certified or that an
//     Azure VM's hardware report covers: one TPM, one machine.
//   - An SVSM's vTPM may be made anew at each boot.
//   - A Nitro document names the instance.
//   - The identity of SNP and of TDX is the chip or the platform, on which other VMs
//     run; and what else a report holds is chosen by the host, or new at each boot.
//
// Azure's own claims name the VM by an ID that the host gives.
func machineOf(v *attestation.Verified) string {
	for _, kind := range []attestation.Kind{attestation.Nitro, attestation.TPM} {
		c, ok := v.Claims(kind)
		if !ok || c.Identity == "" || c.Via == attestation.SVSM {
			continue
		}
		return string(kind) + ":" + c.Identity
	}
	return ""
}

const (
	maxNode   = 64  // bytes of what a node calls itself
	maxHolder = 512 // bytes of an identity in a record
)

// callerFor is a caller as volumes know it.
func (c caller) callerFor(node string, presents []byte, protocol uint32) *volume.Caller {
	binder := c.channel.Binder()
	channel := sha256.Sum256(binder[:])
	name := c.verified.Identity()
	return &volume.Caller{
		Holder:  volume.Holder{Machine: machineOf(c.verified), Name: name[:min(len(name), maxHolder)], Node: printable(node)},
		Channel: hex.EncodeToString(channel[:]), Presents: hex.EncodeToString(presents[:min(len(presents), 64)]), Protocol: protocol,
	}
}

// printable makes a node's word for itself fit for logs and other nodes' eyes.
func printable(node string) string {
	node = node[:min(len(node), maxNode)]
	return strings.Map(func(r rune) rune {
		if r <= ' ' || r > '~' || r == '"' || r == '\\' {
			return '_'
		}
		return r
	}, node)
}
