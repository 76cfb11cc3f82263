package config

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

type inner struct {
	Name string `yaml:"name"`
	Size int    `yaml:"size,omitempty"`
}

type file struct {
	Listen string  `yaml:"listen"`
	Items  []inner `yaml:"items"`
}

func decode(text string) (*Document, file, error) {
	var f file
	d, err := Decode("file.yaml", []byte(text), &f)
	return d, f, err
}

// Case 46.
func TestAFileIsDecodedStrictlyAndErrorsNameTheLine(t *testing.T) {
	good := "listen: here\nitems:\n  - name: a\n    size: 1\n"
	if _, f, err := decode(good); err != nil || f.Listen != "here" || f.Items[0].Size != 1 {
		t.Fatalf("%+v, %v", f, err)
	}
	for name, tt := range map[string]struct{ text, says string }{
		"an unknown field":         {good + "lisen: there\n", `line 5: unknown field "lisen"`},
		"an unknown field deep in": {good + "  - name: b\n    sise: 2\n", `line 6: unknown field "sise"`},
		"a field twice":            {good + "listen: there\n", "line 5: mapping key \"listen\" already defined at line 1"},
		"a field twice, deep in":   {good + "  - name: b\n    name: c\n", "already defined at line 5"},
		"another type":             {strings.Replace(good, "size: 1", "size: much", 1), "line 4: cannot unmarshal"},
		"no YAML":                  {good + "\t- x", "line "},
		"a second document":        {good + "---\n" + good, "more than one document"},
		"an empty second document": {good + "---\n", "more than one document"},
		"nothing":                  {"", "is empty"},
		"too much":                 {good + strings.Repeat("#", maxFile), "larger than"},
		"an alias that explodes": {"a: &a [x,x,x,x,x,x,x,x,x]\n" + bomb() + good,
			""},
	} {
		t.Run(name, func(t *testing.T) {
			_, _, err := decode(tt.text)
			if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "file.yaml") || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("got %v, want one that says %q", err, tt.says)
			}
			if err != nil && strings.Contains(err.Error(), "config.") {
				t.Errorf("the error speaks of Go: %v", err)
			}
		})
	}
}

func bomb() string {
	var b strings.Builder
	for i := 'b'; i < 'k'; i++ {
		p := string(i - 1)
		b.WriteString(string(i) + ": &" + string(i) + " [*" + strings.Repeat(p+",*", 8) + p + "]\n")
	}
	return b.String()
}

func TestAnErrorSaysWhereItsFieldStands(t *testing.T) {
	d, _, err := decode("listen: here\nitems:\n  - name: a\n  - name: b\n    size: 1\n")
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		path []any
		want string
	}{
		{[]any{"listen"}, "file.yaml: line 1: listen: bad"},
		{[]any{"items", 1, "size"}, "file.yaml: line 5: items[1].size: bad"},
		{[]any{"items", 1, "missing"}, "file.yaml: line 4: items[1].missing: bad"},
		{[]any{"items", 7, "name"}, "file.yaml: line 2: items[7].name: bad"},
		{[]any{"missing"}, "file.yaml: line 1: missing: bad"},
		{nil, "file.yaml: line 1: : bad"},
	} {
		err := d.Errorf(tt.path, "bad")
		if !errors.Is(err, ErrInvalid) || !strings.HasSuffix(err.Error(), tt.want) {
			t.Errorf("%v, want %s", err, tt.want)
		}
	}
	cause := errors.New("cause")
	if err := d.Errorf([]any{"listen"}, "%w", cause); !errors.Is(err, cause) {
		t.Errorf("%v does not wrap its cause", err)
	}
}

func TestASecretFileIsItsOwnersAlone(t *testing.T) {
	path := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(path, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	for mode, ok := range map[os.FileMode]bool{0o600: true, 0o400: true, 0o700: true, 0o640: false, 0o604: false, 0o644: false, 0o620: false, 0o602: false, 0o601: false, 0o666: false} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		err := CheckSecretFile(path)
		if ok && err != nil {
			t.Errorf("%04o: %v", mode, err)
		}
		if !ok && (!errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "chmod 600")) {
			t.Errorf("%04o: %v", mode, err)
		}
	}
	if err := CheckSecretFile(t.TempDir()); !errors.Is(err, ErrInvalid) {
		t.Errorf("a folder: %v", err)
	}
	if err := CheckSecretFile(path + "x"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a missing file: %v", err)
	}
	if os.Geteuid() == 0 {
		if err := errors.Join(os.Chmod(path, 0o600), os.Chown(path, 12345, 0)); err != nil {
			t.Fatal(err)
		}
		if err := CheckSecretFile(path); os.Geteuid() == 0 && !errors.Is(err, ErrInvalid) {
			t.Errorf("a stranger's file: %v", err)
		}
	}
}

// FuzzDecode: any file is decoded or refused, and every error can say where.
func FuzzDecode(f *testing.F) {
	f.Add("listen: here\nitems:\n  - name: a\n    size: 1\n")
	f.Add("a: &a [1]\nb: *a\n")
	f.Add("? {a: b}\n: c\n")
	f.Fuzz(func(t *testing.T, text string) {
		d, _, err := decode(text)
		if err != nil {
			if !errors.Is(err, ErrInvalid) {
				t.Fatal(err)
			}
			return
		}
		_ = d.Errorf([]any{"items", 0, "name"}, "x")
	})
}
