// Package crash holds the guest's half of the tests that kill the agent: see
// crash_guest_test.go, which package e2e builds and boots in user-mode-linux.
package crash
