package node

import (
	"fmt"
	"strings"

	"github.com/keyagent/keyagent/internal/pattern"
)

// refusedOptions are mount options that would lead data round the volume, lose what
// was acknowledged, or let somebody else decide. The text says why.
var refusedOptions = map[string]string{
	"bind": "another folder would be mounted, not the volume", "rbind": "another folder would be mounted, not the volume",
	"move": "another folder would be mounted, not the volume", "remount": "nothing is mounted there yet",
	"loop": "the mapping is a block device", "offset": "the mapping is used as a whole", "sizelimit": "the mapping is used as a whole",
	"encryption": "the volume is encrypted already", "user": "who mounts is decided by callers", "users": "who mounts is decided by callers",
	"owner": "who mounts is decided by callers", "group": "who mounts is decided by callers",
	"device": "data would go to a device that is not encrypted", "logdev": "data would go to a device that is not encrypted",
	"rtdev": "data would go to a device that is not encrypted", "journal_path": "data would go to a device that is not encrypted",
	"journal_dev": "data would go to a device that is not encrypted",
	"nobarrier":   "a power cut would lose what was acknowledged", "degraded": "a volume is one device",
}

// refusedValues are options that are fine with another value.
var refusedValues = map[string]string{
	"errors=continue": "a damaged filesystem must not be written: leave it out for errors=remount-ro",
	"barrier=0":       "a power cut would lose what was acknowledged",
}

var plainOption = pattern.New(`^[A-Za-z0-9][A-Za-z0-9_.:+@%/=-]{0,254}$`)

// selinuxOption is a context of SELinux, which kubelet writes with quotes and commas.
var selinuxOption = pattern.New(`^(context|fscontext|defcontext|rootcontext)="[A-Za-z0-9_.:,-]{1,240}"$`)

// CheckOption accepts a mount option, as mount(8) knows it, that does no harm here.
func CheckOption(o string) error {
	if selinuxOption.MatchString(o) {
		return nil
	}
	if !plainOption.MatchString(o) {
		return fmt.Errorf("%.40q is not one mount option: letters, digits, and = with a value", o)
	}
	name, _, _ := strings.Cut(o, "=")
	if why, no := refusedOptions[name]; no {
		return fmt.Errorf("%q is refused: %s", o, why)
	}
	if why := refusedValues[o]; why != "" {
		return fmt.Errorf("%q is refused: %s", o, why)
	}
	return nil
}
