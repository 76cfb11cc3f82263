package emulator

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
)

// servers is the folder of the module that the servers in Go are built from.
func servers(t testing.TB) string {
	t.Helper()
	_, file, _, _ := runtime.Caller(0)
	dir := filepath.Join(filepath.Dir(file), "servers")
	if _, err := os.Stat(dir); err != nil {
		t.Fatalf("%v (hint: the emulators are built from this repository, without -trimpath)", err)
	}
	return dir
}

// KubeAPIServer returns the path of a kube-apiserver, built by the first who asks:
// twelve minutes of one processor.
func KubeAPIServer(t testing.TB) string {
	t.Helper()
	const name, minor = "kube-apiserver", "37"
	module, tool := filepath.Join(filepath.Dir(servers(t)), "apiserver"), installed(t, "go")
	version := "-X k8s.io/component-base/version."
	flags := "-s -w " + version + "gitVersion=v1." + minor + ".1 " + version + "gitMajor=1 " + version + "gitMinor=" + minor + " " + version + "gitTreeState=clean"
	dir := cached(t, name, []string{module}, runtime.Version()+" "+flags, func(dir string) *exec.Cmd {
		cmd := exec.Command(tool, "build", "-trimpath", "-ldflags", flags, "-o", filepath.Join(dir, name), "k8s.io/kubernetes/cmd/kube-apiserver")
		cmd.Dir = module
		cmd.Env = append(os.Environ(), "GOFLAGS=-buildvcs=false", "GOWORK=off", "CGO_ENABLED=0", "GOEXPERIMENT=")
		return cmd
	})
	return filepath.Join(dir, name)
}

// installed returns the path of a program of this machine.
func installed(t testing.TB, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Fatalf("%v (hint: make deps)", err)
	}
	return path
}

// build returns the path of a program in Go, built by the first who asks.
func build(t testing.TB, name, pkg string) string {
	t.Helper()
	module, tool := servers(t), installed(t, "go")
	sources := []string{filepath.Join(module, "go.mod"), filepath.Join(module, "go.sum"), filepath.Join(module, "localkms")}
	dir := cached(t, name, sources, runtime.Version()+" "+pkg, func(dir string) *exec.Cmd {
		cmd := exec.Command(tool, "build", "-trimpath", "-ldflags", "-s -w", "-o", filepath.Join(dir, name), pkg)
		cmd.Dir = module
		cmd.Env = append(os.Environ(), "GOFLAGS=-buildvcs=false", "GOWORK=off", "CGO_ENABLED=0")
		return cmd
	})
	return filepath.Join(dir, name)
}

// azurite returns the paths of node and of azurite's script, installed by the
// first who asks.
func azurite(t testing.TB) (node, script string) {
	t.Helper()
	source := filepath.Join(servers(t), "azurite")
	node, npm := installed(t, "node"), installed(t, "npm")
	dir := cached(t, "azurite", []string{source}, "", func(dir string) *exec.Cmd {
		if err := os.CopyFS(dir, os.DirFS(source)); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(npm, "ci", "--ignore-scripts", "--omit=dev", "--no-audit", "--no-fund")
		cmd.Dir = dir
		return cmd
	})
	return node, filepath.Join(dir, "node_modules", "azurite", "dist", "src", "blob", "main.js")
}

// cached returns the folder that a command fills, in the user's cache folder, by
// a digest of the files it reads. It appears by rename. Other processes that want
// the same wait.
func cached(t testing.TB, name string, sources []string, also string, fill func(dir string) *exec.Cmd) string {
	t.Helper()
	final, err := entry(name, sources, also, fill)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return final
}

func entry(name string, sources []string, also string, fill func(dir string) *exec.Cmd) (string, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	cache = filepath.Join(cache, "keyagent", "emulator")
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", err
	}
	digest, err := digestOf(sources, also)
	if err != nil {
		return "", err
	}
	final := filepath.Join(cache, name+"-"+digest)
	// The file stays: removing it would let a third process lock a new file of
	// the same name.
	lock, err := os.OpenFile(final+".lock", os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return "", err
	}
	defer lock.Close() // which unlocks it
	for err = syscall.EINTR; errors.Is(err, syscall.EINTR); {
		err = syscall.Flock(int(lock.Fd()), syscall.LOCK_EX)
	}
	if err != nil {
		return "", err
	}
	if _, err := os.Stat(final); err == nil {
		return final, nil
	}
	temp, err := os.MkdirTemp(cache, ".new-"+name+"-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(temp) // a no-op once renamed
	cmd := fill(temp)
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%s: %w: %s", cmd, err, out)
	}
	return final, os.Rename(temp, final)
}

// digestOf digests the names and the content of files, and of all files below
// folders.
func digestOf(sources []string, also string) (string, error) {
	h := sha256.New()
	fmt.Fprintf(h, "%q\n", also)
	for _, source := range sources {
		err := filepath.WalkDir(source, func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			rel, err := filepath.Rel(filepath.Dir(source), path)
			if err != nil {
				return err
			}
			data, err := os.ReadFile(path)
			fmt.Fprintf(h, "%q %x\n", rel, sha256.Sum256(data))
			return err
		})
		if err != nil {
			return "", err
		}
	}
	return fmt.Sprintf("%x", h.Sum(nil)[:12]), nil
}
