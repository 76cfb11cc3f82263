package snp

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"encoding/asn1"
	"fmt"

	"github.com/google/go-sev-guest/abi"
)

// oidAMD is AMD's arc for the extensions of VCEK and VLEK.
var oidAMD = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 3704, 1}

// leaf is a parsed certificate of a report's key. Nothing vouches for it yet.
type leaf struct {
	cert    *x509.Certificate
	key     *ecdsa.PublicKey
	product string
	tcb     tcb
	chip    []byte // 64 bytes, of a VCEK
	csp     string // of a VLEK
}

// parseLeaf reads a certificate for the key that signer names. go-sev-guest has
// such a reader as well; it knows neither the FMC of a TCB nor the short chip ID,
// and so refuses every certificate of Turin.
func parseLeaf(der []byte, signer abi.ReportSigner) (*leaf, error) {
	if len(der) > maxCertificate {
		return nil, fmt.Errorf("%w: certificate of %d bytes", ErrMalformed, len(der))
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("%w: certificate: %w", ErrMalformed, err)
	}
	l := &leaf{cert: cert}
	key, ok := cert.PublicKey.(*ecdsa.PublicKey)
	switch {
	case !ok || key.Curve != elliptic.P384():
		return nil, fmt.Errorf("%w: its key is not on P-384", ErrCertificate)
	case cert.SignatureAlgorithm != x509.SHA384WithRSAPSS:
		return nil, fmt.Errorf("%w: it is signed with %s", ErrCertificate, cert.SignatureAlgorithm)
	case cert.Subject.CommonName != "SEV-"+signer.String():
		return nil, fmt.Errorf("%w: it is named %q, the report is signed by a %s", ErrCertificate, cert.Subject.CommonName, signer)
	case cert.IsCA:
		return nil, fmt.Errorf("%w: it is an authority's", ErrCertificate)
	}
	l.key = key
	if err := l.readExtensions(signer); err != nil {
		return nil, err
	}
	return l, nil
}

// readExtensions demands every extension that a certificate of its product line
// has, and refuses one that is not known: it may be a part of the TCB that would
// have to be compared.
func (l *leaf) readExtensions(signer abi.ReportSigner) error {
	ints := map[string]byte{} // by what follows oidAMD
	var name string
	for _, ext := range l.cert.Extensions {
		if len(ext.Id) <= len(oidAMD) || !ext.Id[:len(oidAMD)].Equal(oidAMD) {
			if ext.Critical {
				return fmt.Errorf("%w: critical extension %s", ErrCertificate, ext.Id)
			}
			continue
		}
		id := ext.Id[len(oidAMD):].String()
		var err error
		switch id {
		case "1", "3.1", "3.2", "3.3", "3.4", "3.5", "3.6", "3.7", "3.8", "3.9":
			ints[id], err = integer(ext.Value)
		case "2":
			name, err = ia5(ext.Value)
		case "4":
			l.chip, err = chip(ext.Value)
		case "5":
			l.csp, err = ia5(ext.Value)
		default:
			err = fmt.Errorf("it is not known")
		}
		if err != nil {
			return fmt.Errorf("%w: extension %s: %w", ErrCertificate, ext.Id, err)
		}
	}
	var err error
	if l.product, err = productNamed(name); err != nil {
		return err
	}
	want := []string{"1", "3.1", "3.2", "3.3", "3.4", "3.5", "3.6", "3.7", "3.8"}
	if l.product == turin {
		// The FMC takes the place of one reserved part.
		want = []string{"1", "3.1", "3.2", "3.3", "3.5", "3.6", "3.7", "3.8", "3.9"}
	}
	if len(ints) != len(want) {
		return fmt.Errorf("%w: of %s, with %d extensions for structure and TCB, not %d", ErrCertificate, l.product, len(ints), len(want))
	}
	for _, id := range want {
		if _, ok := ints[id]; !ok {
			return fmt.Errorf("%w: extension %s.%s is missing", ErrCertificate, oidAMD, id)
		}
	}
	if ints["1"] > 1 {
		return fmt.Errorf("%w: structure version %d", ErrCertificate, ints["1"])
	}
	l.tcb = tcb{fmc: ints["3.9"], bootloader: ints["3.1"], tee: ints["3.2"], snp: ints["3.3"], microcode: ints["3.8"],
		rest: [4]byte{ints["3.4"], ints["3.5"], ints["3.6"], ints["3.7"]}}
	switch {
	case signer == abi.VcekReportSigner && (l.chip == nil || l.csp != ""):
		return fmt.Errorf("%w: a VCEK has a chip ID and no provider", ErrCertificate)
	case signer == abi.VlekReportSigner && (l.chip != nil || l.csp == ""):
		return fmt.Errorf("%w: a VLEK has a provider and no chip ID", ErrCertificate)
	}
	return nil
}

// matches demands that the certificate is for this chip, or for none, and for
// this TCB.
func (l *leaf) matches(r *Report, product string) error {
	if r.signer == abi.VcekReportSigner {
		// A host can have the chip ID masked. Any VCEK would do then.
		if zero(r.ChipID[:]) {
			return fmt.Errorf("%w: the report's chip ID is masked", ErrChip)
		}
		if !bytes.Equal(l.chip, r.ChipID[:]) {
			return fmt.Errorf("%w: the report is of %x", ErrChip, r.ChipID)
		}
	}
	if got := splitTCB(product, r.ReportedTCB); l.tcb != got {
		return fmt.Errorf("%w: the certificate is for %s, the report is of %s", ErrTCB, l.tcb, got)
	}
	return nil
}

func integer(value []byte) (byte, error) {
	var i int
	rest, err := asn1.Unmarshal(value, &i)
	if err != nil || len(rest) > 0 || i < 0 || i > 255 {
		return 0, fmt.Errorf("not a byte: %x", value)
	}
	return byte(i), nil
}

func ia5(value []byte) (string, error) {
	var s string
	if len(value) == 0 || value[0] != asn1.TagIA5String {
		return "", fmt.Errorf("not an IA5String")
	}
	rest, err := asn1.UnmarshalWithParams(value, &s, "ia5")
	if err != nil || len(rest) > 0 {
		return "", fmt.Errorf("not an IA5String")
	}
	return s, nil
}

// chip is the chip ID as a report has it. AMD writes it without a type, 64 bytes
// long or, since Turin, 8, which a report pads with zeros.
func chip(value []byte) ([]byte, error) {
	if len(value) != 8 && len(value) != abi.ChipIDSize {
		var octets []byte
		rest, err := asn1.Unmarshal(value, &octets)
		if err != nil || len(rest) > 0 || len(octets) != 8 && len(octets) != abi.ChipIDSize {
			return nil, fmt.Errorf("not a chip ID: %x", value)
		}
		value = octets
	}
	return append(bytes.Clone(value), make([]byte, abi.ChipIDSize-len(value))...), nil
}
