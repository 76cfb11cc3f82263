package netns_test

import (
	"net"
	"os"
	"testing"

	"github.com/keyagent/keyagent/test/sim/netns"
)

func TestANetworkHasWhatATestGivesIt(t *testing.T) {
	if !netns.Inside() {
		netns.Enter(t, "WORD=said")
		return
	}
	netns.Tap(t, "tap0", "10.0.2.2/24")
	if _, err := net.InterfaceByName("tap0"); err != nil || os.Getenv("WORD") != "said" {
		t.Errorf("%v; it was told %q", err, os.Getenv("WORD"))
	}
	l, err := net.Listen("tcp", "10.0.2.2:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
}
