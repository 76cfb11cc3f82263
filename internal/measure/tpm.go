package measure

import (
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/policy"
	"github.com/keyagent/keyagent/attestation/tpm"
	"github.com/keyagent/keyagent/attestation/tpm/uki"
	"github.com/keyagent/keyagent/internal/evidence"
	"github.com/keyagent/keyagent/internal/failure"
)

// tpmFiles are what the values of a TPM are made from.
type tpmFiles struct {
	boot   *uki.Boot // nil: neither an image nor a loader
	log    *tpm.EventLog
	hasLog bool // of the firmware
}

// separatingStub is the version of systemd whose initrd separates registers. The
// stub's version need not be the initrd's.
const separatingStub = 261

func (m *Request) openFiles() (*tpmFiles, error) {
	f := &tpmFiles{}
	if m.UKI != "" || len(m.Loaders) > 0 {
		f.boot = &uki.Boot{Profile: m.UKIProfile}
	}
	for _, path := range m.Loaders {
		l, err := uki.OpenLoader(path)
		if err != nil {
			return nil, failure.New(failure.Usage, err, "--event-log or --evidence of a boot that is trusted gives its registers")
		}
		f.boot.Loaders = append(f.boot.Loaders, l)
	}
	if m.UKI != "" {
		var err error
		if f.boot.Image, err = uki.Open(m.UKI); err != nil {
			return nil, failure.New(failure.Usage, err, "")
		}
	}
	if m.UserspaceLog != "" && (m.EventLog == "" && f.boot == nil) {
		return nil, failure.Newf(failure.Usage, "--event-log names the firmware's", "systemd's own log goes on where the firmware's ends, and there is none")
	}
	if m.UserspaceLog != "" && m.OSSeparator {
		return nil, failure.Newf(failure.Usage, "leave --os-separator out", "--userspace-log says whether the registers are separated")
	}
	return f, m.openLogs(f)
}

func (m *Request) openLogs(f *tpmFiles) error {
	f.log = &tpm.EventLog{}
	if m.EventLog != "" {
		data, err := evidence.ReadBounded(m.EventLog, tpm.MaxEventLog)
		if err != nil {
			return err
		}
		if f.log, err = tpm.ParseEventLog(data); err != nil {
			return failure.New(failure.EvidenceRefused, err, "")
		}
		f.hasLog = true
	}
	if m.UserspaceLog != "" {
		data, err := evidence.ReadBounded(m.UserspaceLog, tpm.MaxUserspaceLog)
		if err != nil {
			return err
		}
		if err := f.log.AddUserspace(data); err != nil {
			return failure.New(failure.EvidenceRefused, err, "")
		}
	}
	if on, said := f.log.SecureBoot(); said {
		if m.SecureBootSaid && on != m.SecureBoot {
			return failure.Newf(failure.Usage, "leave --secure-boot out", "--secure-boot=%t, and the event log says that it is %t", m.SecureBoot, on)
		}
		m.SecureBoot, m.SecureBootSaid = on, true
	}
	return nil
}

// tpm makes the section of a TPM from files. What evidence gave for a register is
// kept if the files do not give it.
func (m *Request) tpm(have *policy.TPMProfile) (*policy.TPMProfile, error) {
	files, err := m.openFiles()
	if err != nil {
		return nil, err
	}
	if files.boot == nil && !files.hasLog {
		return nil, failure.Newf(failure.Usage, "--uki gives PCRs 4, 11 and 12, --event-log all others", "nothing gives PCR %d", m.PCRs[0])
	}
	if have == nil {
		have = &policy.TPMProfile{Trust: []string{"root:NAME"}, Bank: "sha256", EventLog: "required"}
	}
	before := have.PCRs
	have.PCRs = nil
	var missing []string
	for _, pcr := range m.PCRs {
		n := slices.IndexFunc(before, func(r policy.PCR) bool { return *r.PCR == pcr })
		if n >= 0 && !files.hasLog && !files.predicts(pcr) {
			have.PCRs = append(have.PCRs, before[n])
			continue
		}
		ref, why, err := m.reference(pcr, files)
		if err != nil {
			return nil, err
		}
		if why != "" {
			missing = append(missing, fmt.Sprintf("PCR %d is not predictable: %s", pcr, why))
			continue
		}
		have.PCRs = append(have.PCRs, ref)
	}
	if len(missing) > 0 && (!m.LeaveOut || len(have.PCRs) == 0) {
		return nil, failure.Newf(failure.Usage, "--event-log of a boot that is trusted gives them, or leave them out of --pcrs", "%s", strings.Join(missing, "; "))
	}
	for _, text := range missing {
		m.note("%s; it is left out", text)
	}
	return have, nil
}

// predicts reports whether a register is computed from files of programs. In PCR 12
// there may be more than they say, so that a log goes before them if the loaders are
// not named.
func (f *tpmFiles) predicts(pcr uint32) bool {
	switch {
	case f.boot == nil:
		return false
	case f.boot.Image == nil:
		return pcr == 4
	case pcr == 12:
		return !f.hasLog || len(f.boot.Loaders) > 0
	}
	return pcr == 4 || pcr == 11
}

// stubsKernel is the device path by which a stub hands its kernel to the firmware.
const stubsKernel = "VenMedia(55C5D1F8-04CD-46B5-8A20-E56CBB3052D0)"

// compareLog points at a boot of the log that is not the one that is predicted: by
// another loader, or with credentials or words beside the image.
func (m *Request) compareLog(pcr uint32, all []uki.Prediction, files *tpmFiles) {
	if !files.hasLog || files.boot.Image == nil {
		return
	}
	_, events, err := files.log.Replay(pcr)
	if err != nil {
		return // the log's own faults are said where it is used
	}
	logged := 0
	for _, e := range events {
		program := e.Type == "EV_EFI_BOOT_SERVICES_APPLICATION" && !strings.HasPrefix(e.Detail, stubsKernel)
		if pcr == 4 && program || pcr == 12 && e.Name != tpm.WordEvent(tpm.OSSeparator).Name {
			logged++
		}
	}
	switch programs := len(files.boot.Loaders) + 1; {
	case pcr == 4 && logged != programs:
		m.note("WARNING: the boot of the event log started %d programs, and PCR 4 is computed for %d: is a --loader missing?", logged, programs)
	case pcr == 12 && !slices.ContainsFunc(all, func(p uki.Prediction) bool { return len(p.Events) == logged }):
		m.note("WARNING: the boot of the event log has %d events of PCR 12, and %d are computed: credentials, add-ons and words of the loader are not", logged, len(all[0].Events))
	}
}

// unpredictable says what a register holds that no file of a program tells.
var unpredictable = map[uint32]string{
	0: "the firmware's own code", 1: "the machine's configuration and boot entries", 2: "code of devices", 3: "configuration of devices",
	5: "the disk's partition table, and what the loader reads", 6: "the maker's own events",
	7:  "the machine's Secure Boot variables, and the certificates that let each program run",
	8:  "the commands of GRUB as it runs them, and the kernel's command line",
	9:  "what GRUB reads, and command line and initrd as the kernel receives them",
	11: "the sections of a unified kernel image, which --uki names", 12: "command lines, credentials and add-ons of the loader", 13: "system extensions of the loader",
	14: "shim's variables, among them the owner's keys",
}

// reference makes the entry of one register, or says why there is none.
func (m *Request) reference(pcr uint32, files *tpmFiles) (ref policy.PCR, why string, err error) {
	var all []uki.Prediction
	source := "computed from " + strings.Join(append(slices.Clone(m.Loaders), m.ukis()...), ", ")
	if files.predicts(pcr) {
		all, err = m.predict(pcr, files)
		if errors.Is(err, uki.ErrNotModelled) && files.hasLog {
			m.note("PCR %d is not predictable, and taken from the event log: %v", pcr, err)
			all, err = nil, nil
		}
		if err != nil {
			return ref, "", failure.New(failure.Usage, err, "--event-log or --evidence of a boot that is trusted gives the register")
		}
	}
	if all == nil {
		if !files.hasLog {
			why = unpredictable[pcr]
			if why == "" {
				why = "what user space measures"
			}
			return ref, why, nil
		}
		value, events, err := files.log.Replay(pcr)
		if err != nil {
			return ref, "", failure.New(failure.EvidenceRefused, err, "")
		}
		if why := otherSMBIOS(pcr, files.boot, events); why != "" {
			return ref, why, nil
		}
		if len(events) == 0 && !(m.OSSeparator && tpm.OSSeparated(pcr)) {
			return ref, "the event log has nothing of it", nil
		}
		all, source = []uki.Prediction{{Value: value, Events: events}}, "event log "+m.EventLog
	}
	return m.entry(pcr, all, source, files), "", nil
}

// otherSMBIOS says why the log of a boot is not that of another one's PCR 1: newer programs
// of systemd measure the machine's SMBIOS tables into it, and older ones do not.
func otherSMBIOS(pcr uint32, boot *uki.Boot, events []attestation.Event) string {
	if pcr != 1 || boot == nil {
		return ""
	}
	logged := slices.ContainsFunc(events, func(e attestation.Event) bool {
		return e.Type == "EV_EVENT_TAG" && strings.HasPrefix(e.Detail, "smbios:type")
	})
	switch measures := boot.MeasuresSMBIOS(); {
	case measures && !logged:
		return "systemd's stub or loader of this boot measures SMBIOS tables into it, and none did in the boot of the event log"
	case logged && !measures:
		return "systemd's stub or loader measured SMBIOS tables into it in the boot of the event log, and none of this boot does"
	}
	return ""
}

func (m *Request) ukis() []string {
	if m.UKI == "" {
		return nil
	}
	return []string{m.UKI}
}

// predict computes the values of a register that these programs lead to.
func (m *Request) predict(pcr uint32, files *tpmFiles) (all []uki.Prediction, err error) {
	switch pcr {
	case 11:
		all, err = m.image(files.boot)
	case 12:
		all, err = m.eitherSecureBoot(pcr, files.boot, (*uki.Boot).PCR12)
	default:
		all, err = m.eitherSecureBoot(pcr, files.boot, (*uki.Boot).PCR4)
	}
	if err == nil {
		m.compareLog(pcr, all, files)
	}
	if err != nil || m.UserspaceLog == "" || (pcr == tpm.PhasePCR && len(m.Phases) > 0) {
		return all, err
	}
	for i := range all {
		all[i].Append(files.log.Userspace(pcr)...)
	}
	return all, nil
}

// image predicts PCR 11 at each of the boot phases that were named.
func (m *Request) image(boot *uki.Boot) ([]uki.Prediction, error) {
	paths := m.Phases
	if len(paths) == 0 {
		paths = []string{""}
	}
	var out []uki.Prediction
	for _, path := range paths {
		all, err := boot.Image.PCR11(boot.Profile)
		if err != nil {
			return nil, err
		}
		for i := range all {
			all[i].Words(strings.FieldsFunc(path, func(r rune) bool { return r == ':' })...)
		}
		out = append(out, all...)
	}
	if n := len(boot.Image.Profiles()); n > 1 {
		m.note("%s has %d profiles; this is number %d, and --profile chooses another", m.UKI, n, boot.Profile)
	}
	return out, nil
}

// eitherSecureBoot predicts for Secure Boot as it is said to be, or for both
// states: which of them the machine is in is what PCR 7 says.
func (m *Request) eitherSecureBoot(pcr uint32, boot *uki.Boot, predict func(*uki.Boot) (uki.Prediction, error)) ([]uki.Prediction, error) {
	boot.SecureBoot = m.SecureBoot
	first, err := predict(boot)
	if err != nil || m.SecureBootSaid {
		return []uki.Prediction{first}, err
	}
	boot.SecureBoot = true
	second, err := predict(boot)
	boot.SecureBoot = false
	switch {
	case err != nil:
		m.note("PCR %d is that without Secure Boot: with it, %v", pcr, err)
	case hex.EncodeToString(first.Value) != hex.EncodeToString(second.Value):
		m.note("PCR %d depends on Secure Boot: its first value is without, its second with it; --secure-boot or --secure-boot=false leaves one", pcr)
		return []uki.Prediction{first, second}, nil
	}
	return []uki.Prediction{first}, nil
}

// entry puts predictions into the form of a policy.
func (m *Request) entry(pcr uint32, all []uki.Prediction, source string, files *tpmFiles) policy.PCR {
	ref := policy.PCR{PCR: &pcr, Source: source}
	if m.OSSeparator && tpm.OSSeparated(pcr) {
		for i := range all {
			all[i].Words(tpm.OSSeparator)
		}
	}
	for _, p := range all {
		value := hex.EncodeToString(p.Value)
		if !slices.Contains(ref.Accept, value) {
			ref.Accept = append(ref.Accept, value)
		}
		ref.AllowUnextended = ref.AllowUnextended || len(p.Events) == 0
	}
	ref.Events = slices.Clone(all[0].Events)
	for i := range ref.Events {
		ref.Events[i].Seq = 0
	}
	if ref.AllowUnextended {
		m.note("nothing is measured into PCR %d of this boot: the profile accepts it as it is at the start, and nothing else", pcr)
	}
	m.noteSeparator(pcr, files)
	return ref
}

func (m *Request) noteSeparator(pcr uint32, files *tpmFiles) {
	if files.boot == nil || files.boot.Image == nil || m.OSSeparatorSaid || m.UserspaceLog != "" || !tpm.OSSeparated(pcr) {
		return
	}
	if v := files.boot.Image.StubVersion(); v >= separatingStub {
		m.note("the stub is of systemd %d: if the initrd has systemd %d or later too, it extends %q into PCRs 0-7, 9 and 12-14, and --os-separator is needed", v, separatingStub, tpm.OSSeparator)
	}
}
