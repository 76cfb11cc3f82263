package intel

import (
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"math/big"
	"time"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation/endorsement"
)

// Object is a JSON object that a test may change before it is signed.
type Object = map[string]any

const (
	lifetime = 30 * 24 * time.Hour
	zeros48  = "000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000"
)

// Level is an entry of tcbLevels in TCB info.
func Level(status string, pcesvn int, sgx, tdx [16]byte, advisories ...string) Object {
	components := func(svns [16]byte) (out []Object) {
		for _, s := range svns {
			out = append(out, Object{"svn": s})
		}
		return out
	}
	return Object{
		"tcb":     Object{"sgxtcbcomponents": components(sgx), "pcesvn": pcesvn, "tdxtcbcomponents": components(tdx)},
		"tcbDate": "2024-03-13T00:00:00Z", "tcbStatus": status, "advisoryIDs": advisories,
	}
}

// ModuleLevel is an entry of tcbLevels of a module or a quoting enclave.
func ModuleLevel(status string, svn int, advisories ...string) Object {
	return Object{"tcb": Object{"isvsvn": svn}, "tcbDate": "2024-03-13T00:00:00Z", "tcbStatus": status, "advisoryIDs": advisories}
}

// TCBInfo is what the service says of platforms with an FMSPC. By it the default
// machine and fields are up to date.
func (w *World) TCBInfo(fmspc string, change func(Object)) endorsement.Document {
	info := Object{
		"id": "TDX", "version": 3, "issueDate": w.Now, "nextUpdate": w.Now.Add(lifetime),
		"fmspc": fmspc, "pceId": "0000", "tcbType": 0, "tcbEvaluationDataNumber": 17,
		"tdxModule": Object{"mrsigner": zeros48, "attributes": "0000000000000000", "attributesMask": "FFFFFFFFFFFFFFFF"},
		"tdxModuleIdentities": []Object{{
			"id": "TDX_01", "mrsigner": zeros48, "attributes": "0000000000000000", "attributesMask": "FFFFFFFFFFFFFFFF",
			"tcbLevels": []Object{ModuleLevel("UpToDate", 5), ModuleLevel("OutOfDate", 2, "INTEL-SA-01036")},
		}},
		"tcbLevels": []Object{
			Level("UpToDate", 13, [16]byte{8, 8, 2, 2, 4, 1, 0, 5}, [16]byte{5, 0, 6}),
			Level("OutOfDate", 5, [16]byte{5, 5, 2, 2, 3, 1, 0, 3}, [16]byte{3, 0, 5}, "INTEL-SA-00960", "INTEL-SA-00982"),
		},
	}
	if change != nil {
		change(info)
	}
	return w.document("tcbInfo", info)
}

// QEIdentity is what the service says of the quoting enclave.
func (w *World) QEIdentity(change func(Object)) endorsement.Document {
	id := Object{
		"id": "TD_QE", "version": 2, "issueDate": w.Now, "nextUpdate": w.Now.Add(lifetime), "tcbEvaluationDataNumber": 17,
		"miscselect": "00000000", "miscselectMask": "FFFFFFFF",
		"attributes": "11000000000000000000000000000000", "attributesMask": "FBFFFFFFFFFFFFFF0000000000000000",
		"mrsigner": hex.EncodeToString(qeSigner), "isvprodid": 2,
		"tcbLevels": []Object{ModuleLevel("UpToDate", 6), ModuleLevel("OutOfDate", 4, "INTEL-SA-00837")},
	}
	if change != nil {
		change(id)
	}
	return w.document("enclaveIdentity", id)
}

// document signs one part with the world's signing key.
func (w *World) document(part string, content Object) endorsement.Document {
	raw := must(json.Marshal(content))
	signature := must(sign(w.Signing.Key, raw))
	body := must(json.Marshal(map[string]any{part: json.RawMessage(raw), "signature": hex.EncodeToString(signature)}))
	return endorsement.Document{Body: body, Chain: PEM(w.Signing.Certificate, w.Root.Certificate)}
}

// CRL is an authority's revocation list, from the world's time for a lifetime.
func (w *World) CRL(issuer Authority, revoked ...*x509.Certificate) []byte {
	list := &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: w.Now, NextUpdate: w.Now.Add(lifetime)}
	for _, c := range revoked {
		list.RevokedCertificateEntries = append(list.RevokedCertificateEntries,
			x509.RevocationListEntry{SerialNumber: c.SerialNumber, RevocationTime: w.Now, ReasonCode: 1})
	}
	return must(x509.CreateRevocationList(rand.Reader, list, issuer.Certificate, issuer.Key))
}

// PCKCRL is the list of a PCK CA, with its chain.
func (w *World) PCKCRL(ca string, revoked ...*x509.Certificate) endorsement.Document {
	issuer := w.Platform
	if ca == "processor" {
		issuer = w.Processor
	}
	return endorsement.Document{Body: w.CRL(issuer, revoked...), Chain: PEM(issuer.Certificate, w.Root.Certificate)}
}

// Collateral is everything that the service says of a machine.
func (m *Machine) Collateral() *attestv1.TDXCollateral {
	w := m.World
	tcb, qe, crl := w.TCBInfo(m.Platform.FMSPC, nil), w.QEIdentity(nil), w.PCKCRL(m.Platform.CA)
	return &attestv1.TDXCollateral{
		TcbInfo: tcb.Body, TcbInfoChain: tcb.Chain, QeIdentity: qe.Body, QeIdentityChain: qe.Chain,
		PckCrl: crl.Body, PckCrlChain: crl.Chain, RootCrl: w.CRL(w.Root),
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err) // only signing and encoding of our own structures
	}
	return v
}
