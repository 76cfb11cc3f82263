package snp

import (
	"context"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/google/go-sev-guest/abi"

	"github.com/keyagent/keyagent/attestation/endorsement"
)

// KDS is the origin of AMD's key distribution service.
const KDS = "https://kdsintf.amd.com"

// EndorsementRequests are for everything that a verifier will want for a report,
// to get it before it is wanted. product is needed for reports of version 2, which
// do not name it. A VLEK is not among them: AMD gives it to its cloud provider only.
func EndorsementRequests(report []byte, product string) ([]endorsement.Request, error) {
	r, err := Parse(report)
	if err != nil {
		return nil, err
	}
	if r.Product != "" {
		product = r.Product
	}
	if !slices.Contains(products, product) {
		return nil, fmt.Errorf("%w: the report does not say, and %q is not one of %v", ErrProduct, product, products)
	}
	requests := []endorsement.Request{crlRequest(product, r.signer, nil)}
	if r.signer == abi.VcekReportSigner {
		if zero(r.ChipID[:]) {
			return nil, fmt.Errorf("%w: the report's chip ID is masked", ErrChip)
		}
		requests = append(requests, vcekRequest(r, product, nil))
	}
	return requests, nil
}

// vcekRequest is for the certificate of one chip at one TCB. roots, if there are
// any, keep something else from being stored in its place.
func vcekRequest(r *Report, product string, roots []Root) endorsement.Request {
	t, chip := splitTCB(product, r.ReportedTCB), r.ChipID[:]
	var query []string
	if product == turin {
		query = append(query, fmt.Sprintf("fmcSPL=%02d", t.fmc))
		if zero(chip[8:]) {
			chip = chip[:8]
		}
	}
	query = append(query, fmt.Sprintf("blSPL=%02d&teeSPL=%02d&snpSPL=%02d&ucodeSPL=%02d", t.bootloader, t.tee, t.snp, t.microcode))
	return endorsement.Request{
		Name: fmt.Sprintf("snp-vcek-%s-%x-%016x", product, chip, r.ReportedTCB),
		URL:  fmt.Sprintf("%s/vcek/v1/%s/%s?%s", KDS, product, hex.EncodeToString(chip), strings.Join(query, "&")),
		Fresh: func(d endorsement.Document, now time.Time) bool {
			l, err := parseLeaf(d.Body, abi.VcekReportSigner)
			return err == nil && l.matches(r, product) == nil && now.Before(l.cert.NotAfter) &&
				signedByOne(roots, product, func(root Root) bool {
					return root.ASK != nil && l.cert.CheckSignatureFrom(root.ASK) == nil
				})
		},
	}
}

// crlRequest is for the revocation list. AMD has two per product line, both of
// them the root's.
func crlRequest(product string, signer abi.ReportSigner, roots []Root) endorsement.Request {
	name, path := "snp-crl-"+product, "vcek"
	if signer == abi.VlekReportSigner {
		name, path = "snp-crl-vlek-"+product, "vlek"
	}
	return endorsement.Request{
		Name: name,
		URL:  fmt.Sprintf("%s/%s/v1/%s/crl", KDS, path, product),
		Fresh: func(d endorsement.Document, now time.Time) bool {
			list, err := parseCRL(d.Body)
			return err == nil && !now.After(list.NextUpdate) && signedByOne(roots, product, func(root Root) bool {
				return list.CheckSignatureFrom(root.ARK) == nil
			})
		},
	}
}

func signedByOne(roots []Root, product string, signed func(Root) bool) bool {
	if len(roots) == 0 {
		return true
	}
	return slices.ContainsFunc(roots, func(r Root) bool { return r.Product == product && signed(r) })
}

// certificate is the carried one, or the one that the source has.
func (v *Verifier) certificate(ctx context.Context, t Trust, r *Report, carried []byte) ([]byte, error) {
	switch {
	case len(carried) > 0:
		return carried, nil
	case r.signer == abi.VlekReportSigner:
		return nil, fmt.Errorf("%w: the VLEK of a cloud provider must be carried", ErrEndorsementMissing)
	case r.Product == "":
		return nil, fmt.Errorf("%w: a version %d report does not name its product line, so its VCEK must be carried", ErrEndorsementMissing, r.Version)
	case zero(r.ChipID[:]):
		return nil, fmt.Errorf("%w: the report's chip ID is masked", ErrChip)
	}
	return v.ask(ctx, vcekRequest(r, r.Product, t.Roots))
}

// crl is the carried one, or the one that the source has.
func (v *Verifier) crl(ctx context.Context, t Trust, r *Report, certificate, carried []byte) ([]byte, error) {
	if len(carried) > 0 {
		return carried, nil
	}
	product := r.Product
	if product == "" {
		l, err := parseLeaf(certificate, r.signer)
		if err != nil {
			return nil, err
		}
		product = l.product
	}
	return v.ask(ctx, crlRequest(product, r.signer, t.Roots))
}

// renewed is the list that the source has in place of a carried one that has ended.
// Without a source, and for a list with another fault, it is nil.
func (v *Verifier) renewed(ctx context.Context, t Trust, r *Report, certificate, carried []byte) ([]byte, error) {
	now := v.now()
	old, err := parseCRL(carried)
	if v.endorsements == nil || err != nil || !now.After(old.NextUpdate) {
		return nil, nil
	}
	list, err := v.crl(ctx, t, r, certificate, nil)
	if err != nil {
		err = fmt.Errorf("%w (the carried one has ended on %s, this machine's clock says %s)", err,
			old.NextUpdate.Format(time.RFC3339), now.Format(time.RFC3339))
	}
	return list, err
}

func (v *Verifier) ask(ctx context.Context, r endorsement.Request) ([]byte, error) {
	if v.endorsements == nil {
		return nil, fmt.Errorf("%w: %s is not carried, and nobody is configured to be asked", ErrEndorsementMissing, r.Name)
	}
	d, err := v.endorsements.Get(ctx, r)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrEndorsementMissing, err)
	}
	return d.Body, nil
}
