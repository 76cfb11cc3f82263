package keyclient

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"net"
	"os"
	"path/filepath"
	"strings"

	"github.com/keyagent/keyagent/internal/config"
)

// ServerConfig is one endpoint of a key service, in a configuration file.
type ServerConfig struct {
	Address string   `yaml:"address"`
	Name    string   `yaml:"name,omitempty"` // in the certificate; default the host of address
	CA      string   `yaml:"ca,omitempty"`   // PEM file
	Pins    []string `yaml:"pins,omitempty"` // sha256:HEX of the public key

	roots *x509.CertPool
	pins  [][32]byte
}

// Check reads what stands at a place of a file in dir, and fills in what does not. It leaves it
// to the caller whether there must be a CA or a pin.
func (s *ServerConfig) Check(doc *config.Document, dir string, place ...any) error {
	at := func(field ...any) []any { return append(place[:len(place):len(place)], field...) }
	host, port, err := net.SplitHostPort(s.Address)
	if err != nil || host == "" || port == "" {
		return doc.Errorf(at("address"), "must be HOST:PORT")
	}
	if s.Name == "" {
		s.Name = host
	}
	if s.CA != "" {
		if !filepath.IsAbs(s.CA) {
			s.CA = filepath.Join(dir, s.CA)
		}
		text, err := os.ReadFile(s.CA)
		if err != nil {
			return doc.Errorf(at("ca"), "%w", err)
		}
		s.roots = x509.NewCertPool()
		if !s.roots.AppendCertsFromPEM(text) {
			return doc.Errorf(at("ca"), "%s holds no certificate in PEM form", s.CA)
		}
	}
	for n, p := range s.Pins {
		text, ok := strings.CutPrefix(p, "sha256:")
		b, err := hex.DecodeString(text)
		if !ok || err != nil || len(b) != sha256.Size {
			return doc.Errorf(at("pins", n), "must be sha256: and 64 hex digits")
		}
		s.pins = append(s.pins, [32]byte(b))
	}
	return nil
}

// Server is the endpoint.
func (s *ServerConfig) Server() Server {
	return Server{Address: s.Address, Name: s.Name, Roots: s.roots, Pins: s.pins}
}
