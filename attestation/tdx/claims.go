package tdx

import (
	"encoding/hex"
	"fmt"

	"github.com/keyagent/keyagent/attestation"
)

// tdAttributes are the bits of a TD's ATTRIBUTES that have a name in the facts
// (Intel TDX Module ABI, "TD attributes"), besides those of debugging.
var tdAttributes = []struct {
	bit  int
	name string
}{
	{28, "sept_ve_disable"},
	{29, "migratable"},
	{30, "pks"},
	{31, "key_locker"},
	{63, "perfmon"},
}

// debugAttributes is how many bytes of ATTRIBUTES belong to a TD under debug or
// profiling. Bit 0 is DEBUG, bits 4 to 6 are profiling by the host; whichever is
// set, also one that has no name yet, the TD is not to be trusted.
const debugAttributes = 2

// Registers of a TD, as claims and policies name them.
const registerMRTD = "mrtd"

// Register names an RTMR in claims and policies.
func Register(rtmr int) string { return fmt.Sprintf("rtmr%d", rtmr) }

// Claims returns what the quote says of the TD, unverified and without anything
// that Intel has to say: for display, and for making reference values on a
// machine that is trusted otherwise.
func (q *Quote) Claims() attestation.Claims {
	b := &q.body
	c := attestation.Claims{
		Kind:         attestation.TDX,
		Measurements: map[string]attestation.Measurement{registerMRTD: {Value: b.mrTD}},
		Facts: map[string]any{
			"quote_version":   uint64(q.Version),
			"tee_tcb_svn":     hex.EncodeToString(b.teeTCBSVN),
			"td_attributes":   hex.EncodeToString(b.tdAttributes),
			"xfam":            hex.EncodeToString(b.xfam),
			"tee_tcb_svn_2":   hexOrEmpty(b.teeTCBSVN2),
			"mr_seam":         hexOrEmpty(b.mrSeam),
			"mr_signer_seam":  hexOrEmpty(b.mrSignerSeam),
			"seam_attributes": hexOrEmpty(b.seamAttributes),
			"mr_config_id":    hexOrEmpty(b.mrConfigID),
			"mr_owner":        hexOrEmpty(b.mrOwner),
			"mr_owner_config": hexOrEmpty(b.mrOwnerConfig),
			"mr_service_td":   hexOrEmpty(b.mrServiceTD),
		},
	}
	for i, v := range b.rtmr {
		c.Measurements[Register(i)] = attestation.Measurement{Value: v}
	}
	c.Facts["debug"] = !zero(b.tdAttributes[:debugAttributes])
	for _, a := range tdAttributes {
		c.Facts[a.name] = b.tdAttributes[a.bit/8]>>(a.bit%8)&1 == 1
	}
	return c
}

// addFacts adds what the PCK certificate says of the platform.
func (p *pck) addFacts(facts map[string]any) {
	facts["fmspc"], facts["ppid"], facts["piid"], facts["pce_id"] = p.FMSPC, p.PPID, p.piid, p.PCEID
	facts["cpu_svn"] = hex.EncodeToString(p.TCB.CPUSvn)
	facts["pce_svn"] = uint64(p.TCB.PCESvn)
	facts["ca"] = p.ca
	for name, set := range p.configuration {
		facts[name] = set
	}
}

// addFacts adds what Intel says of the platform now.
func (s *standing) addFacts(facts map[string]any) {
	facts["tcb_status"], facts["module_tcb_status"], facts["qe_tcb_status"] = s.status, s.module, s.qe
	facts["tcb_date"] = s.date
	facts["tcb_evaluation_number"] = s.evaluation
	facts["advisories"] = s.advisories
}
