package tdx

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/google/go-tdx-guest/pcs"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation/endorsement"
)

// rootCRLURL is where Intel publishes the list of its root. It is fixed here
// rather than taken from a certificate, so that a peer cannot choose it.
const rootCRLURL = "https://certificates.trustedservices.intel.com/IntelSGXRootCA.der"

// The four documents of a platform, in the order of EndorsementRequests.
const (
	docTCBInfo = iota
	docQEIdentity
	docPCKCRL
	docRootCRL
)

var docNames = [...]string{"TCB info", "QE identity", "PCK CRL", "root CRL"}

// EndorsementRequests names what Intel has to say of the platform that made a
// quote: TCB info, QE identity, and the revocation lists of the platform's CA and
// of the root. The quote need not be verified: what it says of itself chooses
// only among Intel's documents.
func EndorsementRequests(quote []byte) ([]endorsement.Request, error) {
	q, err := Parse(quote)
	if err != nil {
		return nil, err
	}
	p, err := parsePCK(q.chain)
	if err != nil {
		return nil, err
	}
	return p.requests(nil), nil
}

// requests are for one platform. root, if there is one, keeps something else from
// being stored in a document's place, where it would stand until its own date.
func (p *pck) requests(root *x509.Certificate) []endorsement.Request {
	requests := []endorsement.Request{
		docTCBInfo: {Name: "tdx-tcb-" + p.FMSPC, URL: pcs.TcbInfoURL(p.FMSPC),
			ChainHeader: pcs.TcbInfoIssuerChainPhrase, Fresh: freshJSON},
		docQEIdentity: {Name: "tdx-qe", URL: pcs.QeIdentityURL(),
			ChainHeader: pcs.SgxQeIdentityIssuerChainPhrase, Fresh: freshJSON},
		docPCKCRL: {Name: "tdx-pckcrl-" + p.ca, URL: pcs.PckCrlURL(p.ca),
			ChainHeader: pcs.SgxPckCrlIssuerChainPhrase, Fresh: freshCRL},
		docRootCRL: {Name: "tdx-rootcrl", URL: rootCRLURL, Fresh: freshCRL},
	}
	if root == nil {
		return requests
	}
	for i := range requests {
		dates := requests[i].Fresh
		requests[i].Fresh = func(d endorsement.Document, now time.Time) bool { return dates(d, now) && p.signed(root, i, d, now) }
	}
	return requests
}

// signed reports whether a document is what its name says, by its own signature.
func (p *pck) signed(root *x509.Certificate, doc int, d endorsement.Document, now time.Time) bool {
	var e endorsed
	var err error
	switch doc {
	case docTCBInfo:
		var info struct{ Fmspc string }
		var signed []byte
		if signed, err = e.verifyJSON(root, docNames[doc], tcbInfoPart, d, now); err == nil {
			err = json.Unmarshal(signed, &info)
		}
		return err == nil && strings.EqualFold(info.Fmspc, p.FMSPC)
	case docQEIdentity:
		_, err = e.verifyJSON(root, docNames[doc], qeIdentityPart, d, now)
	case docPCKCRL:
		err = e.verifyCRL(&endorsement.Memory{}, docNames[doc], d.Body, p.issuer, now)
	default:
		err = e.verifyCRL(&endorsement.Memory{}, docNames[doc], d.Body, root, now)
	}
	return err == nil
}

// collateralOf puts the answers to [EndorsementRequests], in the same order, into
// the message that evidence carries.
func collateralOf(docs []endorsement.Document) (*attestv1.TDXCollateral, error) {
	if len(docs) != len(docNames) {
		return nil, fmt.Errorf("%w: %d documents, not %d", ErrEndorsementMissing, len(docs), len(docNames))
	}
	return &attestv1.TDXCollateral{
		TcbInfo: docs[docTCBInfo].Body, TcbInfoChain: docs[docTCBInfo].Chain,
		QeIdentity: docs[docQEIdentity].Body, QeIdentityChain: docs[docQEIdentity].Chain,
		PckCrl: docs[docPCKCRL].Body, PckCrlChain: docs[docPCKCRL].Chain,
		RootCrl: docs[docRootCRL].Body,
	}, nil
}

// documents is the inverse of Collateral.
func documents(c *attestv1.TDXCollateral) []endorsement.Document {
	return []endorsement.Document{
		docTCBInfo:    {Body: c.GetTcbInfo(), Chain: c.GetTcbInfoChain()},
		docQEIdentity: {Body: c.GetQeIdentity(), Chain: c.GetQeIdentityChain()},
		docPCKCRL:     {Body: c.GetPckCrl(), Chain: c.GetPckCrlChain()},
		docRootCRL:    {Body: c.GetRootCrl()},
	}
}

// complete asks the source for each document that is missing or past its time.
func complete(ctx context.Context, source endorsement.Source, root *x509.Certificate, p *pck, carried []endorsement.Document, now time.Time) ([]endorsement.Document, error) {
	out := make([]endorsement.Document, len(carried))
	for i, r := range p.requests(root) {
		out[i] = carried[i]
		if len(carried[i].Body) > 0 && r.Fresh(carried[i], now) {
			continue
		}
		d, err := source.Get(ctx, r)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", docNames[i], err)
		}
		out[i] = d
	}
	return out, nil
}

// freshJSON and freshCRL look at the dates alone.
func freshJSON(d endorsement.Document, now time.Time) bool {
	var dates struct{ NextUpdate time.Time }
	var body map[string]json.RawMessage
	if json.Unmarshal(d.Body, &body) != nil {
		return false
	}
	for _, part := range []string{tcbInfoPart, qeIdentityPart} {
		if raw, ok := body[part]; ok {
			return json.Unmarshal(raw, &dates) == nil && now.Before(dates.NextUpdate)
		}
	}
	return false
}

func freshCRL(d endorsement.Document, now time.Time) bool {
	crl, err := x509.ParseRevocationList(d.Body)
	return err == nil && now.Before(crl.NextUpdate)
}
