package keysocket

import (
	"errors"
	"fmt"
	"strings"
)

// ErrUnit means that a process is not directly in the control group of a unit of the
// system.
var ErrUnit = errors.New("the caller is in no unit of the system")

// unitOf returns the unit that the text of /proc/PID/cgroup names. The unit is the last
// part of the path, and all parts above it are slices that lie in each other, from
// system.slice on: what a container makes lies below a scope or a service.
func unitOf(cgroup string) (string, error) {
	for line := range strings.Lines(cgroup) {
		path, unified := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "0::/")
		if !unified {
			continue // a hierarchy of version 1, which delegates worse
		}
		parts := strings.Split(path, "/")
		unit := parts[len(parts)-1]
		slices := parts[:len(parts)-1]
		if len(slices) == 0 || slices[0] != "system.slice" || !unitPart.MatchString(unit) || !strings.HasSuffix(unit, ".service") {
			return "", fmt.Errorf("%w: its control group is %.200q", ErrUnit, path)
		}
		for i, s := range slices[1:] {
			if !strings.HasSuffix(s, ".slice") || !strings.HasPrefix(s, strings.TrimSuffix(slices[i], ".slice")+"-") {
				return "", fmt.Errorf("%w: its control group is %.200q", ErrUnit, path)
			}
		}
		return unit, nil
	}
	return "", fmt.Errorf("%w: the kernel has no unified control groups", ErrUnit)
}
