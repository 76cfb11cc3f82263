// Package replicas runs several key services over one storage, and many attested nodes that
// ask them, while one after the other is killed.
package replicas
