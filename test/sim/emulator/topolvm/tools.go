//go:build tools

// Package topolvm pins TopoLVM.
package topolvm

import _ "github.com/topolvm/topolvm/cmd/hypertopolvm"
