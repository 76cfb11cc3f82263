package node

import (
	"strings"
	"testing"

	"github.com/keyagent/keyagent/internal/unixsocket"
)

func TestACallerIsToldByUserAndControlGroup(t *testing.T) {
	user := uint32(990)
	c := &Config{Callers: []Caller{{UID: &user, Volumes: []string{"pvc-*"}, Operations: []string{"open"},
		Cgroup: []string{"/kubepods.slice/kubepods-*.slice/kubepods-*-pod7a.slice", "/system.slice/driver.service"}}}}
	const pod = "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod7a.slice"
	for name, tt := range map[string]struct {
		peer  unixsocket.Peer
		allow bool
	}{
		"the pod":                     {unixsocket.Peer{UID: 990, Cgroup: pod}, true},
		"a container of it":           {unixsocket.Peer{UID: 990, Cgroup: pod + "/cri-containerd-1f.scope"}, true},
		"the service":                 {unixsocket.Peer{UID: 990, Cgroup: "/system.slice/driver.service"}, true},
		"another user in the pod":     {unixsocket.Peer{UID: 0, Cgroup: pod}, false},
		"another pod":                 {unixsocket.Peer{UID: 990, Cgroup: strings.Replace(pod, "7a", "7b", 1)}, false},
		"a name that begins the same": {unixsocket.Peer{UID: 990, Cgroup: pod + "2"}, false},
		"the group above":             {unixsocket.Peer{UID: 990, Cgroup: "/kubepods.slice/kubepods-burstable.slice"}, false},
		"the root":                    {unixsocket.Peer{UID: 990, Cgroup: "/"}, false},
		"the same names further down": {unixsocket.Peer{UID: 990, Cgroup: "/user.slice" + pod}, false},
		"one that is not known":       {unixsocket.Peer{UID: 990}, false},
		"one that is no path":         {unixsocket.Peer{UID: 990, Cgroup: "kubepods.slice"}, false},
	} {
		if got := c.Allows(tt.peer, "open", "pvc-1"); got != tt.allow {
			t.Errorf("%s: %v", name, got)
		}
		if got := c.Knows(tt.peer); got != tt.allow {
			t.Errorf("%s is known: %v", name, got)
		}
		if c.Allows(tt.peer, "open", "other") || c.Allows(tt.peer, "close", "pvc-1") {
			t.Errorf("%s may do what no rule says", name)
		}
	}
}

// A rule that allows all else does not let a key out.
func TestNoOtherWordLetsAKeyOut(t *testing.T) {
	root := uint32(0)
	var all []string
	for _, op := range Operations {
		if op != GetDataKey {
			all = append(all, op)
		}
	}
	c := &Config{Callers: []Caller{{UID: &root, Operations: all, Volumes: []string{"*"}}}}
	if c.Allows(unixsocket.Peer{}, GetDataKey, "pvc-1") {
		t.Error("it does")
	}
	for _, wild := range []string{"*", "get-*", "all", ""} {
		if _, err := loadWith(t, "", "callers: [{uid: 0, operations: ['"+wild+"'], volumes: ['*']}]\n"); err == nil || !strings.Contains(err.Error(), "callers[0].operations[0]") {
			t.Errorf("the operation %q: %v", wild, err)
		}
	}
}

func TestCallersAndTheirSocketsAreReadStrictly(t *testing.T) {
	const keys = "callers: [{uid: 0, operations: [get-data-key], volumes: ['*']}]\n"
	for text, says := range map[string]string{
		"callers: [{uid: 0, cgroup: [kubepods.slice], operations: [open], volumes: ['*']}]": "callers[0].cgroup[0]",
		"callers: [{uid: 0, cgroup: [/], operations: [open], volumes: ['*']}]":              "below /",
		"callers: [{uid: 0, cgroup: [/a/../b], operations: [open], volumes: ['*']}]":        "callers[0].cgroup[0]",
		"callers: [{uid: 0, cgroup: [/a, '/[a'], operations: [open], volumes: ['*']}]":      "callers[0].cgroup[1]",
		"callers: [{cgroup: [/a], operations: [open], volumes: ['*']}]":                     "callers[0].uid",
		"constellation: {socket: /run/c.sock}":                                              "nobody could use it",
		keys + "constellation: {socket: c.sock}":                                            "constellation.socket",
		keys + "constellation: {socket: /run/../c.sock}":                                    "plain absolute path",
		keys + "constellation: {socket: /run/keyagent/agent.sock}":                          "another socket",
		keys + "constellation: {listen: 'tcp:0.0.0.0:9000'}":                                "listen",
	} {
		if _, err := loadWith(t, "", text+"\n"); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v", text, err)
		}
	}
	cfg, err := loadWith(t, "", keys+"constellation: {socket: /run/keyagent/c.sock}\n")
	if err != nil || cfg.Constellation.Socket != "/run/keyagent/c.sock" {
		t.Errorf("%+v, %v", cfg, err)
	}
}
