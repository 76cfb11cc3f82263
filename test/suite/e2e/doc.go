// Package e2e tests the whole product from outside: the real binary, its units,
// its files and its logs, in guests that boot measured (package lab), in a guest
// with a real dm-crypt (package uml), and as processes of this machine that are
// killed wherever they write. It holds no code but tests and their helpers.
package e2e
