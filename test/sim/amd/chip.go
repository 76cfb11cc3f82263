package amd

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/binary"
	"math/big"
	"time"

	"github.com/google/go-sev-guest/abi"
	"github.com/google/uuid"
)

// TCB is a TCB version by parts. FMC is for Turin only.
type TCB struct{ FMC, Bootloader, TEE, SNP, Microcode byte }

// Version is the TCB as a report of a product line has it.
func (t TCB) Version(product string) uint64 {
	if product == "Turin" {
		return binary.LittleEndian.Uint64([]byte{t.FMC, t.Bootloader, t.TEE, t.SNP, 0, 0, 0, t.Microcode})
	}
	return binary.LittleEndian.Uint64([]byte{t.Bootloader, t.TEE, 0, 0, 0, 0, t.SNP, t.Microcode})
}

// ChipOptions of [Authority.Chip]. Unset fields take the stated default.
type ChipOptions struct {
	// ID is the chip's. Default one of its own. A chip of Turin has 8 bytes of it.
	ID [64]byte
	// TCB of its certificates. Default one of no zero part.
	TCB TCB
	// Provider of its VLEK. Default "CN=cc.example.com".
	Provider string
	// NotBefore and NotAfter of its certificates. Default those of the authority,
	// and seven years later.
	NotBefore, NotAfter time.Time
	// Edit changes a certificate before it is signed.
	Edit func(*x509.Certificate)
}

// Chip is a processor with the keys that sign its reports.
type Chip struct {
	*Authority
	ID         [64]byte
	TCB        TCB
	VCEK, VLEK *x509.Certificate
	vcek, vlek *ecdsa.PrivateKey
}

// DefaultTCB is that of a chip of which nothing else is said.
var DefaultTCB = TCB{Bootloader: 4, TEE: 1, SNP: 24, Microcode: 219}

// Chip makes a processor.
func (a *Authority) Chip(opts ChipOptions) (*Chip, error) {
	if opts.TCB == (TCB{}) {
		opts.TCB = DefaultTCB
		if a.Product == "Turin" {
			opts.TCB.FMC = 2
		}
	}
	if opts.ID == ([64]byte{}) {
		rand.Read(opts.ID[:])
		if a.Product == "Turin" {
			clear(opts.ID[8:])
		}
	}
	if opts.Provider == "" {
		opts.Provider = "CN=cc.example.com"
	}
	if opts.NotBefore.IsZero() {
		opts.NotBefore = a.ARK.NotBefore
	}
	if opts.NotAfter.IsZero() {
		opts.NotAfter = opts.NotBefore.AddDate(7, 0, 0)
	}
	c := &Chip{Authority: a, ID: opts.ID, TCB: opts.TCB}
	for _, k := range []struct {
		name string
		key  **ecdsa.PrivateKey
		cert **x509.Certificate
	}{{"SEV-VCEK", &c.vcek, &c.VCEK}, {"SEV-VLEK", &c.vlek, &c.VLEK}} {
		key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
		if err != nil {
			return nil, err
		}
		t := &x509.Certificate{
			SerialNumber: new(big.Int), Subject: Name(k.name), NotBefore: opts.NotBefore, NotAfter: opts.NotAfter,
			SignatureAlgorithm: x509.SHA384WithRSAPSS, ExtraExtensions: c.extensions(k.name, opts.Provider),
		}
		if opts.Edit != nil {
			opts.Edit(t)
		}
		parent, signer := a.ASK, a.ask
		if k.name == "SEV-VLEK" {
			parent, signer = a.ASVK, a.asvk
		}
		cert, err := certify(t, parent, key.Public(), signer)
		if err != nil {
			return nil, err
		}
		*k.key, *k.cert = key, cert
	}
	return c, nil
}

// extensions are AMD's, as the certificates of each product line have them.
func (c *Chip) extensions(name, provider string) []pkix.Extension {
	var out []pkix.Extension
	add := func(value []byte, id ...int) {
		out = append(out, pkix.Extension{Id: append(asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 3704, 1}, id...), Value: value})
	}
	text := func(s string) []byte { b, _ := asn1.MarshalWithParams(s, "ia5"); return b }
	number := func(n int) []byte { b, _ := asn1.Marshal(n); return b }
	product, structure, chip := c.Product, 0, c.ID[:]
	if name == "SEV-VCEK" && c.Product != "Turin" {
		product += "-B0"
	}
	reserved := []int{4, 5, 6, 7}
	if c.Product == "Turin" {
		structure, chip, reserved = 1, c.ID[:8], []int{5, 6, 7}
		add(number(int(c.TCB.FMC)), 3, 9)
	}
	add(number(structure), 1)
	add(text(product), 2)
	add(number(int(c.TCB.Bootloader)), 3, 1)
	add(number(int(c.TCB.TEE)), 3, 2)
	add(number(int(c.TCB.SNP)), 3, 3)
	for _, id := range reserved {
		add(number(0), 3, id)
	}
	add(number(int(c.TCB.Microcode)), 3, 8)
	if name == "SEV-VCEK" {
		add(chip, 4)
	} else {
		add(text(provider), 5)
	}
	return out
}

// Table is the certificate table that a host hands over.
func (c *Chip) Table() []byte {
	entry := func(guid string, cert *x509.Certificate) abi.CertTableEntry {
		return abi.CertTableEntry{GUID: uuid.MustParse(guid), RawCert: cert.Raw}
	}
	return (&abi.CertTable{Entries: []abi.CertTableEntry{
		entry(abi.ArkGUID, c.ARK), entry(abi.AskGUID, c.ASK), entry(abi.VcekGUID, c.VCEK), entry(abi.VlekGUID, c.VLEK),
	}}).Marshal()
}
