package emulator

import (
	"crypto/sha256"
	"encoding/json"
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

// module returns the folder beside this file of a module that programs are built
// from.
func module(t testing.TB, name string) string {
	t.Helper()
	_, file, _, _ := runtime.Caller(0)
	dir := filepath.Join(filepath.Dir(file), name)
	if _, err := os.Stat(dir); err != nil {
		t.Fatalf("%v (hint: the emulators are built from this repository, without -trimpath)", err)
	}
	return dir
}

// kubernetesFlags tell a program of Kubernetes its version.
const kubernetesFlags = "-s -w -X k8s.io/component-base/version.gitVersion=v1.37.1" +
	" -X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=37" +
	" -X k8s.io/component-base/version.gitTreeState=clean"

// KubeAPIServer returns the path of a kube-apiserver, built by the first who asks:
// twelve minutes of one processor.
func KubeAPIServer(t testing.TB) string {
	t.Helper()
	return build(t, "kubernetes", "kube-apiserver", kubernetesFlags, "k8s.io/kubernetes/cmd/kube-apiserver")
}

// Kubelet returns the path of a kubelet, built by the first who asks: nine minutes
// of one processor.
func Kubelet(t testing.TB) string {
	t.Helper()
	return build(t, "kubernetes", "kubelet", kubernetesFlags, "k8s.io/kubernetes/cmd/kubelet")
}

// ContainerRuntime returns the path of a container runtime for a kubelet. It starts
// no container.
func ContainerRuntime(t testing.TB) string {
	t.Helper()
	return build(t, "kubernetes", "runtime", "-s -w", "./runtime", "runtime")
}

// Registrar returns the path of a program that tells a kubelet of a CSI driver.
func Registrar(t testing.TB) string {
	t.Helper()
	return build(t, "kubernetes", "registrar", "-s -w", "./registrar", "registrar")
}

// TopoLVM returns the path of TopoLVM, a CSI driver for logical volumes, built by the
// first who asks, and of the definition that it wants of a cluster.
func TopoLVM(t testing.TB) (program, definition string) {
	t.Helper()
	const source = "github.com/topolvm/topolvm"
	program = build(t, "topolvm", "hypertopolvm", "-s -w -X "+source+".Version=0.41.0", source+"/cmd/hypertopolvm")
	cmd := exec.Command(installed(t, "go"), "mod", "download", "-json", source)
	cmd.Dir = module(t, "topolvm")
	cmd.Env = append(os.Environ(), "GOFLAGS=", "GOWORK=off")
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v", cmd, err)
	}
	var m struct{ Dir string }
	if err := json.Unmarshal(out, &m); err != nil {
		t.Fatal(err)
	}
	return program, filepath.Join(m.Dir, "config", "crd", "bases", "topolvm.io_logicalvolumes.yaml")
}

// CSISanity returns the path of csi-sanity, which asks a CSI driver what each must
// answer.
func CSISanity(t testing.TB) string {
	t.Helper()
	return build(t, "csisanity", "csi-sanity", "-s -w", "github.com/kubernetes-csi/csi-test/v5/cmd/csi-sanity")
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

// build returns the path of a program in Go from a module beside this file, built by
// the first who asks. It is made from the module's requirements and the folders of
// its own that are named.
func build(t testing.TB, from, name, flags, pkg string, folders ...string) string {
	t.Helper()
	dir, tool := module(t, from), installed(t, "go")
	sources := []string{filepath.Join(dir, "go.mod"), filepath.Join(dir, "go.sum")}
	for _, folder := range folders {
		sources = append(sources, filepath.Join(dir, folder))
	}
	entry := cached(t, name, sources, runtime.Version()+" "+flags+" "+pkg, func(out string) *exec.Cmd {
		cmd := exec.Command(tool, "build", "-trimpath", "-ldflags", flags, "-o", filepath.Join(out, name), pkg)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "GOFLAGS=-buildvcs=false", "GOWORK=off", "CGO_ENABLED=0", "GOEXPERIMENT=")
		return cmd
	})
	return filepath.Join(entry, name)
}

// azurite returns the paths of node and of azurite's script, installed by the
// first who asks.
func azurite(t testing.TB) (node, script string) {
	t.Helper()
	source := filepath.Join(module(t, "servers"), "azurite")
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
