package systemd

import "embed"

// Units are the unit files, in the folder "units". A package installs them in
// /usr/lib/systemd/system.
//
//go:embed units/*.service units/*.socket
var Units embed.FS
