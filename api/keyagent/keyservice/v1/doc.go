// Package keyservicev1 is the key service's API: the generated messages, and the
// encoding that binds a sealed key to the response that it came in.
package keyservicev1
