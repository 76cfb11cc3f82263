// Package keyclient is a node's side of the key service: attested sessions with
// one of several endpoints, retries within a budget, and the classes of what can
// go wrong. It knows no disks, so the Kubernetes plugin links it too.
//
// There are two links to the service. Keys travel on one that ends soon after the
// last unlock, because who keeps a recording of it and later reads this machine's
// memory must not open the keys in it. Leases are renewed on the other one, which
// never carries a key and lives as long as a volume is open.
package keyclient
