// Package tdx attests a trust domain (TD) of Intel TDX: what it was built from,
// what booted in it, and that its processor and firmware are ones that Intel's
// provisioning certification service vouches for.
//
// # What the evidence is
//
// A quote of version 4 or 5 whose report data is the connection's binder, the
// certificate chain of the platform's provisioning certification key (PCK) that
// the quote holds, Intel's collateral (TCB info, identity of the quoting enclave,
// two revocation lists), and the firmware's event log (CCEL), which explains
// RTMR0 to RTMR2. The format and the order of the checks are specified in
// docs/spec/tdx-evidence.md.
//
// # What the verifier never does
//
// It never goes without collateral or revocation lists, never takes the root
// that came with the evidence, and never uses an event that does not replay to a
// quoted value. It decides nothing that is a matter of taste: how up to date a
// platform is, debug, minimum versions are facts for the policy, under Intel's
// names. Only what Intel revoked is refused here.
//
// # Why not go-tdx-guest's verifier
//
// Its package pcs (formats and addresses of Intel's service) and its constants
// are used here, and its verifier is the oracle of a differential test. It is not
// used in production because it knows quotes of version 4 and the CA for
// platforms only, accepts nothing but UpToDate so that a policy has no say, leaves
// collateral and revocation off unless asked, does not look at issue dates, judges
// a TDX 1.5 module by the signer of another, and repeats about twenty P-256
// verifications for each quote of a machine that comes back every few minutes.
package tdx

import (
	"crypto/x509"
	_ "embed"
	"encoding/pem"
	"errors"
	"fmt"

	"github.com/keyagent/keyagent/attestation"
)

// The bounds of what a peer may send, in bytes. A Frame of attestation/atls is
// bounded as well; these are per part.
const (
	maxQuote    = 32 << 10
	maxEventLog = 512 << 10
	maxJSON     = 256 << 10
	maxCRL      = 512 << 10
	maxChain    = 16 << 10
)

// Each refusal has its own error; all wrap [attestation.ErrRefused].
var (
	ErrMalformed          = refusal("malformed TDX evidence")
	ErrUntrusted          = refusal("PCK certificate does not chain to a configured root")
	ErrExpired            = refusal("certificate is outside its validity")
	ErrRevoked            = refusal("revoked by Intel")
	ErrCRL                = refusal("revocation list is refused")
	ErrCollateral         = refusal("collateral is refused")
	ErrCollateralExpired  = refusal("collateral is outside its validity")
	ErrEndorsementMissing = fmt.Errorf("%w: collateral is missing", attestation.ErrUnendorsed)
	ErrQE                 = refusal("quoting enclave is not Intel's")
	ErrModule             = refusal("TDX module is not Intel's")
	ErrTCB                = refusal("TCB info does not describe this platform")
	ErrSignature          = refusal("quote signature does not verify")
	ErrReportData         = refusal("quote does not cover this connection")
	ErrEventLog           = refusal("event log is refused")
)

// ErrConfiguration means that a verifier was asked to work without a trust root:
// unset means refused.
var ErrConfiguration = errors.New("tdx verifier is not configured")

func refusal(text string) error { return fmt.Errorf("%w: %s", attestation.ErrRefused, text) }

// Trust is what a verifier believes in. The zero value believes in nothing, and
// a verifier refuses to start an exchange with it.
type Trust struct {
	// Roots sign the CAs of PCK certificates and of collateral. At least one.
	Roots []Root
}

// Root is a named certificate authority. Outside of tests there is one, [Intel].
type Root struct {
	Name        string
	Certificate *x509.Certificate
}

// intelRoot is "Intel SGX Root CA", from
// https://certificates.trustedservices.intel.com/Intel_SGX_Provisioning_Certification_RootCA.pem,
// with the SHA-256 of its DER in intelRootSHA256.
//
//go:embed intel_root.pem
var intelRoot []byte

// intelRootSHA256 is the fingerprint of the certificate that [Intel] returns.
const intelRootSHA256 = "44a0196b2b99f889b8e149e95b807a350e7424964399e885a7cbb8ccfab674d3"

// Intel returns Intel's root, under the name "intel".
func Intel() Root {
	block, _ := pem.Decode(intelRoot)
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		panic(err) // embedded, and a test holds its digest
	}
	return Root{Name: "intel", Certificate: cert}
}
