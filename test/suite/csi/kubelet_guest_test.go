//go:build umlguest

package csi

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"

	"github.com/keyagent/keyagent/test/sim/cluster"
)

// kubelet is a real one, on a runtime that starts no container: its pods are about
// their volumes.
type kubelet struct {
	t       testing.TB
	b       *bed
	process *cluster.Process
}

func (k *kubelet) String() string { return "kubelet:\n" + k.process.Log.Tail() + "\n" + k.b.String() }

const kubeletConfig = `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
containerRuntimeEndpoint: unix:///run/runtime.sock
cgroupsPerQOS: false
enforceNodeAllocatable: []
cgroupDriver: cgroupfs
failSwapOn: false
failCgroupV1: false
localStorageCapacityIsolation: false
resolvConf: ""
syncFrequency: 2s
readOnlyPort: 0
podLogsDir: /run/podlogs
volumePluginDir: /run/flexvolumes
`

// processorInfo has a line that a kubelet wants and this kernel's does not have.
const processorInfo = "processor\t: 0\nvendor_id\t: UML\nmodel name\t: UML\ncpu MHz\t\t: 2000.000\nphysical id\t: 0\nsiblings\t: 1\ncore id\t\t: 0\ncpu cores\t: 1\n"

// forKubelets is what all kubelets of this guest need.
var forKubelets = sync.OnceFunc(func() {
	t := forever{}
	check(t, os.WriteFile("/run/cpuinfo", []byte(processorInfo), 0o600))
	tool(t, "mount", "--bind", "/run/cpuinfo", "/proc/cpuinfo")
	tool(t, "mount", "-t", "cgroup2", "none", "/sys/fs/cgroup")
	check(t, os.WriteFile("/run/kubelet.yaml", []byte(kubeletConfig), 0o600))
	check(t, os.MkdirAll(kubeletDir+"/plugins_registry", 0o755))
	cluster.Start(t, "/run", os.Getenv("KEYAGENT_TEST_RUNTIME"), "/run/runtime.sock")
})

// startKubelet starts a kubelet that is told of a driver at a socket.
func startKubelet(t testing.TB, b *bed, socket string) *kubelet {
	t.Helper()
	forKubelets()
	if socket == b.endpoints.node { // the proxy registers itself
		registration := kubeletDir + "/plugins_registry/" + driverName + "-reg.sock"
		cluster.Start(t, "/run", os.Getenv("KEYAGENT_TEST_REGISTRAR"), registration, driverName, socket)
		t.Cleanup(func() { os.Remove(registration) })
	}
	k := &kubelet{t: t, b: b}
	k.start()
	eventually(t, "the kubelet knows the driver", func() bool {
		var n struct {
			Spec struct{ Drivers []struct{ Name string } }
		}
		b.get("/apis/storage.k8s.io/v1/csinodes/guest", &n)
		return slices.ContainsFunc(n.Spec.Drivers, func(d struct{ Name string }) bool { return d.Name == driverName })
	}, k)
	return k
}

func (k *kubelet) start() {
	k.t.Helper()
	// One of 1.37.1 that starts again removes what is in its working directory, with the
	// device of a pod whose driver does not stage.
	const dir = "/run/kubelet"
	check(k.t, os.MkdirAll(dir, 0o755))
	k.process = cluster.Start(k.t, dir, os.Getenv("KEYAGENT_TEST_KUBELET"), "--config", "/run/kubelet.yaml",
		"--kubeconfig", k.b.kubeconfig, "--hostname-override", "guest", "--root-dir", kubeletDir, "--cert-dir", "/run/kubelet-pki", "-v=2")
	eventually(k.t, "the node is ready", func() bool {
		if k.process.Ended() {
			k.t.Fatalf("the kubelet ended:\n%s", k.process.Log.Tail())
		}
		var n struct {
			Status struct {
				Conditions []struct{ Type, Status string }
			}
		}
		k.b.get("/api/v1/nodes/guest", &n)
		return slices.Contains(n.Status.Conditions, struct{ Type, Status string }{"Ready", "True"})
	}, k)
}

// restart kills the kubelet and starts it again.
func (k *kubelet) restart() {
	k.t.Helper()
	k.process.Kill()
	k.start()
}

// get decodes an object, and says whether it is there.
func (b *bed) get(path string, into any) bool {
	status, data, err := b.Request(http.MethodGet, path, "")
	return err == nil && status == http.StatusOK && json.Unmarshal(data, into) == nil
}

const (
	claims  = "/api/v1/namespaces/default/persistentvolumeclaims"
	volumes = "/api/v1/persistentvolumes"
	pods    = "/api/v1/namespaces/default/pods"
)

// claim makes a volume of the driver, and a claim that is bound to it, as provisioner
// and controller-manager do. Both have the volume's name.
func (b *bed) claim(t testing.TB, v *volume, name string, size int64) {
	t.Helper()
	mode, kind := "Filesystem", ""
	if v.capability.GetBlock() != nil {
		mode = "Block"
	} else {
		kind = v.capability.GetMount().FsType
	}
	var c struct {
		Metadata struct{ UID string }
	}
	check(t, json.Unmarshal(b.Create(t, claims, fmt.Sprintf(`{"apiVersion":"v1","kind":"PersistentVolumeClaim","metadata":{"name":%q},
"spec":{"accessModes":["ReadWriteOnce"],"volumeMode":%q,"storageClassName":"thin","volumeName":%q,"resources":{"requests":{"storage":"%d"}}}}`,
		name, mode, name, size)), &c))
	attributes, err := json.Marshal(v.context)
	check(t, err)
	b.Create(t, volumes, fmt.Sprintf(`{"apiVersion":"v1","kind":"PersistentVolume","metadata":{"name":%q},
"spec":{"capacity":{"storage":"%d"},"accessModes":["ReadWriteOnce"],"volumeMode":%q,"storageClassName":"thin","persistentVolumeReclaimPolicy":"Retain",
"claimRef":{"namespace":"default","name":%q,"uid":%q},"csi":{"driver":%q,"volumeHandle":%q,"fsType":%q,"volumeAttributes":%s}}}`,
		name, size, mode, name, c.Metadata.UID, driverName, v.id, kind, attributes))
	b.Patch(t, claims+"/"+name+"/status", fmt.Sprintf(`{"status":{"phase":"Bound","accessModes":["ReadWriteOnce"],"capacity":{"storage":"%d"}}}`, size))
	t.Cleanup(func() {
		for _, path := range []string{claims + "/" + name, volumes + "/" + name} {
			_, _, _ = b.Request(http.MethodPatch, path, `{"metadata":{"finalizers":null}}`)
			_, _, _ = b.Request(http.MethodDelete, path, "")
		}
	})
}

// pod is one with a file system and a block device.
type pod struct {
	k                             *kubelet
	name, uid, filesystem, device string
}

// pod makes one of two claims. It is not waited for.
func (k *kubelet) pod(t testing.TB, name, filesystem, device string) *pod {
	t.Helper()
	var p struct {
		Metadata struct{ UID string }
	}
	check(t, json.Unmarshal(k.b.Create(t, pods, fmt.Sprintf(`{"apiVersion":"v1","kind":"Pod","metadata":{"name":%q},
"spec":{"nodeName":"guest","automountServiceAccountToken":false,"enableServiceLinks":false,"terminationGracePeriodSeconds":1,
"securityContext":{"fsGroup":4321},
"containers":[{"name":"c","image":"none","imagePullPolicy":"IfNotPresent",
"volumeMounts":[{"name":"f","mountPath":"/f"}],"volumeDevices":[{"name":"b","devicePath":"/dev/b"}]}],
"volumes":[{"name":"f","persistentVolumeClaim":{"claimName":%q}},{"name":"b","persistentVolumeClaim":{"claimName":%q}}]}}`,
		name, filesystem, device)), &p))
	dir := kubeletDir + "/pods/" + p.Metadata.UID
	return &pod{
		k: k, name: name, uid: p.Metadata.UID,
		filesystem: dir + "/volumes/kubernetes.io~csi/" + filesystem + "/mount",
		device:     kubeletDir + "/plugins/kubernetes.io/csi/volumeDevices/publish/" + device + "/" + p.Metadata.UID,
	}
}

// running waits until the pod runs.
func (p *pod) running(t testing.TB) {
	t.Helper()
	eventually(t, "the pod runs", func() bool {
		var s struct{ Status struct{ Phase string } }
		return p.k.b.get(pods+"/"+p.name, &s) && s.Status.Phase == "Running"
	}, p.k, p)
}

// String is what Kubernetes says of the pod.
func (p *pod) String() string {
	var events struct {
		Items []struct{ Reason, Message string }
	}
	p.k.b.get("/api/v1/namespaces/default/events", &events)
	var s strings.Builder
	for _, e := range events.Items {
		fmt.Fprintf(&s, "event: %s: %s\n", e.Reason, e.Message)
	}
	return s.String()
}

// delete deletes the pod, and waits until nothing is left of it on the node.
func (p *pod) delete(t testing.TB) {
	t.Helper()
	if status, data, err := p.k.b.Request(http.MethodDelete, pods+"/"+p.name, ""); err != nil || status != http.StatusOK {
		t.Fatalf("delete: %d %s %v", status, data, err)
	}
	eventually(t, "the pod is gone", func() bool {
		_, err := os.Stat(kubeletDir + "/pods/" + p.uid)
		return errors.Is(err, os.ErrNotExist) && len(mounts(t, p.uid)) == 0 && !p.k.b.get(pods+"/"+p.name, new(struct{}))
	}, p.k)
}

// mounts are the mounts of this guest whose lines hold a word.
func mounts(t testing.TB, word string) (lines []string) {
	t.Helper()
	for line := range strings.Lines(string(must[[]byte](t)(os.ReadFile("/proc/self/mounts")))) {
		if strings.Contains(line, word) {
			lines = append(lines, line)
		}
	}
	return lines
}

// expand makes a claim's volume larger, as the resizer does; the kubelet does the rest.
func (k *kubelet) expand(t testing.TB, v *volume, name string, size int64) {
	t.Helper()
	call(t, v.d.controller.ControllerExpandVolume, &csi.ControllerExpandVolumeRequest{
		VolumeId: v.id, CapacityRange: &csi.CapacityRange{RequiredBytes: size}, VolumeCapability: v.capability,
	})
	k.b.Patch(t, volumes+"/"+name, fmt.Sprintf(`{"spec":{"capacity":{"storage":"%d"}}}`, size))
	k.b.Patch(t, claims+"/"+name, fmt.Sprintf(`{"spec":{"resources":{"requests":{"storage":"%d"}}}}`, size))
	k.b.Patch(t, claims+"/"+name+"/status", fmt.Sprintf(`{"status":{"allocatedResources":{"storage":"%d"},"allocatedResourceStatuses":{"storage":"NodeResizePending"}}}`, size))
}

// life takes a pod with a file system and a block device through a kubelet: it is
// published and written, grows, the kubelet starts again in the middle, and is deleted.
// middle runs while the pod does. It says whether the disk below held what was written.
func life(t *testing.T, b *bed, e endpoints, name string, middle func(*kubelet, *pod)) (leaked bool) {
	t.Helper()
	began := time.Now()
	done := func(what string) { t.Logf("%s after %v", what, time.Since(began).Round(100*time.Millisecond)) }
	d := dial(t, e)
	k := startKubelet(t, b, e.node)
	done("kubelet ready")
	f, raw := create(t, d, name+"-f", 64<<20, filesystem("ext4")), create(t, d, name+"-b", 64<<20, block())
	b.claim(t, f, name+"-f", 64<<20)
	b.claim(t, raw, name+"-b", 64<<20)
	p := k.pod(t, name, name+"-f", name+"-b")
	p.running(t)
	done("pod running")

	plain := pattern()
	file := filepath.Join(p.filesystem, "file")
	w := must[*os.File](t)(os.Create(file))
	_, err := w.Write(plain)
	check(t, errors.Join(err, w.Sync(), w.Close()))
	writeBlocks(t, p.device, plain, 1<<20)
	if middle != nil {
		middle(k, p)
	}

	before := sizeOf(t, p.filesystem)
	k.expand(t, f, name+"-f", 128<<20)
	eventually(t, "the file system is larger", func() bool { return sizeOf(t, p.filesystem) > before*3/2 }, k, p)
	done("expanded")
	k.restart()
	done("kubelet restarted")
	if got := must[[]byte](t)(os.ReadFile(file)); string(got) != string(plain) {
		t.Errorf("the file reads %q", got)
	}
	if !found(t, p.device, plain) {
		t.Error("the pod does not read what it wrote to its device")
	}
	leaked = found(t, disk, plain)
	p.delete(t)
	done("pod deleted")
	return leaked
}

// sizeOf is the size of a mounted file system in bytes.
func sizeOf(t testing.TB, path string) int64 {
	t.Helper()
	var s unix.Statfs_t
	check(t, unix.Statfs(path, &s))
	return int64(s.Blocks) * s.Bsize
}
