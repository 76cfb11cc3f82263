package snp_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"os"
	"testing"
	"time"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation/snp"
)

func file(t testing.TB, name string) []byte {
	t.Helper()
	return must[[]byte](t)(os.ReadFile("testdata/real/" + name))
}

type genuine struct {
	name, certificate string
	at                time.Time
	facts             map[string]any
}

func date(s string) time.Time { d, _ := time.Parse(time.DateOnly, s); return d }

// genuineReports are of processors that AMD made, at a time when their
// certificates were valid.
var genuineReports = []genuine{
	{"milan-v2-old", "vcek", date("2023-01-01"), map[string]any{"product": "Milan", "report_version": uint64(2), "signer": "vcek",
		"tcb_reported_bootloader": uint64(2), "tcb_reported_snp": uint64(5), "tcb_reported_microcode": uint64(0x44), "version_current": "1.49.3", "debug": true}},
	{"milan-v2", "vcek", date("2024-01-01"), map[string]any{"product": "Milan", "report_version": uint64(2), "tcb_reported_microcode": uint64(0x73)}},
	{"milan-v2-other", "vcek", date("2024-01-01"), map[string]any{"product": "Milan", "tcb_reported_snp": uint64(8)}},
	{"milan-v3-vlek", "vlek", date("2025-06-01"), map[string]any{"product": "Milan", "report_version": uint64(3), "signer": "vlek",
		"csp_id": "CN=cc-us-east-2.amazonaws.com", "tcb_reported_microcode": uint64(0xD9)}},
	{"milan-azure", "vcek", date("2024-01-01"), map[string]any{"product": "Milan"}},
	{"genoa-azure", "vcek", date("2025-06-01"), map[string]any{"product": "Genoa", "tcb_reported_microcode": uint64(0x54)}},
	{"milan-v3", "vcek", date("2026-01-01"), map[string]any{"product": "Milan", "report_version": uint64(3), "signer": "vcek"}},
	// Of model A0h, which go-sev-guest does not know.
	{"genoa-v5", "vcek", date("2026-06-01"), map[string]any{"product": "Genoa", "report_version": uint64(5), "tcb_reported_microcode": uint64(0x1B)}},
	// With bit 6 of the platform, which go-sev-guest refuses.
	{"turin-v5", "vcek", date("2026-06-01"), map[string]any{"product": "Turin", "report_version": uint64(5), "tcb_reported_fmc": uint64(1),
		"tcb_reported_microcode": uint64(81), "platform_iommu_write_safe": true, "unknown_bits": false, "launch_mitigations": uint64(0x3f), "current_mitigations": uint64(0x3f)}},
}

func (g genuine) evidence(t testing.TB) *attestv1.SNPEvidence {
	return &attestv1.SNPEvidence{Report: file(t, g.name+".report"), Certificate: file(t, g.name+"."+g.certificate)}
}

func TestGenuineReportsVerifyUnderAMDsRoots(t *testing.T) {
	for _, g := range genuineReports {
		t.Run(g.name, func(t *testing.T) {
			ev := g.evidence(t)
			c, err := snp.VerifyWithoutCRL(snp.AMD(), ev, g.at)
			if err != nil {
				t.Fatal(err)
			}
			if c.Trust != "root:amd" {
				t.Error(c.Trust)
			}
			for name, want := range g.facts {
				if c.Facts[name] != want {
					t.Errorf("%s is %v, not %v", name, c.Facts[name], want)
				}
			}
			// In the package itself there is no way around the list.
			v := must[*snp.Verifier](t)(snp.NewVerifier(snp.VerifierOptions{
				Trust: func() snp.Trust { return snp.Trust{Roots: snp.AMD()} }, Now: func() time.Time { return g.at }}))
			_, err = v.VerifyReport(t.Context(), ev, [64]byte(ev.GetReport()[0x50:]))
			refused(t, err, snp.ErrEndorsementMissing)

			flipped := attestv1.SNPEvidence{Certificate: ev.GetCertificate()}
			flipped.Report = bytes.Clone(ev.GetReport())
			flipped.Report[0x90] ^= 1
			_, err = snp.VerifyWithoutCRL(snp.AMD(), &flipped, g.at)
			refused(t, err, snp.ErrSignature)
			_, err = snp.VerifyWithoutCRL(snp.AMD(), ev, g.at.AddDate(10, 0, 0))
			refused(t, err, snp.ErrExpired)
		})
	}
}

// A certificate of Turin has the FMC of a TCB and a chip ID of 8 bytes.
func TestAGenuineCertificateOfTurinIsUnderstood(t *testing.T) {
	product, chip, tcb, err := snp.ParseLeaf(file(t, "turin.vcek"))
	if err != nil {
		t.Fatal(err)
	}
	if product != "Turin" || hex.EncodeToString(chip[:9]) != "1e550a8ee5cf9f4d00" || len(chip) != 64 || tcb != "fmc 0 bootloader 0 tee 0 snp 0 microcode 9" {
		t.Errorf("%s %x %s", product, chip, tcb)
	}
	cert, n := parse(t, file(t, "turin.vcek")), 0
	for _, root := range snp.AMD() {
		if cert.CheckSignatureFrom(root.ASK) == nil {
			n++
			if root.Product != "Turin" {
				t.Error(root.Product)
			}
		}
	}
	if n != 1 {
		t.Errorf("%d roots signed it", n)
	}
}

func TestAMDsRootsAreTheOnesThatWereReviewed(t *testing.T) {
	want := map[string]string{}
	for _, line := range bytes.Split(bytes.TrimSpace(must[[]byte](t)(os.ReadFile("testdata/roots.sha256"))), []byte("\n")) {
		f := bytes.Fields(line)
		want[string(f[1])] = string(f[0])
	}
	n := 0
	for _, r := range snp.AMD() {
		for name, cert := range map[string][]byte{"ARK": r.ARK.Raw, "ASK": r.ASK.Raw, "ASVK": r.ASVK.Raw} {
			n++
			if sum := sha256.Sum256(cert); hex.EncodeToString(sum[:]) != want[r.Product+"-"+name] {
				t.Errorf("%s-%s is %x", r.Product, name, sum)
			}
		}
		if r.ASK.CheckSignatureFrom(r.ARK) != nil || r.ASVK.CheckSignatureFrom(r.ARK) != nil || r.ARK.CheckSignatureFrom(r.ARK) != nil {
			t.Errorf("%s is no chain", r.Product)
		}
	}
	if n != len(want) || n != 9 {
		t.Errorf("%d certificates, %d digests", n, len(want))
	}
}
