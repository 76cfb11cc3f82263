package snp

import (
	"bytes"
	"crypto/x509"
	"fmt"
	"slices"

	"github.com/google/go-sev-guest/verify/trust"
)

// Trust is what a verifier believes in. The zero value believes in nothing, and
// a verifier refuses to verify with it.
type Trust struct {
	Roots []Root
}

// Root is a named authority of one product line.
type Root struct {
	Name    string
	Product string // "Milan", "Genoa" or "Turin"
	// ARK is the root. It signs ASK and ASVK, and the revocation list.
	ARK *x509.Certificate
	// ASK signs VCEKs, ASVK signs VLEKs. A root without one of them vouches for no
	// key of that kind.
	ASK, ASVK *x509.Certificate
}

func (t Trust) check() error {
	if len(t.Roots) == 0 {
		return fmt.Errorf("%w: no root", ErrConfiguration)
	}
	for _, r := range t.Roots {
		if r.Name == "" || !slices.Contains(products, r.Product) || r.ARK == nil || r.ASK == nil && r.ASVK == nil {
			return fmt.Errorf("%w: root %q of product line %q needs a name, one of %v, an ARK, and an ASK or ASVK", ErrConfiguration, r.Name, r.Product, products)
		}
	}
	return nil
}

// AMD returns AMD's own roots, named "amd". They are those that go-sev-guest
// embeds, as AMD publishes them at
//
//	https://kdsintf.amd.com/vcek/v1/{Milan,Genoa,Turin}/cert_chain
//	https://kdsintf.amd.com/vlek/v1/{Milan,Genoa,Turin}/cert_chain
//
// A test compares them with the copies that another project, Trustee, keeps.
func AMD() []Root {
	var roots []Root
	for _, p := range []struct {
		product    string
		vcek, vlek []byte
	}{
		{milan, trust.AskArkMilanVcekBytes, trust.AskArkMilanVlekBytes},
		{genoa, trust.AskArkGenoaVcekBytes, trust.AskArkGenoaVlekBytes},
		{turin, trust.AskArkTurinVcekBytes, trust.AskArkTurinVlekBytes},
	} {
		var vcek, vlek trust.ProductCerts
		err := vcek.FromKDSCertBytes(bytes.TrimSpace(p.vcek))
		if err == nil {
			err = vlek.FromKDSCertBytes(bytes.TrimSpace(p.vlek))
		}
		if err != nil || vcek.Ark == nil || !vcek.Ark.Equal(vlek.Ark) {
			panic(fmt.Sprintf("embedded roots of %s: %v", p.product, err)) // a test parses them
		}
		roots = append(roots, Root{Name: "amd", Product: p.product, ARK: vcek.Ark, ASK: vcek.Ask, ASVK: vlek.Asvk})
	}
	return roots
}
