// Package kubernetes holds keyagent kubekms against Kubernetes' own code: the part of
// kube-apiserver that reads an EncryptionConfiguration and talks to plugins. It is a
// module of its own, so that nobody who imports keyagent gets its dependencies.
package kubernetes
