// Package nodev1 is the agent's local API.
package nodev1
