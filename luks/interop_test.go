package luks

import (
	"context"
	"testing"

	"github.com/martinjungblut/go-cryptsetup"

	"github.com/keyagent/keyagent/internal/secret"
)

// go-cryptsetup drives libcryptsetup without any code of ours: it opens what this
// package formats, and what it formats the guard judges by what is in it. Its keys are
// Go strings, which is why it is here and nowhere else.

// binding opens a device with it.
func binding(t testing.TB, path string) *cryptsetup.Device {
	t.Helper()
	d, err := cryptsetup.Init(path)
	must(t, err)
	t.Cleanup(func() { d.Free() })
	return d
}

func keyString(t testing.TB, dek *secret.Bytes) (text string) {
	t.Helper()
	must(t, dek.Use(func(p []byte) error { text = string(p); return nil }))
	return text
}

func TestTheBindingOpensWhatWeFormat(t *testing.T) {
	path, _ := formatted(t, idData, dataKey(t))
	d := binding(t, path)
	must(t, d.Load(cryptsetup.LUKS2{}))
	if d.Type() != "LUKS2" {
		t.Errorf("it is a %s", d.Type())
	}
	must(t, d.ActivateByPassphrase("", 0, keyString(t, dataKey(t)), 0))
	if err := d.ActivateByPassphrase("", 0, keyString(t, logsKey(t)), 0); err == nil {
		t.Error("another key opens it")
	}
}

func TestWhatTheBindingFormatsIsJudgedByTheGuard(t *testing.T) {
	ctx, dek := context.Background(), dataKey(t)
	ours := cryptsetup.LUKS2{SectorSize: dataSectorSize, PBKDFType: &cryptsetup.PbkdfType{
		Type: "pbkdf2", Hash: "sha256", Iterations: kdfIterations, Flags: cryptsetup.CRYPT_PBKDF_NO_BENCHMARK,
	}}
	labelled, costly, argon, small := ours, ours, ours, ours
	labelled.Label = "data"
	costly.PBKDFType = &cryptsetup.PbkdfType{Type: "pbkdf2", Hash: "sha256", Iterations: 1001, Flags: cryptsetup.CRYPT_PBKDF_NO_BENCHMARK}
	argon.PBKDFType = &cryptsetup.PbkdfType{Type: "argon2id", Hash: "sha256", Iterations: 4, MaxMemoryKb: 32, ParallelThreads: 1, Flags: cryptsetup.CRYPT_PBKDF_NO_BENCHMARK}
	small.SectorSize = sectorSize
	generic := cryptsetup.GenericParams{Cipher: cipherName, CipherMode: cipherMode, UUID: idData.UUID, VolumeKeySize: volumeKeySize}
	half, cbc := generic, generic
	half.VolumeKeySize = 32
	cbc.CipherMode = "cbc-essiv:sha256"
	cbc.VolumeKeySize = 32
	for _, c := range []struct {
		name    string
		luks2   cryptsetup.LUKS2
		generic cryptsetup.GenericParams
		rule    Rule // of the refusal; none if it is accepted
	}{
		{"our own parameters", ours, generic, ""},
		{"a label", labelled, generic, RuleBinaryHeader},
		{"one round more", costly, generic, RuleKDFCost},
		{"argon2id", argon, generic, RuleKDF},
		{"sectors of 512 bytes", small, generic, RuleSectorSize},
		{"half a key", ours, half, RuleKeySize},
		{"CBC", ours, cbc, RuleKeySize},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := image(t, 20<<20)
			d := binding(t, path)
			must(t, d.Format(c.luks2, c.generic))
			must(t, d.KeyslotAddByVolumeKey(0, "", keyString(t, dek)))
			h, err := Adopt(ctx, path, idData, dek)
			if c.rule != "" {
				wantRule(t, err, c.rule)
				return
			}
			must(t, err)
			macs := h.MACs()
			if macs.rebuildable() {
				t.Error("a header with random salts is said to be of version 2")
			}
			_, err = ReadHeader(ctx, HeaderRequest{path, idData, macs}, dek)
			must(t, err)
			_, err = Adopt(ctx, path, idData, logsKey(t))
			wantError(t, err, ErrWrongKey)
		})
	}
}
