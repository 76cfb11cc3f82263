// Package node is what a machine is told about itself: which key service it asks,
// with which evidence, who may use its local API, and which volumes it has. The
// configuration file is one source of volumes; callers of the local API are
// another, within what the file allows. A [Volume] is checked the same way
// wherever it comes from.
package node
