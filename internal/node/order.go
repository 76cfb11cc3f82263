package node

import (
	"slices"
	"strings"
)

// Needs returns the IDs of the volumes that must be up before v: those that it
// names, and those whose mount point its own lies below. A volume that is mounted
// first would be hidden by the mount above it.
func Needs(all []Volume, v *Volume) []string {
	needs := slices.Clone(v.After)
	for i := range all {
		other := &all[i]
		if other.ID != v.ID && Below(v.Mount, other.Mount) && !slices.Contains(needs, other.ID) {
			needs = append(needs, other.ID)
		}
	}
	return needs
}

// Below reports whether path lies strictly below parent. Both are clean.
func Below(path, parent string) bool {
	return path != "" && parent != "" && strings.HasPrefix(path, strings.TrimSuffix(parent, "/")+"/")
}

// Order sorts volumes into stages: those of one stage need only volumes of earlier
// ones. stuck is a volume that waits for itself, or -1.
func Order(all []Volume) (stages [][]int, stuck int) {
	stage := map[string]int{}
	for len(stage) < len(all) {
		var now []int
		for i := range all {
			if _, done := stage[all[i].ID]; done {
				continue
			}
			ready := !slices.ContainsFunc(Needs(all, &all[i]), func(id string) bool { _, done := stage[id]; return !done })
			if ready {
				now = append(now, i)
			}
		}
		if len(now) == 0 {
			for i := range all {
				if _, done := stage[all[i].ID]; !done {
					return stages, i
				}
			}
		}
		for _, i := range now {
			stage[all[i].ID] = len(stages)
		}
		stages = append(stages, now)
	}
	return stages, -1
}
