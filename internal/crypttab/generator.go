package crypttab

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// Generator writes, into a folder that systemd reads before those of other generators,
// a unit for each of keyagent's lines. It has the name that systemd's own generator
// gives to the unit of the line: what waits for that one, as a target, a mount or an
// administrator's drop-in, waits for keyagent, and the program that would read the
// header from the disk and ask the console for a passphrase never runs.
type Generator struct {
	Crypttab string // path; one that is not there has no lines
	Program  string // keyagent's path
	Config   string // the agent's configuration
	Early    string // the folder
}

// Run writes the units. A line that is wrong has one too, which says so when it starts.
func (g *Generator) Run() error {
	data, err := os.ReadFile(g.Crypttab)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var failed []error
	for _, l := range Parse(data) {
		if err := os.WriteFile(filepath.Join(g.Early, UnitName(l.Name)), []byte(g.unit(&l)), 0o644); err != nil {
			failed = append(failed, fmt.Errorf("%s, line %d: %w", g.Crypttab, l.Number, err))
		}
	}
	return errors.Join(failed...)
}

// UnitName is the name of the unit that opens a mapping.
func UnitName(mapping string) string { return "systemd-cryptsetup@" + escape(mapping) + ".service" }

// DeviceUnit is the name of the unit of a device's path.
func DeviceUnit(path string) string { return escape(strings.TrimPrefix(path, "/")) + ".device" }

// escape writes a string as systemd does in the name of a unit: systemd.unit(5).
func escape(s string) string {
	var out strings.Builder
	for i := range len(s) {
		b := s[i]
		switch {
		case b == '/':
			out.WriteByte('-')
		case b >= '0' && b <= '9', b >= 'a' && b <= 'z', b >= 'A' && b <= 'Z', b == ':', b == '_', b == '.' && i > 0:
			out.WriteByte(b)
		default:
			fmt.Fprintf(&out, `\x%02x`, b)
		}
	}
	return out.String()
}

// quote writes a string as one word of a unit's command line, or as its description.
func quote(s string) string {
	var out strings.Builder
	out.WriteByte('"')
	for i := range len(s) {
		switch b := s[i]; {
		case b == '%', b == '$':
			out.WriteByte(b)
			out.WriteByte(b)
		case b < 0x20, b == 0x7f, b == '"', b == '\\':
			fmt.Fprintf(&out, `\x%02x`, b)
		default:
			out.WriteByte(b)
		}
	}
	out.WriteByte('"')
	return out.String()
}

func (g *Generator) unit(l *Line) string {
	needAgent := " --need-agent"
	order := `# The agent opens it. It is ready when all volumes are open that are not optional.
Wants=keyagent-agent.service
After=keyagent-agent.service
After=remote-fs-pre.target
`
	target := "remote-cryptsetup.target"
	if !l.Has("_netdev") {
		// What is ordered before the network cannot wait for an agent that needs it.
		// The line is wrong, and the unit shall say so at once.
		order, target, needAgent = "", "cryptsetup.target", ""
	}
	if !l.Has("nofail") {
		order += "Before=" + target + "\n"
	}
	// What is opened in the initrd carries the system itself, and is closed by what ends
	// after it, if at all.
	arguments := fmt.Sprintf("--config %s -- %s", quote(g.Config), quote(l.ID()))
	end, stop := "Conflicts=umount.target\n", "ExecStop="+g.Program+" close "+arguments+"\n"
	if l.Has("x-initrd.attach") {
		end, stop = "", ""
	}
	return `# Written by keyagent-generator.

[Unit]
Description=Encrypted volume ` + strings.Trim(quote(l.Name), `"`) + `, opened by keyagent
Documentation=man:keyagent-generator(1) man:crypttab(5)
SourcePath=` + g.Crypttab + `
DefaultDependencies=no
IgnoreOnIsolate=yes
After=cryptsetup-pre.target
` + order + `# What is mounted from it comes after it, and goes first.
Wants=blockdev@dev-mapper-%i.target
Before=blockdev@dev-mapper-%i.target
` + end + `Before=umount.target

[Service]
Type=oneshot
RemainAfterExit=yes
# Without an agent nobody would renew the volume's lease. One that was refused for good
# does not run: then this one tries until somebody has started it again.
ExecStart=` + g.Program + ` unlock` + needAgent + ` ` + arguments + `
` + stop + `# The key service is tried for as long as the agent's configuration says, and the
# agent's own unit says which refusals are final. A disk that is not there (11) may come.
TimeoutStartSec=infinity
Restart=on-failure
RestartSec=10s
RestartPreventExitStatus=2 3 5 6 7 8 9 12 13 14 15 17 18
StandardInput=null
StandardOutput=journal
StandardError=journal
`
}
