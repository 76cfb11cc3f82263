package policy

import (
	"cmp"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/facts"
)

// TDXProfile holds reference values of a TDX quote. What is unset is refused: a
// list that is empty accepts only what is all zero, a runtime register that is
// not named must be unextended, and a weakness that Allow does not name is not
// accepted.
type TDXProfile struct {
	Trust     []string `yaml:"trust"`      // "root:NAME"
	TCBStatus []string `yaml:"tcb_status"` // by Intel's names
	MRTD      Values   `yaml:"mrtd"`
	RTMRs     []RTMR   `yaml:"rtmrs"`
	EventLog  string   `yaml:"event_log"` // required or optional
	MRSEAM    Values   `yaml:"mr_seam"`
	XFAM      []string `yaml:"xfam"`
	MinSVN    *TDXSVN  `yaml:"min_svn"`
	Platforms []string `yaml:"platforms,omitempty"` // PIID or PPID
	// PlatformsFile is a registry of further ones, such as a cloud publishes: one a line,
	// relative to the policy's folder.
	PlatformsFile string   `yaml:"platforms_file,omitempty"`
	AnyPlatform   bool     `yaml:"any_platform,omitempty"`
	MRConfigID    []string `yaml:"mr_config_id,omitempty"`
	MROwner       []string `yaml:"mr_owner,omitempty"`
	MROwnerConfig []string `yaml:"mr_owner_config,omitempty"`
	MRServiceTD   []string `yaml:"mr_service_td,omitempty"`
	Allow         []string `yaml:"allow,omitempty"`

	registered []string
}

// RTMR holds the reference values of one runtime register.
type RTMR struct {
	RTMR     *uint32             `yaml:"rtmr"`
	Accept   []string            `yaml:"accept"` // hex
	WarnOnly bool                `yaml:"warn_only,omitempty"`
	EventLog string              `yaml:"event_log,omitempty"` // required or optional; default the profile's
	Source   string              `yaml:"source,omitempty"`    // for people
	Events   []attestation.Event `yaml:"events,omitempty"`    // explain a mismatch, decide nothing
}

// TDXSVN is the least security version of each part.
type TDXSVN struct {
	TEETCB        string  `yaml:"tee_tcb"` // 16 bytes in hex, each a minimum of its own
	QE            *uint64 `yaml:"qe"`
	PCE           *uint64 `yaml:"pce"`
	TCBEvaluation *uint64 `yaml:"tcb_evaluation"` // of Intel's TCB info
}

// tdxStatuses are those that may be accepted. Revoked never is.
var tdxStatuses = []string{"UpToDate", "SWHardeningNeeded", "ConfigurationNeeded", "ConfigurationAndSWHardeningNeeded",
	"OutOfDate", "OutOfDateConfigurationNeeded"}

var tdxWeaknesses = []weakness{
	{"migration", facts.TDXMigratable, false},
	{"sept-ve", facts.TDXSEPTVEDisable, true},
	{"key-locker", facts.TDXKeyLocker, false},
	{"perfmon", facts.TDXPerfmon, false},
}

// Check implements Section.
func (t *TDXProfile) Check(c *Checker, pr *Profile, at Path) {
	c.Demand(pr.SNP() == nil || pr.Azure() != nil, "no machine has both SNP and TDX", at...)
	c.Vouchers(t.Trust, namesOf("root:", c.trust.TDX().Roots), at.To("trust"))
	c.Demand(len(t.TCBStatus) > 0, "empty: no status would be accepted", at.To("tcb_status")...)
	c.OneOf(t.TCBStatus, tdxStatuses, at.To("tcb_status"))
	t.MRTD.check(c, 48, at.To("mrtd"))
	c.Demand(!t.MRTD.WarnOnly, "must not be warn_only: nothing else says what firmware runs", at.To("mrtd")...)
	t.MRSEAM.check(c, 48, at.To("mr_seam"))
	c.Demand(!t.MRSEAM.WarnOnly, "must not be warn_only: the module is what keeps the host out", at.To("mr_seam")...)
	c.Demand(t.EventLog == "required" || t.EventLog == "optional", "must be required or optional", at.To("event_log")...)
	c.Demand(pr.Azure() == nil || t.EventLog != "required", "must be optional: on Azure the vTPM's log is the only one", at.To("event_log")...)
	t.checkRTMRs(c, at.To("rtmrs"))
	c.Demand(len(t.XFAM) > 0, "empty: no value would be accepted", at.To("xfam")...)
	c.Hexes(t.XFAM, 8, at.To("xfam"))
	t.registry(c, at.To("platforms_file"))
	c.ListOrAny(append(t.Platforms[:len(t.Platforms):len(t.Platforms)], t.registered...), t.AnyPlatform, "any_platform", at.To("platforms"))
	c.Hexes(t.Platforms, 16, at.To("platforms"))
	c.Hexes(t.MRConfigID, 48, at.To("mr_config_id"))
	c.Hexes(t.MROwner, 48, at.To("mr_owner"))
	c.Hexes(t.MROwnerConfig, 48, at.To("mr_owner_config"))
	c.Hexes(t.MRServiceTD, 48, at.To("mr_service_td"))
	c.OneOf(t.Allow, words(tdxWeaknesses), at.To("allow"))
	if t.MinSVN == nil {
		c.Fail("missing: every version of the firmware would be accepted", nil, at.To("min_svn")...)
		return
	}
	c.Demand(isHex(t.MinSVN.TEETCB, 16), "must be 32 lower-case hex digits", at.To("min_svn", "tee_tcb")...)
	c.Set(t.MinSVN.QE, 65535, at.To("min_svn", "qe"))
	c.Set(t.MinSVN.PCE, 65535, at.To("min_svn", "pce"))
	c.Set(t.MinSVN.TCBEvaluation, 1<<31, at.To("min_svn", "tcb_evaluation"))
}

func (t *TDXProfile) checkRTMRs(c *Checker, at Path) {
	seen := map[uint32]bool{}
	for n, r := range t.RTMRs {
		if r.RTMR == nil || *r.RTMR > 3 {
			c.Fail("must be a number from 0 to 3", nil, at.To(n, "rtmr")...)
			return
		}
		c.Demand(!seen[*r.RTMR], "is named twice", at.To(n, "rtmr")...)
		seen[*r.RTMR] = true
		c.Demand(r.EventLog == "" || r.EventLog == "required" || r.EventLog == "optional", "must be required or optional", at.To(n, "event_log")...)
		(&Values{Accept: r.Accept}).check(c, 48, at.To(n))
	}
}

// Compare implements Section.
func (t *TDXProfile) Compare(d *Differences, claims attestation.Claims) {
	d.Trust("tdx.trust", t.Trust)
	d.Text("tdx.tcb_status", facts.TDXTCBStatus, t.TCBStatus)
	d.Values("tdx.mrtd", "mrtd", t.MRTD, nil)
	d.Text("tdx.mr_seam", facts.TDXMRSEAM, t.MRSEAM.Accept)
	// Intel's own module has neither a signer nor attributes.
	d.Text("tdx.mr_signer_seam", facts.TDXMRSignerSEAM, nil)
	d.Text("tdx.seam_attributes", facts.TDXSEAMAttributes, nil)
	t.compareLog(d, claims)
	t.compareRTMRs(d)
	d.Text("tdx.xfam", facts.TDXXFAM, t.XFAM)
	d.Text("tdx.mr_config_id", facts.TDXMRConfigID, t.MRConfigID)
	d.Text("tdx.mr_owner", facts.TDXMROwner, t.MROwner)
	d.Text("tdx.mr_owner_config", facts.TDXMROwnerConfig, t.MROwnerConfig)
	d.Text("tdx.mr_service_td", facts.TDXMRServiceTD, t.MRServiceTD)
	if !t.AnyPlatform {
		t.comparePlatform(d, claims)
	}
	t.compareSVNs(d)
	d.Flag("tdx.debug", facts.Debug, false)
	t.compareAttributes(d)
	d.weaknesses("tdx", tdxWeaknesses, t.Allow)
}

// compareLog demands that the log leads to each register that needs it.
func (t *TDXProfile) compareLog(d *Differences, claims attestation.Claims) {
	if hasLog, _ := facts.EventLog.Of(claims); t.EventLog == "required" && !hasLog {
		d.Refuse("tdx.event_log", []string{"an event log"}, cmp.Or(text(claims, facts.EventLogError), "none"))
		return
	}
	for _, r := range t.RTMRs {
		d.explained("tdx.", fmt.Sprintf("rtmr%d", *r.RTMR), r.EventLog, t.EventLog, r.WarnOnly)
	}
}

// knownAttributes are the bits of a TD's attributes that have a fact of their own:
// those of debugging and profiling, LASS, SEPT_VE_DISABLE, MIGRATABLE, PKS, KL and
// PERFMON. What another one would mean, nobody has looked at.
const knownAttributes = 0xff | 1<<27 | 1<<28 | 1<<29 | 1<<30 | 1<<31 | 1<<63

func (t *TDXProfile) compareAttributes(d *Differences) {
	text, _ := facts.TDXAttributes.Of(d.claims)
	bits, err := hex.DecodeString(text)
	if err != nil || len(bits) != 8 || binary.LittleEndian.Uint64(bits)&^uint64(knownAttributes) != 0 {
		d.Refuse("tdx.td_attributes", []string{"no bits that are not known here"}, text)
	}
}

func (t *TDXProfile) compareRTMRs(d *Differences) {
	named := map[string]RTMR{}
	for _, r := range t.RTMRs {
		named[fmt.Sprintf("rtmr%d", *r.RTMR)] = r
	}
	for n := range 4 {
		register := fmt.Sprintf("rtmr%d", n)
		if r, ok := named[register]; ok {
			d.Values("tdx."+register, register, Values{Accept: r.Accept, WarnOnly: r.WarnOnly}, r.Events)
			continue
		}
		if got, ok := d.claims.Measurements[register]; !ok || !unextended(hex.EncodeToString(got.Value)) {
			d.Refuse("tdx."+register, []string{"unextended, since the profile does not name it"}, hex.EncodeToString(got.Value))
		}
	}
}

// maxRegistry bounds a registry of platforms in bytes: of some hundred thousand.
const maxRegistry = 4 << 20

// registry reads the file of platforms: one PIID or PPID a line, in hex of either case;
// what follows a # is a comment.
func (t *TDXProfile) registry(c *Checker, at Path) {
	if t.PlatformsFile == "" {
		return
	}
	data, err := c.read(t.PlatformsFile)
	if err == nil && len(data) > maxRegistry {
		err = fmt.Errorf("it has more than %d bytes", maxRegistry)
	}
	if err != nil {
		c.Fail("%w", []any{err}, at...)
		return
	}
	n := 0
	for line := range strings.Lines(string(data)) {
		n++
		id, _, _ := strings.Cut(line, "#")
		if id = strings.ToLower(strings.TrimSpace(id)); id == "" {
			continue
		}
		if !isHex(id, 16) {
			c.Fail("line %d: must be 32 hex digits", []any{n}, at...)
			return
		}
		t.registered = append(t.registered, id)
	}
	c.Demand(len(t.registered) > 0, "the file names no platform", at...)
}

// Raw is what the registry says: it is part of the policy's hash.
func (t *TDXProfile) Raw() [][]byte {
	if len(t.registered) == 0 {
		return nil
	}
	return [][]byte{[]byte(strings.Join(t.registered, "\n"))}
}

// comparePlatform demands a platform of the list, by the name of the machine (PIID) or
// of its processor (PPID).
func (t *TDXProfile) comparePlatform(d *Differences, claims attestation.Claims) {
	piid, _ := facts.TDXPIID.Of(claims)
	ppid, _ := facts.TDXPPID.Of(claims)
	for _, id := range []string{piid, ppid} {
		if id != "" && (slices.Contains(t.Platforms, id) || slices.Contains(t.registered, id)) {
			return
		}
	}
	expected := t.Platforms
	if len(t.registered) > 0 {
		expected = append(expected[:len(expected):len(expected)], fmt.Sprintf("one of %d in %s", len(t.registered), t.PlatformsFile))
	}
	d.Refuse("tdx.platform", expected, cmp.Or(piid, ppid, "nothing"))
}

func (t *TDXProfile) compareSVNs(d *Differences) {
	least, _ := hex.DecodeString(t.MinSVN.TEETCB)
	text, _ := facts.TDXTEETCBSVN.Of(d.claims)
	got, err := hex.DecodeString(text)
	ok := err == nil && len(got) == len(least)
	for i := 0; ok && i < len(least); i++ {
		ok = got[i] >= least[i]
	}
	if !ok {
		d.Refuse("tdx.svn.tee_tcb", []string{"at least " + t.MinSVN.TEETCB + ", each byte"}, text)
	}
	d.AtLeast("tdx.svn.qe", facts.TDXQESVN, *t.MinSVN.QE)
	d.AtLeast("tdx.svn.pce", facts.TDXPCESVN, *t.MinSVN.PCE)
	d.AtLeast("tdx.svn.tcb_evaluation", facts.TDXTCBEvaluation, *t.MinSVN.TCBEvaluation)
}

// Allowed says what the section leaves open.
func (t *TDXProfile) Allowed() (string, []string) { return every("platform", t.AnyPlatform), t.Allow }

// WarnOnly names the registers that only warn.
func (t *TDXProfile) WarnOnly() (out []string) {
	for _, r := range t.RTMRs {
		if r.WarnOnly {
			out = append(out, fmt.Sprintf("tdx.rtmr%d", *r.RTMR))
		}
	}
	return out
}
