// Package kms is the API of Constellation's key service, which the agent serves to
// programs that were written for it. The names on the wire are Constellation's own, so
// that a program cannot link this package beside Constellation's: the registry of
// protobuf refuses two files of one name. Programs that are new use the Node API.
package kms
