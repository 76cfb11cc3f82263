// Package endorsement gets what vendors say of their hardware: certificates,
// revocation lists, TCB levels.
//
// A verifier that must ask a vendor at each boot has that vendor's outage. So the
// agent carries endorsements in its evidence, from where its platform keeps them,
// and a verifier asks only for what was not carried. Requests go through
// the layers of this package:
//
//	[HTTP]   one request: bounded in size and time, strict about the host
//	[Cache]  on disk, one request at a time for one name, a bounded wait, and
//	         no second request soon after one that failed
//
// Nothing here is trusted: endorsements are signed, and the packages of each kind
// verify them wherever they came from.
package endorsement

import (
	"context"
	"errors"
	"time"
)

// MaxDocument bounds one endorsement in bytes.
const MaxDocument = 1 << 20

// Document is one endorsement as its vendor sent it.
type Document struct {
	Body []byte
	// Chain is the issuer chain in PEM, if the vendor sends one beside the body.
	Chain []byte
}

// Request names an endorsement.
type Request struct {
	// Name is stable and safe as a file name: product, chip and TCB, or FMSPC and
	// authority. It is the key of a [Cache].
	Name string
	// URL is absolute.
	URL string
	// ChainHeader is the response's header with the issuer chain, or empty.
	ChainHeader string
	// Fresh reports whether a stored document still serves at now. Nil: it
	// always does, as what is named by its content does.
	Fresh func(d Document, now time.Time) bool
}

// Source gets endorsements. It is safe for concurrent use.
type Source interface {
	// Get returns the endorsement. An error wraps [ErrUnavailable] if asking
	// again later may help, or [ErrNotFound] if the vendor knows no such thing.
	Get(ctx context.Context, r Request) (Document, error)
}

// What can go wrong, for errors.Is.
var (
	// ErrUnavailable means that asking again later may help.
	ErrUnavailable = errors.New("endorsement is not to be had now")
	// ErrNotFound means that the vendor knows no such thing.
	ErrNotFound = errors.New("vendor has no such endorsement")
)
