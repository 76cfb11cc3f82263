// Package facts names what claims say besides measurements. A verifier writes a fact,
// a policy judges it: both use the constants here, so that a name that is misspelt, or
// a fact that is read as another type than it was written as, does not compile.
//
// A fact's name is what expressions of a policy and `keyagent evidence --output json`
// call it. It never changes, and is never used for anything else.
package facts

import "github.com/keyagent/keyagent/attestation"

// Fact is the name of a fact whose value is a T.
type Fact[T bool | string | uint64 | []string] string

// Of returns the fact's value in claims, and whether they have it.
func (f Fact[T]) Of(c attestation.Claims) (value T, ok bool) {
	value, ok = c.Facts[string(f)].(T)
	return value, ok
}

// Put sets the fact.
func (f Fact[T]) Put(set map[string]any, value T) { set[string(f)] = value }

// Facts of several kinds.
const (
	// Debug: the host may read the machine's memory.
	Debug Fact[bool] = "debug"
	// EventLog: a log of what was measured came along, and was replayed.
	EventLog Fact[bool] = "event_log"
	// EventLogError is why one that came along is of no use.
	EventLogError Fact[string] = "event_log_error"
)
