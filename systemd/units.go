package systemd

import "embed"

// Units are the unit files, in the folder "units". A package installs them in
// /usr/lib/systemd/system.
//
//go:embed units/*.service
var Units embed.FS
