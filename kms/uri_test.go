package kms

import (
	"errors"
	"net/url"
	"strings"
	"testing"
)

func wantErr(t testing.TB, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("got %v, want %v", err, want)
	}
}

func TestAURINamesABackendAndItsParameters(t *testing.T) {
	u, err := ParseURI("kms://cluster-kms?file=%2Fetc%2Fmaster%252Fsecret&salt=a+b")
	if err != nil {
		t.Fatal(err)
	}
	if file, err := u.Required("file"); err != nil || file != "/etc/master%2Fsecret" { // unescaped once
		t.Errorf("%q, %v", file, err)
	}
	wantErr(t, u.Done(), ErrURI)
	if salt := u.Optional("salt"); salt != "a b" || u.Optional("more") != "" || u.Done() != nil {
		t.Errorf("%q, %v", salt, u.Done())
	}
	if u.Scheme != "kms" || u.Name != "cluster-kms" {
		t.Errorf("%+v", u)
	}
}

// Case 46: what would mean nothing is refused, and no error repeats a value,
// which may be a secret that somebody put there.
func TestAURIThatMeansSomethingElseIsRefused(t *testing.T) {
	for name, uri := range map[string]string{
		"empty":               "",
		"another scheme":      "https://aws?key=hunter2",
		"no scheme":           "cluster-kms?file=hunter2",
		"opaque":              "kms:cluster-kms?file=hunter2",
		"no backend":          "kms://?file=hunter2",
		"a user":              "kms://me:hunter2@aws?key=x",
		"a port":              "kms://vault:8200?token=hunter2",
		"a path":              "kms://aws/hunter2",
		"a fragment":          "kms://aws?key=x#hunter2",
		"a parameter twice":   "kms://aws?key=hunter2&key=other",
		"a semicolon":         "kms://aws?key=hunter2;other=1",
		"a bad escape":        "kms://aws?key=%zzhunter2",
		"a bad escape before": "kms://a%zzws?key=hunter2",
		"a control character": "kms://aws?key=hunter2\n",
		"a NUL":               "kms://aws?key=hunter2\x00",
		"endless":             "kms://aws?key=hunter2" + strings.Repeat("a", 5000),
	} {
		t.Run(name, func(t *testing.T) {
			_, err := ParseURI(uri)
			wantErr(t, err, ErrURI)
			if err != nil && strings.Contains(err.Error(), "hunter2") {
				t.Errorf("the error repeats the secret: %v", err)
			}
		})
	}
	u, err := ParseURI("kms://aws?secret=hunter2")
	if err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{u.Done(), func() error { _, err := u.Required("key"); return err }()} {
		wantErr(t, err, ErrURI)
		if strings.Contains(err.Error(), "hunter2") {
			t.Errorf("the error repeats the secret: %v", err)
		}
	}
	if _, err := u.Required("empty"); err == nil {
		t.Error("a required parameter may be absent")
	}
}

func TestABindingIsBounded(t *testing.T) {
	good := Binding{VolumeID: "data-1", Purpose: VolumeDEK, Version: 1, Length: 32}
	if err := good.Validate(); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*Binding){
		"no volume": func(b *Binding) { b.VolumeID = "" }, "a path": func(b *Binding) { b.VolumeID = "a/../b" },
		"dots": func(b *Binding) { b.VolumeID = "a..b" }, "a newline": func(b *Binding) { b.VolumeID = "a\n" },
		"1 MiB": func(b *Binding) { b.VolumeID = strings.Repeat("a", 1<<20) }, "a look-alike": func(b *Binding) { b.VolumeID = "dаta" },
		"no purpose": func(b *Binding) { b.Purpose = "" }, "another purpose": func(b *Binding) { b.Purpose = "swap" },
		"version 0": func(b *Binding) { b.Version = 0 },
		"length 0":  func(b *Binding) { b.Length = 0 }, "length 15": func(b *Binding) { b.Length = 15 },
		"length 65": func(b *Binding) { b.Length = 65 }, "length 2^32-1": func(b *Binding) { b.Length = 1<<32 - 1 },
		"length -1":          func(b *Binding) { b.Length = -1 },
		"a salt of one byte": func(b *Binding) { b.Salt = "aa" }, "a salt of capitals": func(b *Binding) { b.Salt = strings.ToUpper(NewSalt()) },
		"a salt of another purpose": func(b *Binding) { b.Salt, b.Purpose = NewSalt(), RecordMAC },
	} {
		b := good
		change(&b)
		if err := b.Validate(); !errors.Is(err, ErrBinding) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Two bindings never have one encoding, whatever is in their strings.
func FuzzBinding(f *testing.F) {
	f.Add("d", "data-1", "volume-dek", uint32(1), uint16(32), "", "d", "data-", "1volume-dek", uint32(1), uint16(32), "")
	f.Add("d", "data-1", "volume-dek", uint32(1), uint16(32), "a", "d", "data-1", "volume-dek", uint32(1), uint16(32), "")
	f.Fuzz(func(t *testing.T, d1, v1, p1 string, n1 uint32, l1 uint16, s1, d2, v2, p2 string, n2 uint32, l2 uint16, s2 string) {
		a, b := Binding{v1, Purpose(p1), n1, int(l1), s1}, Binding{v2, Purpose(p2), n2, int(l2), s2}
		same := d1 == d2 && a == b
		if (string(a.Encode(d1)) == string(b.Encode(d2))) != same {
			t.Fatalf("%q %+v and %q %+v", d1, a, d2, b)
		}
	})
}

// FuzzURI: what is parsed can be written down again, and means the same; what
// is not repeats no value.
func FuzzURI(f *testing.F) {
	for _, s := range []string{"kms://cluster-kms?file=/etc/master&salt=x", "storage://file?dir=%2Fvar", "storage://mem", "kms://a?b=%41", "KMS://x/?y"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		u, err := ParseURI(s)
		if err != nil {
			wantErr(t, err, ErrURI)
			return
		}
		values := url.Values{}
		for k, v := range u.params {
			values.Set(k, v)
		}
		again, err := ParseURI((&url.URL{Scheme: u.Scheme, Host: u.Name, RawQuery: values.Encode()}).String())
		if err != nil {
			if len(values.Encode())+len(u.Name) > 1000 {
				return // longer than before, since everything is escaped now
			}
			t.Fatalf("%q: %v", s, err)
		}
		if again.Name != u.Name || len(again.params) != len(u.params) {
			t.Fatalf("%+v became %+v", u, again)
		}
		for k, v := range u.params {
			if again.params[k] != v {
				t.Fatalf("%q became %q", v, again.params[k])
			}
		}
	})
}
