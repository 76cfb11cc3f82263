package tdx

import (
	"encoding/json"
	"fmt"

	"github.com/google/go-tdx-guest/pcs"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/facts"
)

// UnverifiedClaims reads all that evidence says, for reference values of a machine
// that is trusted for another reason: the quote, the certificate in it, the event
// log, as far as it replays, and what carried collateral says of the platform.
func UnverifiedClaims(ev *attestv1.TDXEvidence) (attestation.Claims, error) {
	q, err := Parse(ev.GetQuote())
	if err != nil {
		return attestation.Claims{}, err
	}
	p, err := parsePCK(q.chain)
	if err != nil {
		return attestation.Claims{}, err
	}
	c := q.Claims()
	if c.Measurements, err = explain(q, ev.GetEventLog()); err != nil {
		return attestation.Claims{}, err
	}
	c.Identity = p.identity()
	p.addFacts(c.Facts)
	facts.TDXQESVN.Put(c.Facts, uint64(q.qe.svn))
	logFacts(ev.GetEventLog(), c.Facts)
	if len(ev.GetCollateral().GetTcbInfo()) == 0 || len(ev.GetCollateral().GetQeIdentity()) == 0 {
		return c, nil
	}
	s, err := unverifiedStanding(ev.GetCollateral(), p, q)
	if err != nil {
		return attestation.Claims{}, err
	}
	s.addFacts(c.Facts)
	return c, nil
}

func unverifiedStanding(from *attestv1.TDXCollateral, p *pck, q *Quote) (*standing, error) {
	if len(from.GetTcbInfo()) > maxJSON || len(from.GetQeIdentity()) > maxJSON {
		return nil, fmt.Errorf("%w: documents of %d and %d bytes", ErrCollateral, len(from.GetTcbInfo()), len(from.GetQeIdentity()))
	}
	var info pcs.TdxTcbInfo
	var identity pcs.QeIdentity
	if err := json.Unmarshal(from.GetTcbInfo(), &info); err != nil {
		return nil, fmt.Errorf("%w: TCB info: %w", ErrCollateral, err)
	}
	if err := json.Unmarshal(from.GetQeIdentity(), &identity); err != nil {
		return nil, fmt.Errorf("%w: QE identity: %w", ErrCollateral, err)
	}
	e := &endorsed{tcb: info.TcbInfo, qe: identity.EnclaveIdentity}
	if err := e.checkForm(); err != nil {
		return nil, err
	}
	qe, err := qeLevel(&e.qe, q.qe)
	if err != nil {
		return nil, err
	}
	return assess(e, p, q, qe)
}
