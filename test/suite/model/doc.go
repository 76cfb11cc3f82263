// Package model runs the formal model of a volume's life, docs/spec/volume-life.pml,
// through spin.
package model
