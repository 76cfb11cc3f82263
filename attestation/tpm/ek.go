package tpm

import (
	"bytes"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/keyagent/keyagent/attestation/certificate"
)

// candidate is an endorsement key that a TPM may have, and what its index holds.
type candidate struct {
	ek
	der  []byte            // as it is sent
	cert *x509.Certificate // nil if there is none that can be read
	err  error             // why not, if something is there
}

// candidates are the keys to try, best first: those whose certificate can be read, then
// those that have one which cannot, which an operator may have enrolled, then the rest.
func (a *attempt) candidates() ([]candidate, error) {
	var with, unreadable, without []candidate
	for _, e := range eks {
		if a.issuer.opts.EK != EKAuto && a.issuer.opts.EK != e.kind {
			continue
		}
		c := candidate{ek: e}
		raw, err := readNV(a.tpm, e.certificate)
		var answer tpm2.TPMRC
		switch {
		case errors.As(err, &answer):
			c.err = err // of this index, and not of the TPM
		case err != nil:
			return nil, err
		case raw != nil:
			der := certificate.Unwrap(raw)
			if c.cert, err = certificate.Parse(der); err == nil {
				c.der = der
			} else {
				c.err = fmt.Errorf("certificate at NV index %#x: %w", uint32(e.certificate), err)
			}
		}
		switch {
		case c.cert != nil:
			with = append(with, c)
		case c.err != nil:
			unreadable = append(unreadable, c)
		default:
			without = append(without, c)
		}
	}
	return slices.Concat(with, unreadable, without), nil
}

// errOtherKey means that an endorsement key was made and is not the certificate's.
var errOtherKey = errors.New("it is not the key in its certificate (hint: the TPM was cleared, or its maker used another template)")

// chooseEK loads the best endorsement key that this TPM can give. What is wrong with a
// better one is logged: its owner wants to know, and the machine goes on.
func (a *attempt) chooseEK() error {
	all, err := a.candidates()
	if err != nil {
		return err
	}
	// Last of all, keys without the certificates that do not fit them.
	for _, c := range all {
		if c.cert != nil {
			all = append(all, candidate{ek: c.ek})
		}
	}
	var reasons []error
	for _, c := range all {
		reason := c.err
		key, err := loadEK(a.tpm, c.ek, c.cert)
		switch pinned, pinErr := a.pinned(key, err); {
		case err != nil:
			reason = errors.Join(reason, err)
		case pinErr != nil:
			return pinErr
		case !pinned:
			key.flush(a.tpm)
			reasons = append(reasons, fmt.Errorf("%s endorsement key is %s, the configuration pins %s (hint: is this the machine that was enrolled?)",
				c.kind, digestOf(key), a.issuer.opts.EKPin))
			continue
		default:
			if reason != nil {
				a.issuer.log(fmt.Sprintf("the %s endorsement key is used without a certificate", c.kind), reason)
			}
			a.ek, a.ekey, a.cert = c.ek, key, c.der
			if c.cert != nil {
				a.intermediates = a.chain(c.cert)
			}
			return nil
		}
		if reason != nil {
			reason = fmt.Errorf("%s endorsement key: %w", c.kind, reason)
			a.issuer.log("another endorsement key is tried", reason)
			reasons = append(reasons, reason)
		}
	}
	return errors.Join(reasons...)
}

// pinned reports whether a loaded key is the one that the configuration pins, or none
// is pinned.
func (a *attempt) pinned(key object, loadErr error) (bool, error) {
	if loadErr != nil || a.issuer.opts.EKPin == "" {
		return true, nil
	}
	pub, err := tpm2.Pub(key.public)
	if err != nil {
		return false, err
	}
	digest, err := EKDigest(pub)
	return digest == a.issuer.opts.EKPin, err
}

// digestOf names a key in messages.
func digestOf(key object) string {
	pub, err := tpm2.Pub(key.public)
	if err != nil {
		return "unknown"
	}
	digest, err := EKDigest(pub)
	if err != nil {
		return "unknown"
	}
	return digest
}

// loadEK gives the key that belongs to a certificate: the persistent one if the
// platform kept it, else made again from the profile's template.
func loadEK(t transport.TPM, e ek, cert *x509.Certificate) (object, error) {
	if rsp, err := (tpm2.ReadPublic{ObjectHandle: e.persistent}).Execute(t); err == nil {
		if pub, err := rsp.OutPublic.Contents(); err == nil && samePublicKey(*pub, cert) {
			return object{e.persistent, *pub, rsp.Name, true}, nil
		}
	}
	o, err := createPrimary(t, e.template)
	if err != nil {
		return object{}, fmt.Errorf("make it: %w", err)
	}
	if cert != nil && !samePublicKey(o.public, cert) {
		o.flush(t)
		return object{}, errOtherKey
	}
	return o, nil
}

// Where an authority that is part of the machine leaves its chain: TCG EK Credential
// Profile, section 2.2.1.5.2, "EK Certificate Chains".
const (
	firstChainIndex = tpm2.TPMHandle(0x01c00100)
	lastChainIndex  = tpm2.TPMHandle(0x01c001ff)
	maxChainBytes   = 32 << 10
)

// maxIntermediates bounds the certificates between a TPM's own and a root. Those of a
// processor that certifies its own firmware TPM are five.
const maxIntermediates = 8

// chain finds what leads from a certificate towards a root: in the configuration, and
// in the TPM.
func (a *attempt) chain(leaf *x509.Certificate) [][]byte {
	if out := chainFrom(leaf, a.issuer.opts.EKIntermediates); len(out) > 0 {
		return out
	}
	var nv []byte
	for index := firstChainIndex; index <= lastChainIndex && len(nv) < maxChainBytes; index++ {
		part, err := readNV(a.tpm, index)
		if err != nil {
			a.issuer.log("certificates in the TPM are left out", err)
			return nil
		}
		if part == nil {
			break
		}
		nv = append(nv, part...)
	}
	all, err := certificate.Split(nv, 2*maxIntermediates)
	if err != nil {
		a.issuer.log("certificates in the TPM are left out", fmt.Errorf("NV index %#x and those behind it: %w", uint32(firstChainIndex), err))
		return nil
	}
	return chainFrom(leaf, all)
}

// chainFrom orders the certificates of pool that lead from leaf to a root, without the
// root. It goes by names alone; a verifier looks at the signatures.
func chainFrom(leaf *x509.Certificate, pool []*x509.Certificate) (chain [][]byte) {
	for child := leaf; len(chain) < maxIntermediates; {
		n := slices.IndexFunc(pool, func(c *x509.Certificate) bool {
			return bytes.Equal(c.RawSubject, child.RawIssuer) && !bytes.Equal(c.RawSubject, c.RawIssuer) &&
				(len(child.AuthorityKeyId) == 0 || len(c.SubjectKeyId) == 0 || bytes.Equal(child.AuthorityKeyId, c.SubjectKeyId))
		})
		if n < 0 || slices.ContainsFunc(chain, func(der []byte) bool { return bytes.Equal(der, pool[n].Raw) }) {
			break
		}
		child = pool[n]
		chain = append(chain, child.Raw)
	}
	return chain
}
