package initrd

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/keyagent/keyagent/internal/config"
)

// maxServers is what resolv.conf(5) knows.
const maxServers = 3

// maxLease bounds a file with what a network gave.
const maxLease = 64 << 10

// Resolver writes resolv.conf where nobody has: the initrd of initramfs-tools has only
// what ipconfig keeps of DHCP's answer, and systemd-networkd gives name servers to
// systemd-resolved, which is not there.
type Resolver struct {
	File     string   // resolv.conf
	IPConfig string   // glob of klibc's files, see ipconfig(8)
	Networkd string   // networkd's state file, see sd-network
	servers  []string // that were written
}

// DefaultResolver has the usual places.
func DefaultResolver() *Resolver {
	return &Resolver{File: "/etc/resolv.conf", IPConfig: "/run/net-*.conf", Networkd: "/run/systemd/netif/state"}
}

// Write writes the file, if it is not there, is a link that leads nowhere, or is what
// was written before, and if there are name servers. The network is the host's: an
// answer that is no address is passed over.
func (r *Resolver) Write() error {
	if _, err := os.Stat(r.File); err == nil && r.servers == nil {
		return nil
	}
	var servers []string
	files, _ := filepath.Glob(r.IPConfig)
	for _, f := range append(files, r.Networkd) {
		if text, err := config.ReadPublicFile(f, maxLease); err == nil {
			servers = append(servers, nameservers(string(text))...)
		}
	}
	slices.Sort(servers)
	servers = slices.Compact(servers)
	servers = servers[:min(len(servers), maxServers)]
	if len(servers) == 0 || slices.Equal(servers, r.servers) {
		return nil
	}
	text := "# Written by keyagent for the initrd.\n"
	for _, s := range servers {
		text += "nameserver " + s + "\n"
	}
	_ = os.Remove(r.File) // the link
	if err := os.WriteFile(r.File, []byte(text), 0o644); err != nil {
		return err
	}
	r.servers = servers
	return nil
}

// nameservers are the addresses in one of these files: IPV4DNS0='10.0.2.3' of ipconfig,
// DNS=10.0.2.3 fd00::3 of networkd.
func nameservers(text string) []string {
	var out []string
	for line := range strings.Lines(text) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		if name != "DNS" && name != "IPV4DNS0" && name != "IPV4DNS1" {
			continue
		}
		for word := range strings.FieldsSeq(strings.Trim(value, `'"`)) {
			// An unset one is 0.0.0.0, and a zone has no place in the file.
			if a, err := netip.ParseAddr(word); err == nil && !a.IsUnspecified() && a.Zone() == "" {
				out = append(out, a.String())
			}
		}
	}
	return out
}
