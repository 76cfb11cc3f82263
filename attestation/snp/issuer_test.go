package snp_test

import (
	"context"
	"encoding/binary"
	"errors"
	"math"
	"net/http"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/snp"
	"github.com/keyagent/keyagent/test/sim/amd"
)

// exchange runs issuer and verifier against each other.
func exchange(t *testing.T, opts snp.IssuerOptions, v *snp.Verifier) (*evidence, attestation.Claims, error) {
	t.Helper()
	i := must[*snp.Issuer](t)(snp.NewIssuer(opts))
	a := must[attestation.Attempt](t)(i.Begin(t.Context()))
	defer a.Close()
	q := must[attestation.Question](t)(v.Begin(t.Context(), a.Offer()))
	data, err := a.Evidence(t.Context(), q.Ask(), testBinder)
	if err != nil {
		return nil, attestation.Claims{}, err
	}
	ev := &evidence{}
	if err := proto.Unmarshal(data, ev); err != nil {
		t.Fatal(err)
	}
	all, err := q.Verify(t.Context(), data, testBinder)
	if err != nil {
		return ev, attestation.Claims{}, err
	}
	return ev, all[0], nil
}

func TestAGuestProvesItself(t *testing.T) {
	one := uint(1)
	for _, product := range []string{"Milan", "Genoa", "Turin"} {
		chip := newChip(t, product)
		for name, vlek := range map[string]bool{"VCEK": false, "VLEK": true} {
			for _, way := range []string{snp.ViaTSM, snp.ViaDevice} {
				t.Run(product+" "+name+" "+way, func(t *testing.T) {
					guest := &amd.Guest{Chip: chip, Report: amd.Report{VLEK: vlek}, Table: chip.Table()}
					kds := amd.NewKDS(chip)
					opts := snp.IssuerOptions{VMPL: &one, Endorsements: serve(t, kds)}
					if way == snp.ViaTSM {
						opts.TSM = guest.TSM()
					} else {
						opts = opts.WithDevice(guest.Device)
					}
					if how, err := snp.Detect(opts); err != nil || how != way {
						t.Fatalf("%q, %v", how, err)
					}
					ev, c, err := exchange(t, opts, lab(t, chip.Authority))
					if err != nil || c.Facts["vmpl"] != uint64(1) {
						t.Fatalf("%v, %v", c.Facts, err)
					}
					if asked := kds.Asked(); len(asked) != 1 || len(ev.GetCertificate()) == 0 {
						t.Errorf("the host's certificate is not used: %v", asked)
					}
					if guest.Left() != 0 {
						t.Errorf("%d entries are left", guest.Left())
					}
				})
			}
		}
	}
}

// The endorsements are the attester's courtesy: whatever goes wrong with them, the
// report is made, and somebody hears of it.
func TestAGuestWithoutEndorsementsStillReports(t *testing.T) {
	chip := newChip(t, "Milan")
	garbage := make([]byte, 4096)
	binary.LittleEndian.PutUint32(garbage[16:], math.MaxUint32-8)
	binary.LittleEndian.PutUint32(garbage[20:], 64)
	down := func(w http.ResponseWriter, _ *http.Request) bool { w.WriteHeader(500); return true }
	for name, tc := range map[string]struct {
		table  []byte
		fault  func(http.ResponseWriter, *http.Request) bool
		asking bool
		logged int
		want   error
	}{
		"no table, service up":        {nil, nil, true, 0, nil},
		"empty table, service up":     {make([]byte, 4096), nil, true, 0, nil},
		"hostile table, service up":   {garbage, nil, true, 1, nil},
		"no table, service down":      {nil, down, true, 2, snp.ErrEndorsementMissing},
		"table, service down":         {chip.Table(), down, true, 1, snp.ErrEndorsementMissing},
		"table, nobody to be asked":   {chip.Table(), nil, false, 0, snp.ErrEndorsementMissing},
		"nothing, nobody to be asked": {nil, nil, false, 0, snp.ErrEndorsementMissing},
	} {
		t.Run(name, func(t *testing.T) {
			guest := &amd.Guest{Chip: chip, Table: tc.table}
			kds := amd.NewKDS(chip)
			kds.Fault = tc.fault
			var logged []string
			opts := snp.IssuerOptions{TSM: guest.TSM(), Log: func(msg string, err error) { logged = append(logged, msg+": "+err.Error()) }}
			if tc.asking {
				opts.Endorsements = serve(t, kds)
			}
			_, _, err := exchange(t, opts, lab(t, chip.Authority))
			if !errors.Is(err, tc.want) || len(logged) != tc.logged {
				t.Errorf("%v, %q", err, logged)
			}
			// The verifier may have what the attester has not.
			if tc.want != nil {
				if _, _, err = exchange(t, opts, lab(t, chip.Authority, asking(serve(t, amd.NewKDS(chip))))); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

func TestMachinesWithoutSNPSaySo(t *testing.T) {
	chip := newChip(t, "Milan")
	for name, opts := range map[string]snp.IssuerOptions{
		"nothing":           {Device: filepath.Join(t.TempDir(), "sev-guest")},
		"TDX":               {TSM: (&amd.Guest{Chip: chip, Provider: "tdx_guest"}).TSM(), Device: "/nonexistent"},
		"a file for device": {TSM: (&amd.Guest{Chip: chip, Provider: "tdx_guest"}).TSM(), Device: "/etc/passwd"},
	} {
		i := must[*snp.Issuer](t)(snp.NewIssuer(opts))
		if _, err := i.Begin(t.Context()); !errors.Is(err, attestation.ErrNoDevice) {
			t.Errorf("%s: %v", name, err)
		}
		if how, err := snp.Detect(opts); !errors.Is(err, attestation.ErrNoDevice) || how != "" {
			t.Errorf("%s: %q, %v", name, how, err)
		}
		if _, err := i.Collect(t.Context(), testBinder); !errors.Is(err, attestation.ErrNoDevice) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestAHostThatGivesNoReportIsNamed(t *testing.T) {
	chip := newChip(t, "Milan")
	for name, tc := range map[string]struct {
		guest *amd.Guest
		want  string
	}{
		"fault":            {&amd.Guest{Chip: chip, Fault: syscall.EIO}, "input/output error"},
		"other data":       {&amd.Guest{Chip: chip, Report: amd.Report{Edit: func(b []byte) { b[0x50] ^= 1 }}}, "other data"},
		"malformed report": {&amd.Guest{Chip: chip, Report: amd.Report{Version: 4}}, "version 4"},
	} {
		for _, opts := range []snp.IssuerOptions{{TSM: tc.guest.TSM()}, snp.IssuerOptions{}.WithDevice(tc.guest.Device)} {
			_, _, err := exchange(t, opts, lab(t, chip.Authority))
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
	four := uint(4)
	if _, err := snp.NewIssuer(snp.IssuerOptions{VMPL: &four}); err == nil {
		t.Error("VMPL 4 is accepted")
	}
	a := must[attestation.Attempt](t)(must[*snp.Issuer](t)(snp.NewIssuer(snp.IssuerOptions{TSM: (&amd.Guest{Chip: chip}).TSM()})).Begin(t.Context()))
	if _, err := a.Evidence(t.Context(), []byte("more"), testBinder); err == nil {
		t.Error("a question is answered that was not understood")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := must[*snp.Issuer](t)(snp.NewIssuer(snp.IssuerOptions{})).Begin(ctx); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func TestAnOldReportsProductLineIsTakenFromItsCertificate(t *testing.T) {
	chip := newChip(t, "Genoa")
	guest := &amd.Guest{Chip: chip, Report: amd.Report{Version: 2}, Table: chip.Table()}
	ev, _, err := exchange(t, snp.IssuerOptions{TSM: guest.TSM(), Endorsements: serve(t, amd.NewKDS(chip))}, lab(t, chip.Authority))
	if err != nil || len(ev.GetCrl()) == 0 {
		t.Error(err)
	}
	guest.Table = nil // nobody says, and the guess does no harm
	if _, err := must[*snp.Issuer](t)(snp.NewIssuer(snp.IssuerOptions{TSM: guest.TSM(), Endorsements: serve(t, amd.NewKDS(chip))})).Collect(t.Context(), testBinder); err != nil {
		t.Error(err)
	}
}

func TestCollectedEvidenceCoversWhatItWasAskedTo(t *testing.T) {
	chip := newChip(t, "Milan")
	i := must[*snp.Issuer](t)(snp.NewIssuer(snp.IssuerOptions{TSM: (&amd.Guest{Chip: chip, Table: chip.Table()}).TSM(), Endorsements: serve(t, amd.NewKDS(chip))}))
	data := [64]byte{42}
	ev := must[*evidence](t)(i.Collect(t.Context(), data))
	v := lab(t, chip.Authority)
	if c, err := v.VerifyReport(t.Context(), ev, data); err != nil || c.Kind != attestation.SNP {
		t.Error(err)
	}
	_, err := v.VerifyReport(t.Context(), ev, testBinder)
	refused(t, err, snp.ErrReportData)
}

// A machine knows beforehand how a verifier will name it, where that stays the same.
func TestAGuestKnowsItsIdentity(t *testing.T) {
	chip := newChip(t, "Milan")
	guest := &amd.Guest{Chip: chip, Table: chip.Table()}
	opts := snp.IssuerOptions{TSM: guest.TSM(), Endorsements: serve(t, amd.NewKDS(chip))}
	_, c, err := exchange(t, opts, lab(t, chip.Authority))
	if err != nil {
		t.Fatal(err)
	}
	got, err := must[*snp.Issuer](t)(snp.NewIssuer(opts)).Identity(t.Context())
	if err != nil || got != c.Identity {
		t.Errorf("%q, %v; a verifier says %q", got, err, c.Identity)
	}
	for name, r := range map[string]amd.Report{
		"VLEK":   {VLEK: true},
		"masked": {Edit: func(b []byte) { clear(b[0x1A0:0x1E0]) }},
	} {
		guest := &amd.Guest{Chip: chip, Report: r, Table: chip.Table()}
		if got, err := must[*snp.Issuer](t)(snp.NewIssuer(snp.IssuerOptions{TSM: guest.TSM()})).Identity(t.Context()); err == nil {
			t.Errorf("%s: it is named %q", name, got)
		}
	}
}
