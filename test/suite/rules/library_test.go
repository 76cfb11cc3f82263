package rules

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// userProgram is what somebody writes who imports the library: every type that it
// needs has a name outside of internal/.
const userProgram = `package main

import (
	"context"
	"fmt"

	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/kms/backend"
	"github.com/keyagent/keyagent/kms/dek"
	"github.com/keyagent/keyagent/kms/setup"
	"github.com/keyagent/keyagent/storage"
)

// vault is a backend of the user's own.
type vault struct{}

func (v vault) Generate(ctx context.Context, b kms.Binding) (*kms.Secret, kms.Wrapped, error) {
	return backend.Generate(ctx, b, v.Wrap)
}

func (vault) Wrap(ctx context.Context, b kms.Binding, key *kms.Secret) (kms.Wrapped, error) {
	return kms.Wrapped{}, backend.CheckWrap(ctx, b, key)
}

func (vault) Unwrap(ctx context.Context, b kms.Binding, w kms.Wrapped) (*kms.Secret, error) {
	return kms.NewSecret(make([]byte, b.Length))
}

func open(ctx context.Context, s storage.Storage) (*dek.Store, error) { return dek.Open(ctx, vault{}, s) }

func main() {
	keys, err := setup.DEKs(context.Background(), "kms://cluster-kms?file=master", "storage://file?dir=keys")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer keys.Close()
	key, err := keys.GetOrCreate(context.Background(), "pvc-1", 32)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer key.Close()
	_ = key.Use(func(b []byte) error { fmt.Println(len(b)); return nil })
	_ = open
}
`

// TestTheLibraryCanBeUsedFromAnotherModule builds and runs a program of another
// module.
func TestTheLibraryCanBeUsedFromAnotherModule(t *testing.T) {
	root, err := filepath.Abs("../../..")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	mod, err := os.ReadFile(filepath.Join(root, "go.mod"))
	if err != nil {
		t.Fatal(err)
	}
	sum, err := os.ReadFile(filepath.Join(root, "go.sum"))
	if err != nil {
		t.Fatal(err)
	}
	// The same versions, under another name.
	mod = append([]byte("module example.com/user\n"), mod[len("module github.com/keyagent/keyagent\n"):]...)
	mod = append(mod, "\nrequire github.com/keyagent/keyagent v0.0.0\n\nreplace github.com/keyagent/keyagent => "+root+"\n"...)
	for name, data := range map[string][]byte{"go.mod": mod, "go.sum": sum, "main.go": []byte(userProgram), "master": make([]byte, 32)} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	run := exec.Command("go", "run", "-mod=mod", ".")
	run.Dir = dir
	out, err := run.CombinedOutput()
	if err != nil || string(out) != "32\n" {
		t.Errorf("%v: %s", err, out)
	}
}
