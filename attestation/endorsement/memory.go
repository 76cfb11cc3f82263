package endorsement

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"maps"
	"math/big"
	"path/filepath"
	"sync"
	"time"
)

// Memory is what verifiers have seen vendors say. Evidence carries its own endorsements,
// and an attester whose key was taken back would carry a list of the time before: what
// was once on a list stays revoked, and the newest of numbered documents is the one that
// counts. What comes in here was verified. It is safe for concurrent use; the zero value
// forgets when the process ends.
type Memory struct {
	mu      sync.Mutex
	store   *store
	revoked map[string]revocations // by authority
	newest  map[string]Document    // by name; its number stands before the body
}

// revocations are the times by the serial number in hex.
type revocations map[string]time.Time

// maxSeen bounds the files. Names are those of authorities and platforms that a root
// vouches for, of which there are some dozens.
const maxSeen = 4096

// OpenMemory returns a memory that is kept in a folder below dir.
func OpenMemory(dir string) (*Memory, error) {
	s, err := openStore(filepath.Join(dir, "seen"), maxSeen)
	if err != nil {
		return nil, fmt.Errorf("memory of endorsements: %w", err)
	}
	return &Memory{store: s}, nil
}

// Close closes its folder.
func (m *Memory) Close() error {
	if m.store == nil {
		return nil
	}
	return m.store.root.Close()
}

// Remember keeps what a list says that authority signed, whatever its dates. Lists of one
// authority that speak of different kinds of certificates add up.
func (m *Memory) Remember(authority *x509.Certificate, list *x509.RevocationList) {
	m.mu.Lock()
	defer m.mu.Unlock()
	name := authorityName(authority)
	known := m.known(name)
	before := len(known)
	for _, e := range list.RevokedCertificateEntries {
		if serial := e.SerialNumber.Text(16); known[serial].IsZero() {
			known[serial] = e.RevocationTime
		}
	}
	if m.store == nil || len(known) == before {
		return
	}
	// Another process may have this folder too, and have seen more.
	maps.Copy(known, m.stored(name))
	// A full disk costs what was seen now, after the next restart.
	if body, err := json.Marshal(known); err == nil && len(body) <= MaxDocument {
		_ = m.store.write(name, Document{Body: body})
	}
}

// Revoked says since when a certificate of an authority is revoked.
func (m *Memory) Revoked(authority *x509.Certificate, serial *big.Int) (since time.Time, ok bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	since, ok = m.known(authorityName(authority))[serial.Text(16)]
	return since, ok
}

func (m *Memory) known(name string) revocations {
	if r, ok := m.revoked[name]; ok {
		return r
	}
	r := m.stored(name)
	if m.revoked == nil {
		m.revoked = map[string]revocations{}
	}
	m.revoked[name] = r
	return r
}

// stored is what the folder has of an authority.
func (m *Memory) stored(name string) revocations {
	r := revocations{}
	if m.store == nil {
		return r
	}
	if d, ok := m.store.read(name); ok && json.Unmarshal(d.Body, &r) != nil || r == nil {
		return revocations{}
	}
	return r
}

// authorityName is that of a key and of its holder, so that lists of a CA whose
// certificate was made anew add up.
func authorityName(c *x509.Certificate) string {
	h := sha256.New()
	h.Write(binary.BigEndian.AppendUint32(nil, uint32(len(c.RawSubject))))
	h.Write(c.RawSubject)
	h.Write(c.RawSubjectPublicKeyInfo)
	return fmt.Sprintf("revoked-%x", h.Sum(nil)[:16])
}

// Newest returns the document with the highest number that was seen under a name, d
// among them, and whether that is d.
func (m *Memory) Newest(name string, number uint64, d Document) (Document, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	name = "newest-" + name
	best, ok := m.newest[name]
	// Before anything is written, what another process left in this folder counts too.
	if m.store != nil && (!ok || numberOf(best) < number) {
		if d, there := m.store.read(name); there && numberOf(d) >= numberOf(best) {
			best, ok = d, true
		}
	}
	if ok && len(best.Body) > 8 && numberOf(best) > number {
		m.keep(name, best)
		return Document{Body: best.Body[8:], Chain: best.Chain}, false
	}
	if !ok || len(best.Body) <= 8 || numberOf(best) < number {
		best = Document{Body: append(binary.BigEndian.AppendUint64(nil, number), d.Body...), Chain: bytes.Clone(d.Chain)}
		if m.store != nil && len(best.Body) <= MaxDocument && checkName(name) == nil {
			_ = m.store.write(name, best)
		}
	}
	m.keep(name, best)
	return d, true
}

// numberOf is what stands before the body of a document in memory.
func numberOf(d Document) uint64 {
	if len(d.Body) <= 8 {
		return 0
	}
	return binary.BigEndian.Uint64(d.Body)
}

func (m *Memory) keep(name string, d Document) {
	if m.newest == nil || len(m.newest) >= maxSeen {
		m.newest = map[string]Document{}
	}
	m.newest[name] = d
}
