package keyclient

import (
	"fmt"
	"strings"
	"sync"
	"time"

	keyservicev1 "github.com/keyagent/keyagent/api/keyagent/keyservice/v1"
)

// OfflineLimits bound openings without the key service: a time of the TPM's clock, and
// resets of the TPM.
type OfflineLimits struct {
	For   time.Duration
	Boots uint32
}

func (l OfflineLimits) proto() *keyservicev1.OfflineLimits {
	return &keyservicev1.OfflineLimits{ForMs: uint64(l.For / time.Millisecond), Boots: l.Boots}
}

// Offline is the key service's word that a key may be kept, sealed to this machine's TPM.
type Offline struct {
	OfflineLimits
	// PCRs are the registers of the bank SHA-256 that it is sealed to, ascending, and Digest
	// is the SHA-256 of the values that the key service verified.
	PCRs   []uint32
	Digest [32]byte
}

// OfflineReport is what was opened without the key service since it last answered.
type OfflineReport struct {
	Boots uint32
	Since time.Duration // since the first time, by the TPM's clock
}

// lastPCR is the highest register.
const lastPCR = 23

func offlineOf(req *keyservicev1.GetKeyRequest, resp *keyservicev1.GetKeyResponse) (*Offline, error) {
	o := resp.GetOffline()
	if o == nil {
		return nil, nil
	}
	out := &Offline{PCRs: o.GetPcrs()}
	l := o.GetLimits()
	switch {
	case resp.GetProtocol() < protocol || resp.GetLease() == nil || resp.GetLease().GetBound():
		return nil, fmt.Errorf("a key may be kept for which there is no lease without an end")
	case l.GetForMs() == 0 || l.GetForMs() > req.GetOffline().GetForMs() || l.GetBoots() == 0 || l.GetBoots() > req.GetOffline().GetBoots():
		return nil, fmt.Errorf("a key may be kept for %d ms and %d boots, asked for were %d and %d", l.GetForMs(), l.GetBoots(), req.GetOffline().GetForMs(), req.GetOffline().GetBoots())
	case len(o.GetPcrDigest()) != len(out.Digest) || len(out.PCRs) == 0:
		return nil, fmt.Errorf("a key may be kept for %d registers and a digest of %d bytes", len(out.PCRs), len(o.GetPcrDigest()))
	}
	for i, n := range out.PCRs {
		if n > lastPCR || i > 0 && n <= out.PCRs[i-1] {
			return nil, fmt.Errorf("registers %v", out.PCRs)
		}
	}
	copy(out.Digest[:], o.GetPcrDigest())
	out.OfflineLimits = OfflineLimits{time.Duration(l.GetForMs()) * time.Millisecond, l.GetBoots()}
	return out, nil
}

// Report has what was opened without the key service told with the next question about the
// volume that it answers, whatever the answer.
func (c *Client) Report(volume string, r OfflineReport) { c.reports.put(volume, r) }

// reports wait for an answer. The zero value is ready.
type reports struct {
	mu sync.Mutex
	m  map[string]OfflineReport
}

func (r *reports) put(volume string, o OfflineReport) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.m == nil {
		r.m = map[string]OfflineReport{}
	}
	r.m[volume] = o
}

// of returns the report of a volume, or nil, and what to tell how its question ended.
func (r *reports) of(volume string) (*keyservicev1.OfflineReport, func(error)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	o, ok := r.m[volume]
	if !ok {
		return nil, func(error) {}
	}
	return &keyservicev1.OfflineReport{Boots: o.Boots, SinceMs: uint64(max(0, o.Since) / time.Millisecond)}, func(err error) {
		if err != nil && !isAnswer(err) {
			return // nobody may have heard it
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.m[volume] == o {
			delete(r.m, volume)
		}
	}
}

// printable makes a key service's words fit for a log.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return '?'
		}
		return r
	}, s[:min(len(s), 256)])
}
