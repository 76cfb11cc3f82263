package uki

// SmallUKI is an image with systemd-stub 255, a kernel and a command line.
func SmallUKI() []byte { return unified("#### LoaderInfo: systemd-stub 255 ####", "quiet") }
