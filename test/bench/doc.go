// Package bench holds the figures that compare keyagent with the least that
// would do the same job. docs/BENCHMARKS.md says how to read them.
package bench
