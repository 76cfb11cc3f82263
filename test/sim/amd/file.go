package amd

import (
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"os"
)

// description is the first block of a chip's file.
type description struct {
	Product string `json:"product"`
	ID      string `json:"chip_id"`
	TCB     TCB    `json:"tcb"`
}

// Save writes the chip with its authority and all private keys, so that another
// process is the same chip.
func (c *Chip) Save(path string) error {
	head, err := json.Marshal(description{c.Product, hex.EncodeToString(c.ID[:]), c.TCB})
	if err != nil {
		return err
	}
	out := pem.EncodeToMemory(&pem.Block{Type: "CHIP", Bytes: head})
	for _, key := range []any{c.ark, c.ask, c.asvk, c.vcek, c.vlek} {
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			return err
		}
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})...)
	}
	for _, cert := range []*x509.Certificate{c.ARK, c.ASK, c.ASVK, c.VCEK, c.VLEK} {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})...)
	}
	return os.WriteFile(path, out, 0o600)
}

// Load reads what [Chip.Save] wrote.
func Load(path string) (*Chip, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var head description
	var keys []any
	var certs []*x509.Certificate
	for {
		var b *pem.Block
		if b, data = pem.Decode(data); b == nil {
			break
		}
		switch b.Type {
		case "CHIP":
			err = json.Unmarshal(b.Bytes, &head)
		case "PRIVATE KEY":
			var key any
			key, err = x509.ParsePKCS8PrivateKey(b.Bytes)
			keys = append(keys, key)
		case "CERTIFICATE":
			var cert *x509.Certificate
			cert, err = x509.ParseCertificate(b.Bytes)
			certs = append(certs, cert)
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
	}
	if len(keys) != 5 || len(certs) != 5 {
		return nil, fmt.Errorf("%s: %d keys and %d certificates, not 5", path, len(keys), len(certs))
	}
	c := &Chip{Authority: &Authority{Product: head.Product, ARK: certs[0], ASK: certs[1], ASVK: certs[2]}, TCB: head.TCB, VCEK: certs[3], VLEK: certs[4]}
	if n, err := hex.Decode(c.ID[:], []byte(head.ID)); err != nil || n != len(c.ID) {
		return nil, fmt.Errorf("%s: chip ID %q", path, head.ID)
	}
	for i, to := range []**rsa.PrivateKey{&c.ark, &c.ask, &c.asvk} {
		*to, _ = keys[i].(*rsa.PrivateKey)
	}
	for i, to := range []**ecdsa.PrivateKey{&c.vcek, &c.vlek} {
		*to, _ = keys[3+i].(*ecdsa.PrivateKey)
	}
	if c.ark == nil || c.ask == nil || c.asvk == nil || c.vcek == nil || c.vlek == nil {
		return nil, fmt.Errorf("%s: a key is of another kind", path)
	}
	return c, nil
}
