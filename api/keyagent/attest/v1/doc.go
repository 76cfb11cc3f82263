// Package attestv1 holds the frames of the attestation exchange.
package attestv1
