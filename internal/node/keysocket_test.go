package node

import (
	"slices"
	"strings"
	"testing"
)

const handedOut = `volumes:
  - {id: one, name: data, device: /dev/vda}
  - {id: two, device: /dev/vdb, format: true, filesystem: ext4}
  - {id: own, device: /dev/vdc, mount: /own, filesystem: ext4}
  - {id: sw, device: /dev/vdd, kind: swap, format: true}
  - {id: opt, device: /dev/vde, optional: true}
  - {id: ` + longID + `, device: /dev/vdf}
  - {id: child, device: /dev/vdg, after: [own]}
`

const longID = "v23456789012345678901234567890123456789012345678901234567890123456789012345678x"

func TestTheKeySocketLeavesItsVolumesToSystemd(t *testing.T) {
	cfg, err := loadWith(t, "line /dev/vdx none keyagent,_netdev\n", handedOut+`key_socket:
  path: /run/keyagent/keys.sock
  drop_ins: true
  consumers:
    - {volume: one, unit: systemd-cryptsetup@data.service}
    - {volume: two, unit: 'systemd-cryptsetup@a\x2db.service'}
    - {volume: one, unit: vault.service, credential: key}
    - {volume: two, unit: vault.service, credential: other}
`)
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range cfg.Volumes {
		if want := v.ID == "one" || v.ID == "two"; v.OnRequest != want {
			t.Errorf("%s: on request: %v", v.ID, v.OnRequest)
		}
	}
	if got := cfg.HandedOut(); !slices.Equal(got, []string{"one", "two"}) {
		t.Errorf("%q", got)
	}
	if got := cfg.KeySocket.Paths(cfg.Volumes); !slices.Equal(got, []string{"/run/keyagent/keys.sock", "/run/cryptsetup-keys.d/data.key", "/run/cryptsetup-keys.d/two.key"}) {
		t.Errorf("%q", got)
	}
	cfg, err = loadWith(t, "", handedOut)
	if err != nil || len(cfg.KeySocket.Paths(cfg.Volumes))+len(cfg.HandedOut()) != 0 {
		t.Errorf("without a key socket: %+v, %v", cfg.KeySocket, err)
	}
}

func TestAKeySocketThatIsWrongIsNamed(t *testing.T) {
	const unit = "systemd-cryptsetup@data.service"
	for text, says := range map[string]string{
		"{path: /run/k}":   "consumers",
		"{drop_ins: true}": "consumers",
		"{consumers: [{volume: one, unit: " + unit + "}]}":                                                                      "key_socket.path",
		"{path: k, consumers: []}":                                                                                              "absolute path",
		"{path: /run/../k, consumers: []}":                                                                                      "plain absolute path",
		"{path: /run/keyagent/agent.sock, consumers: []}":                                                                       "local API",
		"{path: /" + strings.Repeat("k", 107) + "}":                                                                             "107 bytes",
		"{path: /k, more: 1}":                                                                                                   "more",
		"{path: /k, consumers: [{volume: one}]}":                                                                                "consumers[0].unit",
		"{path: /k, consumers: [{unit: " + unit + "}]}":                                                                         "consumers[0].volume",
		"{path: /k, consumers: [{volume: none, unit: " + unit + "}]}":                                                           "no volume",
		"{path: /k, consumers: [{volume: line, unit: " + unit + "}]}":                                                           "option keyagent",
		"{path: /k, consumers: [{volume: own, unit: " + unit + "}]}":                                                            "has a mount",
		"{path: /k, consumers: [{volume: sw, unit: " + unit + "}]}":                                                             "kind swap",
		"{path: /k, consumers: [{volume: opt, unit: " + unit + "}]}":                                                            "optional",
		"{path: /k, consumers: [{volume: one, unit: 'systemd-cryptsetup@*.service'}]}":                                          "exact name",
		"{path: /k, consumers: [{volume: one, unit: vault.socket}]}":                                                            "exact name",
		"{path: /k, consumers: [{volume: one, unit: a/b.service}]}":                                                             "exact name",
		"{path: /k, consumers: [{volume: one, unit: v.service, credential: a/b}]}":                                              "credential",
		"{path: /k, consumers: [{volume: one, unit: " + longID + ".service, credential: key}]}":                                 "cannot call",
		"{path: /k, consumers: [{volume: " + longID + ", unit: v.service}]}":                                                    "cannot call",
		"{path: /k, consumers: [{volume: one, unit: v.service, credential: k}, {volume: two, unit: v.service, credential: k}]}": "consumers[0] says the same",
		"{path: /k, consumers: [{volume: one, unit: v.service}, {volume: one, unit: v.service}]}":                               "consumers[0] says the same",
	} {
		cfg, err := loadWith(t, "line /dev/vdx none keyagent,_netdev\n", handedOut+"key_socket: "+text+"\n")
		if err == nil || !strings.Contains(err.Error(), says) || !strings.Contains(err.Error(), "key_socket") && !strings.Contains(text, "more") {
			t.Errorf("%s: %+v, %v", text, cfg, err)
		}
	}
	// What is opened at the start cannot need what systemd maps.
	_, err := loadWith(t, "", handedOut+"key_socket: {path: /k, consumers: [{volume: own, unit: v.service}]}\n")
	if err == nil || !strings.Contains(err.Error(), "mount") {
		t.Errorf("%v", err)
	}
	_, err = loadWith(t, "", "volumes: [{id: a, device: /dev/vda}, {id: b, device: /dev/vdb, after: [a]}]\nkey_socket: {path: /k, consumers: [{volume: a, unit: v.service}]}\n")
	if err == nil || !strings.Contains(err.Error(), "on request") {
		t.Errorf("%v", err)
	}
}
