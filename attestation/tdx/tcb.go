package tdx

import (
	"bytes"
	"fmt"
	"slices"
	"strings"

	"github.com/google/go-tdx-guest/pcs"
)

// standing is what Intel says of a platform at this moment, under Intel's names.
type standing struct {
	status     string // of platform, module and quoting enclave together
	module     string // empty for a TDX module 1.0, which the platform's level covers
	qe         string
	date       string
	advisories []string
	evaluation uint64
}

// assess applies Intel's algorithm (PCS API v4, "TDX TCB info"): the first of the
// levels that the platform reaches; likewise for the TDX module, which has levels
// of its own since version 1.5, and for the quoting enclave. What is revoked is
// refused; other states are for the policy.
func assess(e *endorsed, p *pck, q *Quote, qe *pcs.TcbLevel) (*standing, error) {
	if !strings.EqualFold(p.FMSPC, e.tcb.Fmspc) || !strings.EqualFold(p.PCEID, e.tcb.PceID) {
		return nil, fmt.Errorf("%w: it is for FMSPC %s and PCE %s, the platform has %s and %s",
			ErrTCB, e.tcb.Fmspc, e.tcb.PceID, p.FMSPC, p.PCEID)
	}
	module, err := moduleLevel(&e.tcb, q)
	if err != nil {
		return nil, err
	}
	level, err := platformLevel(&e.tcb, p, q.body.teeTCBSVN)
	if err != nil {
		return nil, err
	}
	s := &standing{
		status: string(level.TcbStatus), module: string(module.TcbStatus), qe: string(qe.TcbStatus), date: level.TcbDate,
		// Both count Intel's recoveries; the older of the two is what was checked.
		evaluation: uint64(min(e.tcb.TcbEvaluationDataNumber, e.qe.TcbEvaluationDataNumber)),
		advisories: slices.Concat(level.AdvisoryIDs, module.AdvisoryIDs, qe.AdvisoryIDs),
	}
	for _, part := range []struct{ what, status string }{{"TCB level of the platform", s.status}, {"TDX module", s.module}, {"quoting enclave", s.qe}} {
		if part.status == string(pcs.TcbComponentStatusRevoked) {
			return nil, fmt.Errorf("%w: the %s", ErrRevoked, part.what)
		}
	}
	s.status = converge(converge(s.status, s.module), s.qe)
	slices.Sort(s.advisories)
	s.advisories = slices.Compact(s.advisories)
	return s, nil
}

// platformLevel finds the first level that certificate and TD report reach.
// Levels are in descending order.
func platformLevel(info *pcs.TcbInfo, p *pck, svn []byte) (*pcs.TcbLevel, error) {
	// A module with a version has levels of its own: its two numbers are not the
	// platform's.
	first := 0
	if svn[1] > 0 {
		first = 2
	}
	for i := range info.TcbLevels {
		l := &info.TcbLevels[i]
		if reaches(p.TCB.CPUSvnComponents, l.Tcb.SgxTcbcomponents) && p.TCB.PCESvn >= l.Tcb.Pcesvn &&
			reaches(svn[first:], l.Tcb.TdxTcbcomponents[first:]) {
			return l, nil
		}
	}
	return nil, fmt.Errorf("%w: none of its %d levels is reached by CPU %x, PCE %d, TDX %x", ErrTCB,
		len(info.TcbLevels), p.TCB.CPUSvnComponents, p.TCB.PCESvn, svn)
}

func reaches(have []byte, need []pcs.TcbComponent) bool {
	for i, n := range need {
		if have[i] < n.Svn {
			return false
		}
	}
	return true
}

// moduleLevel checks who signed the TDX module, and finds its level. A module 1.0
// has none: the second byte of the TEE's TCB SVN is its version, and 0.
func moduleLevel(info *pcs.TcbInfo, q *Quote) (*pcs.TcbLevel, error) {
	version, svn := q.body.teeTCBSVN[1], uint32(q.body.teeTCBSVN[0])
	if version == 0 {
		m := info.TdxModule
		return &pcs.TcbLevel{}, q.moduleIs(m.Mrsigner.Bytes, m.Attributes.Bytes, m.AttributesMask.Bytes)
	}
	id := fmt.Sprintf("TDX_%02x", version)
	for _, m := range info.TdxModuleIdentities {
		if !strings.EqualFold(m.ID, id) {
			continue
		}
		if err := q.moduleIs(m.Mrsigner.Bytes, m.Attributes.Bytes, m.AttributesMask.Bytes); err != nil {
			return nil, err
		}
		for i := range m.TcbLevels {
			if svn >= m.TcbLevels[i].Tcb.Isvsvn {
				return &m.TcbLevels[i], nil
			}
		}
		return nil, fmt.Errorf("%w: no level of %s is reached by SVN %d", ErrModule, id, svn)
	}
	return nil, fmt.Errorf("%w: TCB info knows no %s", ErrModule, id)
}

func (q *Quote) moduleIs(signer, attributes, mask []byte) error {
	if len(signer) != 48 || len(attributes) != 8 || len(mask) != 8 {
		return fmt.Errorf("%w: TDX module: signer or attributes have the wrong size", ErrCollateral)
	}
	if !bytes.Equal(signer, q.body.mrSignerSeam) {
		return fmt.Errorf("%w: MRSIGNERSEAM is %x, not %x", ErrModule, q.body.mrSignerSeam, signer)
	}
	if !equalUnder(mask, q.body.seamAttributes, attributes) {
		return fmt.Errorf("%w: SEAMATTRIBUTES are %x, not %x under the mask %x", ErrModule, q.body.seamAttributes, attributes, mask)
	}
	return nil
}

// qeLevel checks that the quoting enclave is Intel's, and finds its level.
func qeLevel(id *pcs.EnclaveIdentity, e enclave) (*pcs.TcbLevel, error) {
	switch {
	case !bytes.Equal(id.Mrsigner.Bytes, e.mrSigner):
		return nil, fmt.Errorf("%w: MRSIGNER is %x, not %x", ErrQE, e.mrSigner, id.Mrsigner.Bytes)
	case id.IsvProdID != e.prodID:
		return nil, fmt.Errorf("%w: ISVPRODID is %d, not %d", ErrQE, e.prodID, id.IsvProdID)
	case !equalUnder(id.MiscselectMask.Bytes, e.miscSelect, id.Miscselect.Bytes):
		return nil, fmt.Errorf("%w: MISCSELECT is %x", ErrQE, e.miscSelect)
	case !equalUnder(id.AttributesMask.Bytes, e.attributes, id.Attributes.Bytes):
		return nil, fmt.Errorf("%w: ATTRIBUTES are %x", ErrQE, e.attributes)
	}
	for i := range id.TcbLevels {
		if uint32(e.svn) >= id.TcbLevels[i].Tcb.Isvsvn {
			return &id.TcbLevels[i], nil
		}
	}
	return nil, fmt.Errorf("%w: no level is reached by ISVSVN %d", ErrQE, e.svn)
}

func equalUnder(mask, have, want []byte) bool {
	for i := range mask {
		if have[i]&mask[i] != want[i] {
			return false
		}
	}
	return true
}

// converge makes a platform's status no better than that of a part.
func converge(platform, part string) string {
	if part != string(pcs.TcbComponentStatusOutOfDate) {
		return platform
	}
	switch pcs.TcbComponentStatus(platform) {
	case pcs.TcbComponentStatusUpToDate, pcs.TcbComponentStatusSwHardeningNeeded:
		return string(pcs.TcbComponentStatusOutOfDate)
	case pcs.TcbComponentStatusConfigurationNeeded, pcs.TcbComponentStatusConfigurationAndSWHardeningNeeded:
		return string(pcs.TcbComponentStatusOutOfDateConfigurationNeeded)
	}
	return platform
}
