package node

import (
	"fmt"

	"github.com/keyagent/keyagent/internal/unixsocket"
)

// Advice is what the configuration allows and seldom means, in sentences for people.
func (c *Config) Advice() []string {
	var out []string
	for i, one := range c.Callers {
		if one.UID != nil && *one.UID == unixsocket.Overflow {
			out = append(out, fmt.Sprintf("callers[%d]: %s", i, unixsocket.OverflowAdvice))
		}
	}
	return out
}
