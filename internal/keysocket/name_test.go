package keysocket

import (
	"errors"
	"strings"
	"testing"
)

func TestANameSaysWhatIsAskedFor(t *testing.T) {
	for raw, want := range map[string]Name{
		"\x00d7067f78d9827418/cryptsetup/myvol":                       {Mapping: "myvol"},
		"\x000/cryptsetup/a.b_c-d":                                    {Mapping: "a.b_c-d"},
		"\x00ffffffffffffffff/unit/foobar.service/credx":              {Unit: "foobar.service", Credential: "credx"},
		"\x001/unit/systemd-cryptsetup@data\\x2ddrop.service/a:b.c_d": {Unit: `systemd-cryptsetup@data\x2ddrop.service`, Credential: "a:b.c_d"},
	} {
		if got, err := ParseName([]byte(raw)); err != nil || got != want {
			t.Errorf("%q: %+v, %v", raw, got, err)
		}
	}
}

func TestOtherNamesAskForNothing(t *testing.T) {
	for _, raw := range []string{
		"", "\x00", "/run/x", "@d7067f78d9827418/cryptsetup/data", "\x00/cryptsetup/data",
		"\x00d7067f78d9827418/cryptsetup-tpm2/data", "\x00d7067f78d9827418/cryptsetup-fido2/data", "\x00d7067f78d9827418/cryptsetup-pkcs11/data",
		"\x00d7067f78d98274180/cryptsetup/data", "\x00D7/cryptsetup/data", "\x00+7/cryptsetup/data", "\x00xyz/cryptsetup/data",
		"\x00d7/cryptsetup/", "\x00d7/cryptsetup", "\x00d7/cryptsetup/data/", "\x00d7/cryptsetup/data\x00", "\x00d7/cryptsetup/data\n", "\x00d7/cryptsetup/../data",
		"\x00d7/cryptsetup/-data", "\x00d7/cryptsetup/" + strings.Repeat("a", 81), "\x00d7//cryptsetup/data", "\x00\x00d7/cryptsetup/data",
		"\x00d7/unit/foo.service", "\x00d7/unit/foo.service/", "\x00d7/unit//id", "\x00d7/unit/foo.service/a/b", "\x00d7/unit/foo service/id", "\x00d7/unit/foo.service/\xff",
		"\x00d7/unit/foo.service/" + strings.Repeat("a", 100),
	} {
		if got, err := ParseName([]byte(raw)); !errors.Is(err, ErrName) {
			t.Errorf("%q: %+v, %v", raw, got, err)
		}
	}
}

// FuzzParseName: what is accepted is what it says it is, and in the one form of it.
func FuzzParseName(f *testing.F) {
	f.Add([]byte("\x00d7067f78d9827418/cryptsetup/myvol"))
	f.Add([]byte("\x00d7067f78d9827418/unit/foobar.service/credx"))
	f.Add([]byte("\x00d7067f78d9827418/cryptsetup-tpm2/myvol"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		n, err := ParseName(raw)
		if err != nil {
			if n != (Name{}) {
				t.Fatalf("%q: %v with %+v", raw, err, n)
			}
			return
		}
		random, _, _ := strings.Cut(string(raw[1:]), "/")
		if again := "\x00" + random + n.String(); again != string(raw) || (n.Mapping == "") == (n.Unit == "") {
			t.Fatalf("%q is read as %+v, which is %q", raw, n, again)
		}
	})
}

func TestAUnitIsWhatItsControlGroupIs(t *testing.T) {
	for text, want := range map[string]string{
		"0::/system.slice/vault.service\n": "vault.service",
		"0::/system.slice/system-systemd\\x2dcryptsetup.slice/systemd-cryptsetup@data.service\n": "systemd-cryptsetup@data.service",
		"9:name=systemd:/\n0::/system.slice/vault.service\n":                                     "vault.service",
		"0::/system.slice/system-a.slice/system-a-b.slice/x@y.service":                           "x@y.service",
	} {
		if got, err := unitOf(text); err != nil || got != want {
			t.Errorf("%q: %q, %v", text, got, err)
		}
	}
	for _, text := range []string{
		"", "0::/\n", "0::/init.scope\n", "0::/user.slice/vault.service\n", "0::/vault.service\n", "0::/system.slice\n", "0::/system.slice/vault.scope\n",
		"0::/system.slice/vault.service/sub\n", "0::/system.slice/docker-1.scope/system.slice/vault.service\n", "0::/system.slice/crio.service/vault.service\n",
		"0::/system.slice/other.slice/vault.service\n", "0::/system.slice/system-a.slice/system-b.slice/vault.service\n", "0::/system.slice/system.slice/vault.service\n",
		"0::/../system.slice/vault.service\n", "0::/system.slice/../vault.service\n", "0::/system.slice/vault.service (deleted)\n", "0::/machine.slice/system.slice/vault.service\n",
		"1:name=systemd:/system.slice/vault.service\n", "0:: /system.slice/vault.service\n", "0::/system.slice/va\x00ult.service\n",
	} {
		if got, err := unitOf(text); !errors.Is(err, ErrUnit) {
			t.Errorf("%q: %q, %v", text, got, err)
		}
	}
}

// FuzzUnitOf: a unit is the last part of a path of slices.
func FuzzUnitOf(f *testing.F) {
	f.Add("0::/system.slice/system-systemd\\x2dcryptsetup.slice/systemd-cryptsetup@data.service\n")
	f.Add("1:name=systemd:/\n0::/system.slice/a.service/b.service\n")
	f.Fuzz(func(t *testing.T, text string) {
		unit, err := unitOf(text)
		if err != nil {
			return
		}
		if !strings.HasSuffix(unit, ".service") || strings.ContainsAny(unit, "/ \n\x00") || !strings.Contains(text, "0::/system.slice/") || strings.Count(text, ".service/") > 0 && strings.Contains(text, unit+"/") {
			t.Fatalf("%q is %q", text, unit)
		}
	})
}
