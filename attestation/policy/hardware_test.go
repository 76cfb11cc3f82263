package policy

import (
	"bytes"
	"crypto/x509"
	"errors"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/test/sim/amd"
	"github.com/keyagent/keyagent/test/sim/intel"
)

// hexOf is size bytes of the same digit pair in hex.
func hexOf(pair string, size int) string { return strings.Repeat(pair, size) }

var (
	launch  = hexOf("a1", 48)
	chip    = hexOf("c1", 64)
	mrtd    = hexOf("d1", 48)
	rtmr0   = hexOf("10", 48)
	rtmr1   = hexOf("11", 48)
	seam    = hexOf("5e", 48)
	tee     = "05000600000000000000000000000000"
	nitro4  = hexOf("4a", 48)
	piid    = hexOf("9d", 16)
	hostDat = hexOf("4d", 32)
)

// hardware is a policy with a profile of each kind of machine.
var hardware = `version: 1
lifetime: 15m
trust:
  tpm:
    ak_roots:
      - {name: google, builtin: google}
  snp:
    roots:
      - {name: amd, builtin: amd}
  tdx:
    roots:
      - {name: intel, builtin: intel}
  nitro:
    roots:
      - {name: aws, builtin: aws}
profiles:
  - name: snp
    snp: &snp
      trust: ["root:amd"]
      products: [Milan]
      signers: [vcek]
      measurement: {accept: [` + launch + `]}
      min_tcb: {bootloader: 3, tee: 1, snp: 8, microcode: 115}
      chips: [` + chip + `]
      host_data: [` + hostDat + `]
  - name: tdx
    tdx: &tdx
      trust: ["root:intel"]
      tcb_status: [UpToDate]
      mrtd: {accept: [` + mrtd + `]}
      event_log: required
      rtmrs:
        - {rtmr: 0, accept: [` + rtmr0 + `]}
        - {rtmr: 1, accept: [` + rtmr1 + `], warn_only: true}
      mr_seam: {accept: [` + seam + `]}
      xfam: ["e700060000000000"]
      min_svn: {tee_tcb: "` + tee + `", qe: 3, pce: 13, tcb_evaluation: 17}
      platforms: [` + piid + `]
  - name: azure
    azure: {vms: [vm-1]}
    snp: *snp
    tpm: &vtpm
      trust: [azure]
      bank: sha256
      event_log: required
      pcrs: [{pcr: 4, accept: [` + good4 + `]}]
  - name: google
    tpm:
      <<: *vtpm
      trust: ["ak-root:google"]
      gce: {projects: [lab], zones: [z1], instances: [node]}
    tdx: *tdx
  - name: nitro
    nitro:
      trust: ["root:aws"]
      instances: [i-1]
      pcrs: [{pcr: 4, accept: [` + nitro4 + `]}]
grants:
  - {name: all, profiles: [snp, tdx, azure, google, nitro], volumes: ["*"], operations: [open]}
`

// plain is the policy without YAML's references, which are refused in a policy.
func plain(text string) string {
	// The file is short: each reference is written out by hand once.
	lines := strings.Split(text, "\n")
	blocks := map[string][]string{}
	var out []string
	for i := 0; i < len(lines); i++ {
		line := lines[i]
		if name, anchor, ok := strings.Cut(line, ": &"); ok {
			indent := len(name) - len(strings.TrimLeft(name, " "))
			for _, l := range lines[i+1:] {
				if len(l)-len(strings.TrimLeft(l, " ")) <= indent {
					break
				}
				blocks[anchor] = append(blocks[anchor], l)
			}
			out = append(out, name+":")
			continue
		}
		if key, anchor, ok := strings.Cut(line, ": *"); ok {
			if strings.TrimSpace(key) == "<<" {
				for _, l := range blocks[anchor] {
					if !strings.Contains(l, "trust:") {
						out = append(out, l)
					}
				}
				continue
			}
			out = append(append(out, key+":"), blocks[anchor]...)
			continue
		}
		out = append(out, line)
	}
	return strings.Join(out, "\n")
}

func snpClaims() attestation.Claims {
	c := attestation.Claims{
		Kind: attestation.SNP, Identity: "chip", Trust: "root:amd",
		Measurements: map[string]attestation.Measurement{"measurement": {Value: unhex(launch)}},
		Facts: map[string]any{
			"product": "Milan", "signer": "vcek", "chip_id": chip, "host_data": hostDat, "id_key_digest": "", "author_key_digest": "",
			"vmpl": uint64(0), "debug": false, "migration_agent": false, "smt_allowed": false, "single_socket": true, "cxl_allowed": false,
			"platform_alias_check_complete": true, "platform_ciphertext_hiding": true, "platform_rapl_disabled": true, "platform_tio": false, "unknown_bits": false,
		},
	}
	for _, when := range []string{"reported", "committed", "current", "launch"} {
		for part, svn := range map[string]uint64{"fmc": 0, "bootloader": 3, "tee": 1, "snp": 8, "microcode": 115} {
			c.Facts["tcb_"+when+"_"+part] = svn
		}
	}
	return c
}

func tdxClaims() attestation.Claims {
	zero := make([]byte, 48)
	return attestation.Claims{
		Kind: attestation.TDX, Identity: piid, Trust: "root:intel",
		Measurements: map[string]attestation.Measurement{
			"mrtd": {Value: unhex(mrtd)}, "rtmr0": {Value: unhex(rtmr0)}, "rtmr1": {Value: unhex(rtmr1)}, "rtmr2": {Value: zero}, "rtmr3": {Value: zero},
		},
		Facts: map[string]any{
			"tcb_status": "UpToDate", "mr_seam": seam, "mr_signer_seam": "", "seam_attributes": "", "event_log": true, "xfam": "e700060000000000", "td_attributes": "0000001000000000",
			"mr_config_id": "", "mr_owner": "", "mr_owner_config": "", "mr_service_td": "", "piid": piid, "ppid": hexOf("bb", 16),
			"tee_tcb_svn": tee, "qe_svn": uint64(3), "pce_svn": uint64(13), "tcb_evaluation_number": uint64(17),
			"debug": false, "migratable": false, "sept_ve_disable": true, "key_locker": false, "perfmon": false,
		},
	}
}

func azureClaims() []attestation.Claims {
	snp := snpClaims()
	snp.Via = attestation.Azure
	vtpm := claims()
	vtpm.Via, vtpm.Trust = attestation.Azure, "azure"
	return []attestation.Claims{
		{Kind: attestation.Azure, Identity: "vm-1", Facts: map[string]any{
			"vm_id": "vm-1", "secure_boot": true, "console_enabled": false, "token_verified": false}},
		snp, vtpm,
	}
}

func googleClaims() []attestation.Claims {
	vtpm := claims()
	vtpm.Trust = "ak-root:google"
	vtpm.Facts = map[string]any{"event_log": true, "gce_project_id": "lab", "gce_zone": "z1", "gce_instance_name": "node", "gce_production": true}
	return []attestation.Claims{vtpm, tdxClaims()}
}

func nitroClaims() []attestation.Claims {
	return []attestation.Claims{{Kind: attestation.Nitro, Identity: "i-1", Trust: "root:aws",
		Measurements: map[string]attestation.Measurement{"pcr4": {Value: unhex(nitro4)}}, Facts: map[string]any{"instance_id": "i-1"}}}
}

func TestEachKindOfMachineFitsItsProfile(t *testing.T) {
	p := parse(t, plain(hardware))
	for name, all := range map[string][]attestation.Claims{
		"snp": {snpClaims()}, "tdx": {tdxClaims()}, "azure": azureClaims(), "google": googleClaims(), "nitro": nitroClaims(),
	} {
		a, err := p.Appraise(verified(t, all...))
		// What fits a profile of one half fits it with the other half as well.
		if err != nil || (a.Profile != name && name != "google") {
			t.Errorf("%s: %+v, %v", name, a, err)
		}
	}
}

// Case 23, and every other field of a policy: the machine that differs in one is
// refused by the rule of that name.
func TestEachFieldOfHardwareThatDiffersIsNamed(t *testing.T) {
	p := parse(t, plain(hardware))
	fact := func(name string, value any) func(*attestation.Claims) {
		return func(c *attestation.Claims) { c.Facts[name] = value }
	}
	none := func(name string) func(*attestation.Claims) {
		return func(c *attestation.Claims) { delete(c.Facts, name) }
	}
	measure := func(name, value string) func(*attestation.Claims) {
		return func(c *attestation.Claims) { c.Measurements[name] = attestation.Measurement{Value: unhex(value)} }
	}
	type test struct {
		change func(*attestation.Claims)
		field  string
	}
	trust := func(c *attestation.Claims) { c.Trust = "root:other" }
	kinds := map[string]struct {
		claims func() []attestation.Claims
		at     int
		tests  []test
	}{
		"snp": {func() []attestation.Claims { return []attestation.Claims{snpClaims()} }, 0, []test{
			{trust, "snp.trust"},
			{fact("product", "Genoa"), "snp.product"}, {none("product"), "snp.product"},
			{fact("signer", "vlek"), "snp.signer"},
			{measure("measurement", hexOf("a2", 48)), "snp.measurement"}, {measure("measurement", hexOf("00", 48)), "snp.measurement"},
			{func(c *attestation.Claims) { c.Measurements = nil }, "snp.measurement"},
			{fact("vmpl", uint64(1)), "snp.vmpl"}, {none("vmpl"), "snp.vmpl"},
			{fact("chip_id", hexOf("c2", 64)), "snp.chip"}, {fact("chip_id", ""), "snp.chip"},
			{fact("host_data", ""), "snp.host_data"}, {fact("host_data", hexOf("4e", 32)), "snp.host_data"},
			{fact("id_key_digest", hexOf("1d", 48)), "snp.id_key"}, {fact("author_key_digest", hexOf("aa", 48)), "snp.author_key"},
			{none("id_key_digest"), "snp.id_key"},
			{fact("debug", true), "snp.debug"}, {none("debug"), "snp.debug"},
			{fact("smt_allowed", true), "snp.smt"}, {fact("single_socket", false), "snp.multi-socket"},
			{fact("migration_agent", true), "snp.migration-agent"}, {fact("cxl_allowed", true), "snp.cxl"},
			{fact("platform_alias_check_complete", false), "snp.alias-check-incomplete"}, {none("platform_alias_check_complete"), "snp.alias-check-incomplete"},
			{fact("platform_ciphertext_hiding", false), "snp.visible-ciphertext"}, {fact("platform_rapl_disabled", false), "snp.rapl"},
			{fact("platform_tio", true), "snp.trusted-io"},
			{fact("unknown_bits", true), "snp.unknown-bits"}, {none("unknown_bits"), "snp.unknown-bits"},
			{func(c *attestation.Claims) { c.Via = attestation.Azure }, "snp.via"},
		}},
		"tdx": {func() []attestation.Claims { return []attestation.Claims{tdxClaims()} }, 0, []test{
			{trust, "tdx.trust"},
			{fact("tcb_status", "OutOfDate"), "tdx.tcb_status"}, {fact("tcb_status", "Revoked"), "tdx.tcb_status"}, {none("tcb_status"), "tdx.tcb_status"},
			{measure("mrtd", hexOf("d2", 48)), "tdx.mrtd"}, {measure("rtmr0", hexOf("12", 48)), "tdx.rtmr0"},
			{measure("rtmr2", hexOf("12", 48)), "tdx.rtmr2"}, {measure("rtmr3", hexOf("13", 48)), "tdx.rtmr3"},
			{func(c *attestation.Claims) { delete(c.Measurements, "rtmr1") }, "tdx.rtmr1"},
			{fact("event_log", false), "tdx.event_log"},
			{func(c *attestation.Claims) {
				m := c.Measurements["rtmr0"]
				m.Unexplained = "the log leads elsewhere"
				c.Measurements["rtmr0"] = m
			}, "tdx.rtmr0.event_log"},
			{fact("mr_seam", hexOf("5f", 48)), "tdx.mr_seam"}, {fact("mr_signer_seam", hexOf("01", 48)), "tdx.mr_signer_seam"},
			{fact("seam_attributes", "0100000000000000"), "tdx.seam_attributes"},
			{fact("td_attributes", "0001001000000000"), "tdx.td_attributes"}, {none("td_attributes"), "tdx.td_attributes"},
			{fact("xfam", "ff00060000000000"), "tdx.xfam"},
			{fact("mr_config_id", hexOf("01", 48)), "tdx.mr_config_id"}, {fact("mr_owner", hexOf("01", 48)), "tdx.mr_owner"},
			{fact("mr_owner_config", hexOf("01", 48)), "tdx.mr_owner_config"}, {fact("mr_service_td", hexOf("01", 48)), "tdx.mr_service_td"},
			{fact("piid", hexOf("9e", 16)), "tdx.platform"},
			{fact("tee_tcb_svn", "0500050000000000ff00000000000000"), "tdx.svn.tee_tcb"}, {fact("tee_tcb_svn", ""), "tdx.svn.tee_tcb"},
			{fact("qe_svn", uint64(2)), "tdx.svn.qe"}, {fact("pce_svn", uint64(12)), "tdx.svn.pce"}, {fact("tcb_evaluation_number", uint64(16)), "tdx.svn.tcb_evaluation"},
			{fact("debug", true), "tdx.debug"}, {fact("migratable", true), "tdx.migration"}, {fact("sept_ve_disable", false), "tdx.sept-ve"},
			{fact("key_locker", true), "tdx.key-locker"}, {fact("perfmon", true), "tdx.perfmon"},
			{func(c *attestation.Claims) { c.Via = attestation.Azure }, "tdx.via"},
		}},
		"azure": {azureClaims, 0, []test{
			{fact("vm_id", "vm-2"), "azure.vm"}, {fact("secure_boot", false), "azure.no-secure-boot"}, {fact("console_enabled", true), "azure.console"},
		}},
		"azure's vTPM": {azureClaims, 2, []test{
			{trust, "trust"}, {measure("pcr4", good7), "pcr4"}, {func(c *attestation.Claims) { c.Via = "" }, "tpm.via"},
		}},
		"google's vTPM": {googleClaims, 0, []test{
			{trust, "trust"}, {fact("gce_project_id", "other"), "gce.project"}, {none("gce_project_id"), "gce.project"},
			{fact("gce_zone", "z2"), "gce.zone"}, {fact("gce_instance_name", "other"), "gce.instance"}, {fact("gce_production", false), "gce.production"},
		}},
		"nitro": {nitroClaims, 0, []test{
			{trust, "nitro.trust"}, {measure("pcr4", hexOf("4b", 48)), "nitro.pcr4"}, {fact("instance_id", "i-2"), "nitro.instance"},
		}},
	}
	for _, when := range []string{"reported", "committed", "current", "launch"} {
		for part, svn := range map[string]uint64{"bootloader": 2, "tee": 0, "snp": 7, "microcode": 114} {
			k := kinds["snp"]
			k.tests = append(k.tests, test{fact("tcb_"+when+"_"+part, svn), "snp.tcb." + when + "." + part},
				test{none("tcb_" + when + "_" + part), "snp.tcb." + when + "." + part})
			kinds["snp"] = k
		}
	}
	for name, k := range kinds {
		for i, tt := range k.tests {
			t.Run(name+" "+tt.field+" "+strconv.Itoa(i), func(t *testing.T) {
				all := k.claims()
				tt.change(&all[k.at])
				// Only the profile of this machine: another one may come closer.
				profile := strings.Split(strings.Split(name, "'")[0], " ")[0]
				n := slices.IndexFunc(p.profiles, func(pr Profile) bool { return pr.Name == profile })
				hard, _ := p.profiles[n].compare(verified(t, all...))
				if len(hard) != 1 || hard[0].Field != tt.field {
					t.Errorf("refused by %v", hard)
				}
				if a, err := p.Appraise(verified(t, all...)); err == nil && a.Profile == profile {
					t.Error("accepted")
				}
			})
		}
	}
}

// A register that is warn_only is warned of, and no more.
func TestAWarningOfHardwareDoesNotRefuse(t *testing.T) {
	c := tdxClaims()
	c.Measurements["rtmr1"] = attestation.Measurement{Value: bytes.Repeat([]byte{9}, 48)}
	a, err := parse(t, plain(hardware)).Appraise(verified(t, c))
	if err != nil || len(a.Warnings) != 1 || a.Warnings[0].Field != "tdx.rtmr1" {
		t.Errorf("%+v, %v", a, err)
	}
}

// Weaknesses are accepted where the profile names them.
func TestAWeaknessIsAcceptedWhereItIsNamed(t *testing.T) {
	weak := strings.Replace(plain(hardware), "      chips:", "      allow: [smt, multi-socket, migration-agent, cxl, alias-check-incomplete, visible-ciphertext, rapl, trusted-io, unknown-bits]\n      chips:", 1)
	c := snpClaims()
	for _, w := range snpWeaknesses {
		w.fact.Put(c.Facts, !w.safe)
	}
	if a, err := parse(t, weak).Appraise(verified(t, c)); err != nil || a.Profile != "snp" {
		t.Errorf("%+v, %v", a, err)
	}
	c.Facts["debug"] = true
	if _, err := parse(t, weak).Appraise(verified(t, c)); !errors.Is(err, ErrMismatch) {
		t.Errorf("debugging: %v", err)
	}
}

// Case 20: what is not set is an error of the file, or refuses.
func TestHardwareProfilesAreReadStrictly(t *testing.T) {
	good := plain(hardware)
	for _, tt := range []struct{ from, to, want string }{
		{"      trust: [\"root:amd\"]\n", "", "nobody vouches"},
		{"root:amd\"]", "root:intel\"]", "not in the trust section"},
		{"      products: [Milan]\n", "", "no product"},
		{"[Milan]", "[Naples]", "not known"},
		{"      signers: [vcek]\n", "", "neither vcek nor vlek"},
		{"signers: [vcek]", "signers: [vlek]", "name the clouds"},
		{"signers: [vcek]", "signers: [vcek]\n      csps: [aws]", "name the clouds"},
		{"measurement: {accept: [" + launch + "]}", "measurement: {accept: []}", "no value"},
		{"measurement: {accept: [" + launch + "]}", "measurement: {accept: [" + hexOf("00", 48) + "]}", "never measured"},
		{"measurement: {accept: [" + launch + "]}", "measurement: {accept: [" + launch + "], warn_only: true}", "warn_only"},
		{"measurement: {accept: [" + launch + "]}", "measurement: {accept: [aa]}", "96 lower-case hex"},
		{"      min_tcb: {bootloader: 3, tee: 1, snp: 8, microcode: 115}\n", "", "every version"},
		{"tee: 1, ", "", "number from 0 to 255"},
		{"products: [Milan]", "products: [Turin]", "number from 0 to 255"},
		{"      chips: [" + chip + "]\n", "", "any_chip: true"},
		{"      chips: [" + chip + "]\n", "      chips: [" + chip + "]\n      any_chip: true\n", "any_chip: true"},
		{"      host_data: [" + hostDat + "]\n", "      allow: [debug]\n", "not known"},
		{"      trust: [\"root:intel\"]\n", "", "nobody vouches"},
		{"      tcb_status: [UpToDate]\n", "", "no status"},
		{"[UpToDate]", "[Revoked]", "not known"},
		{"      mrtd: {accept: [" + mrtd + "]}\n", "", "no value"},
		{"      event_log: required\n", "", "required or optional"},
		{"{rtmr: 0, accept: [" + rtmr0 + "]}", "{rtmr: 4, accept: [" + rtmr0 + "]}", "number from 0 to 3"},
		{"{rtmr: 0, accept: [" + rtmr0 + "]}", "{rtmr: 1, accept: [" + rtmr0 + "]}", "named twice"},
		{"{rtmr: 0, accept: [" + rtmr0 + "]}", "{rtmr: 0, accept: [" + hexOf("00", 48) + "]}", "never measured"},
		{"      mr_seam: {accept: [" + seam + "]}\n", "", "no value"},
		{"      xfam: [\"e700060000000000\"]\n", "", "no value"},
		{"      min_svn: {tee_tcb: \"" + tee + "\", qe: 3, pce: 13, tcb_evaluation: 17}\n", "", "every version"},
		{", tcb_evaluation: 17", "", "number from 0"},
		{"      platforms: [" + piid + "]\n", "", "any_platform: true"},
		{"  - name: google\n", "  - name: google\n    azure: {any_vm: true}\n", "must be optional"},
		{"azure: {vms: [vm-1]}", "azure: {}", "any_vm: true"},
		{"azure: {vms: [vm-1]}", "azure: {any_vm: true, token: required}", "trust.azure"},
		{"azure: {vms: [vm-1]}", "azure: {any_vm: true, allow: [everything]}", "not known"},
		{"azure: {vms: [vm-1]}", "svsm: {}", "not in the trust section"},
		{"trust: [azure]", "trust: [\"ak-root:google\"]", "not in the trust section"},
		{"      gce: {projects: [lab], zones: [z1], instances: [node]}\n", "", "must name its projects"},
		{"projects: [lab], ", "", "no project"},
		{"projects: [lab]", "projects: [lab, \"\"]", "must not be empty"},
		{"zones: [z1]", "zones: [\"\"]", "must not be empty"},
		{"zones: [z1]", "zones: []", "leave it out"},
		{"instances: [node]", "instances: [\"\"]", "must not be empty"},
		{"instances: [node]", "instances: []", "leave it out"},
		{"vms: [vm-1]", "vms: [\"\"]", "must not be empty"},
		{"instances: [i-1]", "instances: [\"\"]", "must not be empty"},
		{"      instances: [i-1]\n", "", "any_instance: true"},
		{"pcrs: [{pcr: 4, accept: [" + nitro4 + "]}]", "pcrs: []", "no register"},
		{"{name: google, builtin: google}", "{name: google, file: /dev/null}", "no certificate"},
		{"{name: amd, builtin: amd}", "{name: amd, builtin: intel}", "not built in"},
		{"{name: amd, builtin: amd}", "{name: amd}", "needs either"},
		{"{name: amd, builtin: amd}", "{name: amd, builtin: amd, pem: x}", "needs either"},
	} {
		changed := strings.Replace(good, tt.from, tt.to, 1)
		if changed == good {
			t.Errorf("%q is not in the policy", tt.from)
			continue
		}
		if _, err := Parse(Builtin(), "policy.yaml", []byte(changed)); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%q for %q: %v does not say %q", tt.to, tt.from, err, tt.want)
		}
	}
}

// What is asked for is what some profile can use.
func TestAMachineIsAskedForWhatAProfileDemands(t *testing.T) {
	p := parse(t, plain(hardware))
	for _, tt := range []struct{ offered, ask []attestation.Kind }{
		{[]attestation.Kind{"snp"}, []attestation.Kind{"snp"}},
		{[]attestation.Kind{"snp", "tpm"}, []attestation.Kind{"snp"}},
		{[]attestation.Kind{"tpm", "tdx"}, []attestation.Kind{"tdx", "tpm"}},
		{[]attestation.Kind{"azure"}, []attestation.Kind{"azure"}},
		{[]attestation.Kind{"azure", "snp", "tpm"}, []attestation.Kind{"azure"}},
		{[]attestation.Kind{"nitro", "snp"}, []attestation.Kind{"snp", "nitro"}},
		{[]attestation.Kind{"tpm"}, nil},
		{[]attestation.Kind{"made-up"}, nil},
		{nil, nil},
	} {
		ask, err := p.Demand(tt.offered)
		if !slices.Equal(ask, tt.ask) || (err == nil) != (len(tt.ask) > 0) || (err != nil && !errors.Is(err, attestation.ErrRefused)) {
			t.Errorf("of %v: asks %v, %v", tt.offered, ask, err)
		}
	}
}

// An authority that could vouch for nothing is an error of the file, and not of
// every exchange later on.
func TestAnAuthorityInPEMIsWhole(t *testing.T) {
	milan, other := authority(t, "Milan", false), authority(t, "Genoa", true)
	for name, tt := range map[string]struct {
		certs []*x509.Certificate
		want  string
	}{
		"root and both below it":     {[]*x509.Certificate{milan.ARK, milan.ASK, milan.ASVK}, ""},
		"root and one, in any order": {[]*x509.Certificate{milan.ASVK, milan.ARK}, ""},
		"the root alone":             {[]*x509.Certificate{milan.ARK}, "needs an ARK and"},
		"no root":                    {[]*x509.Certificate{milan.ASK, milan.ASVK}, "needs one ARK"},
		"two roots":                  {[]*x509.Certificate{milan.ARK, other.ARK, milan.ASK}, "needs one ARK"},
		"two of a kind":              {[]*x509.Certificate{milan.ARK, milan.ASK, milan.ASK}, "twice"},
		"what another root signed":   {[]*x509.Certificate{milan.ARK, other.ASK}, "is not signed by"},
	} {
		text := "      - name: amd\n        product: Milan\n        pem: |\n"
		for line := range strings.Lines(string(intel.PEM(tt.certs...))) {
			text += "          " + line
		}
		changed := strings.Replace(plain(hardware), "      - {name: amd, builtin: amd}\n", text, 1)
		if _, err := Parse(Builtin(), "policy.yaml", []byte(changed)); (err == nil) != (tt.want == "") || (err != nil && !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%s: %v does not say %q", name, err, tt.want)
		}
	}
}

func authority(t *testing.T, product string, forged bool) *amd.Authority {
	t.Helper()
	a, err := amd.New(amd.Options{Product: product, Forged: forged})
	if err != nil {
		t.Fatal(err)
	}
	return a
}
