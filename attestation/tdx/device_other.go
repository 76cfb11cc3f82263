//go:build !linux

package tdx

import "errors"

var errNotLinux = errors.New("the device is Linux's")

func checkDevice(string) error { return errNotLinux }

func quoteByDevice(string, [64]byte) ([]byte, error) { return nil, errNotLinux }
