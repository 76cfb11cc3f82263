package tdx

import (
	"encoding/hex"
	"fmt"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/facts"
)

// tdAttributes are the bits of a TD's ATTRIBUTES that have a name in the facts
// (Intel TDX Module ABI, "TD attributes"), besides those of debugging.
var tdAttributes = []struct {
	bit  int
	fact facts.Fact[bool]
}{
	{28, facts.TDXSEPTVEDisable},
	{29, facts.TDXMigratable},
	{30, facts.TDXPKS},
	{31, facts.TDXKeyLocker},
	{63, facts.TDXPerfmon},
}

// debugAttributes is how many bytes of ATTRIBUTES belong to a TD under debug or
// profiling. Bit 0 is DEBUG, bits 4 to 6 are profiling by the host; whichever is
// set, also one that has no name yet, the TD is not to be trusted.
const debugAttributes = 2

// Registers of a TD, as claims and policies name them.
const registerMRTD = "mrtd"

// register names an RTMR in claims and policies.
func register(rtmr int) string { return fmt.Sprintf("rtmr%d", rtmr) }

// Claims returns what the quote says of the TD, unverified and without anything
// that Intel has to say: for display, and for making reference values on a
// machine that is trusted otherwise.
func (q *Quote) Claims() attestation.Claims {
	b := &q.body
	c := attestation.Claims{
		Kind:         attestation.TDX,
		Measurements: map[string]attestation.Measurement{registerMRTD: {Value: b.mrTD}},
		Facts:        map[string]any{},
	}
	facts.TDXQuoteVersion.Put(c.Facts, uint64(q.Version))
	facts.TDXTEETCBSVN.Put(c.Facts, hex.EncodeToString(b.teeTCBSVN))
	facts.TDXAttributes.Put(c.Facts, hex.EncodeToString(b.tdAttributes))
	facts.TDXXFAM.Put(c.Facts, hex.EncodeToString(b.xfam))
	facts.TDXTEETCBSVN2.Put(c.Facts, hexOrEmpty(b.teeTCBSVN2))
	facts.TDXMRSEAM.Put(c.Facts, hexOrEmpty(b.mrSeam))
	facts.TDXMRSignerSEAM.Put(c.Facts, hexOrEmpty(b.mrSignerSeam))
	facts.TDXSEAMAttributes.Put(c.Facts, hexOrEmpty(b.seamAttributes))
	facts.TDXMRConfigID.Put(c.Facts, hexOrEmpty(b.mrConfigID))
	facts.TDXMROwner.Put(c.Facts, hexOrEmpty(b.mrOwner))
	facts.TDXMROwnerConfig.Put(c.Facts, hexOrEmpty(b.mrOwnerConfig))
	facts.TDXMRServiceTD.Put(c.Facts, hexOrEmpty(b.mrServiceTD))
	for i, v := range b.rtmr {
		c.Measurements[register(i)] = attestation.Measurement{Value: v}
	}
	facts.Debug.Put(c.Facts, !zero(b.tdAttributes[:debugAttributes]))
	for _, a := range tdAttributes {
		a.fact.Put(c.Facts, b.tdAttributes[a.bit/8]>>(a.bit%8)&1 == 1)
	}
	return c
}

// addFacts adds what the PCK certificate says of the platform.
func (p *pck) addFacts(set map[string]any) {
	facts.TDXFMSPC.Put(set, p.FMSPC)
	facts.TDXPPID.Put(set, p.PPID)
	facts.TDXPIID.Put(set, p.piid)
	facts.TDXPCEID.Put(set, p.PCEID)
	facts.TDXCPUSVN.Put(set, hex.EncodeToString(p.TCB.CPUSvn))
	facts.TDXPCESVN.Put(set, uint64(p.TCB.PCESvn))
	facts.TDXCA.Put(set, p.ca)
	for fact, on := range p.configuration {
		fact.Put(set, on)
	}
}

// addFacts adds what Intel says of the platform now.
func (s *standing) addFacts(set map[string]any) {
	facts.TDXTCBStatus.Put(set, s.status)
	facts.TDXModuleTCBStatus.Put(set, s.module)
	facts.TDXQETCBStatus.Put(set, s.qe)
	facts.TDXTCBDate.Put(set, s.date)
	facts.TDXTCBEvaluation.Put(set, s.evaluation)
	facts.TDXAdvisories.Put(set, s.advisories)
}
