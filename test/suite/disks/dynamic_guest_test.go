//go:build umlguest

package disks

import (
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	nodev1 "github.com/keyagent/keyagent/api/keyagent/node/v1"
)

func (m *machine) client(t *testing.T) nodev1.NodeClient {
	t.Helper()
	c := must[*grpc.ClientConn](t)(grpc.NewClient("unix:"+filepath.Join(m.dir, "agent.sock"), grpc.WithTransportCredentials(insecure.NewCredentials())))
	t.Cleanup(func() { c.Close() })
	return nodev1.NewNodeClient(c)
}

// TestDiskVolumesThatNoFileNames: a caller describes them, many at a time.
func TestDiskVolumesThatNoFileNames(t *testing.T) {
	n := *first(t)
	n.patient = true // as a node is: 256 volumes at once are much for a guest without a processor of its own
	dir := t.TempDir()
	n.more = fmt.Sprintf(`dynamic: [{uids: [0], volumes: ["v-pvc-*"], devices: ["/dev/loop*"], mounts: ["%s/*"], filesystem: ext4, format: true}]`, dir)
	n.configure(t)
	a := n.start(t)
	a.waitFor(t, "msg=ready")
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Minute)
	defer cancel()
	api := n.client(t)

	device, at := disk(t, diskSize), filepath.Join(dir, "one")
	removed(t, "v-pvc-one")
	t.Cleanup(func() { _ = exec.Command("umount", at).Run() })
	stream := must[grpc.ServerStreamingClient[nodev1.OpenEvent]](t)(api.OpenProgress(ctx, &nodev1.OpenRequest{Id: "v-pvc-one", Device: device, Format: true, MountPoint: at}))
	var steps []string
	for {
		e, err := stream.Recv()
		if err != nil {
			break
		}
		steps = append(steps, e.GetStep())
	}
	if got := strings.Join(steps, " "); !strings.Contains(got, "key formatted mapped filesystem confirmed") || !strings.HasSuffix(got, "done") {
		t.Errorf("steps are %q\n%s", got, tail(a.log.String()))
	}
	if !mounted(at) {
		t.Error("it is not mounted")
	}
	options := tool(t, "findmnt", "-no", "OPTIONS", at)
	if !strings.Contains(options, "nosuid") || !strings.Contains(options, "nodev") {
		t.Errorf("mounted with %s", options)
	}
	for name, r := range map[string]*nodev1.OpenRequest{
		"another ID":               {Id: "v-other", Device: device},
		"a device that is in use":  {Id: "v-pvc-two", Device: device, Format: true},
		"another place":            {Id: "v-pvc-two", Device: device, MountPoint: "/etc"},
		"a device outside of rule": {Id: "v-pvc-two", Device: "/dev/ubda"},
	} {
		if _, err := api.Open(ctx, r); err == nil {
			t.Errorf("%s was opened", name)
		}
	}
	// An agent that is killed knows its volumes again.
	a.kill()
	a = n.start(t)
	a.waitFor(t, "msg=ready")
	if v := must[*nodev1.StatusResponse](t)(api.Status(ctx, &nodev1.StatusRequest{Id: "v-pvc-one"})); v.GetVolume().GetState() != "mounted" || !v.GetVolume().GetDynamic() {
		t.Errorf("after a restart it is %v", v)
	}
	must[*nodev1.SuspendResponse](t)(api.Suspend(ctx, &nodev1.SuspendRequest{Id: "v-pvc-one"}))
	if info := tool(t, "dmsetup", "info", "-c", "--noheadings", "-o", "suspended", "v-pvc-one"); info != "Suspended" {
		t.Errorf("it is %q", info)
	}
	must[*nodev1.ResumeResponse](t)(api.Resume(ctx, &nodev1.ResumeRequest{Id: "v-pvc-one"}))
	put(t, filepath.Join(at, "note"), "kept")
	must[*nodev1.CloseResponse](t)(api.Close(ctx, &nodev1.CloseRequest{Id: "v-pvc-one"}))

	many(ctx, t, api, rounds(t, 16))
}

// many opens volumes beside each other: as many as there are, in a full run 256.
func many(ctx context.Context, t *testing.T, api nodev1.NodeClient, n int) {
	t.Helper()
	began := time.Now()
	var group sync.WaitGroup
	for i := range n {
		id, device := fmt.Sprintf("v-pvc-many-%d", i), disk(t, 17*mib)
		removed(t, id)
		group.Go(func() {
			r, err := api.Open(ctx, &nodev1.OpenRequest{Id: id, Device: device, Filesystem: "none", Format: true})
			if err != nil || !r.GetCreated() && r.GetVolume().GetState() != "open" {
				t.Errorf("%s: %v, %v", id, r, err)
			}
		})
	}
	group.Wait()
	t.Logf("%d volumes took %v", n, time.Since(began).Round(time.Millisecond))
	listed, token := 0, ""
	for {
		page := must[*nodev1.ListResponse](t)(api.List(ctx, &nodev1.ListRequest{PageSize: 10, PageToken: token}))
		for _, v := range page.GetVolumes() {
			if strings.HasPrefix(v.GetId(), "v-pvc-many-") && v.GetState() == "open" {
				listed++
			}
		}
		if token = page.GetNextPageToken(); token == "" {
			break
		}
	}
	if listed != n {
		t.Errorf("%d of %d are listed as open", listed, n)
	}
	for i := range n {
		group.Go(func() {
			if _, err := api.Close(ctx, &nodev1.CloseRequest{Id: fmt.Sprintf("v-pvc-many-%d", i)}); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
}
