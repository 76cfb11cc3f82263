//go:build tools

// Package csisanity pins csi-sanity.
package csisanity

import _ "github.com/kubernetes-csi/csi-test/v5/cmd/csi-sanity"
