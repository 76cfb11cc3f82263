// Package initrd is what keyagent does before the root file system is there: it places
// its configuration into an initrd that is being built ([Install]), and there it opens
// volumes, with more patience than elsewhere ([Patience]).
package initrd
