package keyservice

import (
	"context"
	"os"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/peer"

	keyservicev1 "github.com/keyagent/keyagent/api/keyagent/keyservice/v1"
	"github.com/keyagent/keyagent/internal/audit"
	"github.com/keyagent/keyagent/internal/failure"
)

func (w *world) ask(m keyservicev1.KeyServiceClient, change func(*keyservicev1.GetKeyRequest)) (*keyservicev1.GetKeyResponse, error) {
	w.t.Helper()
	var p peer.Peer
	req := &keyservicev1.GetKeyRequest{VolumeId: "data-1", Operation: openOp, Protocol: keyservicev1.Protocol, Node: "node-1",
		Offline: &keyservicev1.OfflineLimits{ForMs: 7_200_000, Boots: 2}}
	if change != nil {
		change(req)
	}
	resp, err := m.GetKey(w.t.Context(), req, grpc.Peer(&p))
	if err == nil { // as the node does, which refuses what was changed on the way
		dek, openErr := openedBy(w.t, &p, req, resp)
		if openErr != nil {
			w.t.Fatal(openErr)
		}
		dek.Close()
	}
	return resp, failure.FromStatus(err)
}

func (w *world) audited(event string) (out []audit.Entry) {
	w.t.Helper()
	f, err := os.Open(w.cfg.Audit)
	if err != nil {
		w.t.Fatal(err)
	}
	defer f.Close()
	if _, err := audit.Verify(f, func(e audit.Entry) {
		if e.Event == event {
			out = append(out, e)
		}
	}); err != nil {
		w.t.Fatal(err)
	}
	return out
}

func TestAKeyIsLeftWithAMachineAsTheGrantSays(t *testing.T) {
	w := newWorld(t)
	m := w.machine()
	_, lease := w.provision(m, "data-1")
	for _, tt := range []struct {
		name, grant string
		change      func(*keyservicev1.GetKeyRequest)
		forMs       uint64
		boots       uint32
		why         string
	}{
		{"nothing of it in the grant", "", nil, 0, 0, "its grant does not allow it"},
		{"as much as the node wants", ", offline: {for: 24h, boots: 3}", nil, 7_200_000, 2, ""},
		{"as much as the grant allows", ", offline: {for: 1h, boots: 1}", nil, 3_600_000, 1, ""},
		{"as much as can be counted", ", offline: {for: 1h, boots: 1}", func(r *keyservicev1.GetKeyRequest) { r.Offline.ForMs, r.Offline.Boots = 1<<64-1, 1<<32-1 }, 3_600_000, 1, ""},
		{"no time", ", offline: {for: 1h, boots: 1}", func(r *keyservicev1.GetKeyRequest) { r.Offline.ForMs = 0 }, 0, 0, "asks for nothing"},
		{"no boots", ", offline: {for: 1h, boots: 1}", func(r *keyservicev1.GetKeyRequest) { r.Offline.Boots = 0 }, 0, 0, "asks for nothing"},
		{"not asked for", ", offline: {for: 1h, boots: 1}", func(r *keyservicev1.GetKeyRequest) { r.Offline = nil }, 0, 0, ""},
		{"for readers", ", offline: {for: 1h, boots: 1}", func(r *keyservicev1.GetKeyRequest) { r.ReadOnly = true }, 0, 0, "opened for writing"},
		{"an old node", ", offline: {for: 1h, boots: 1}", func(r *keyservicev1.GetKeyRequest) { r.Protocol = 1 }, 0, 0, "no lease"},
	} {
		w.grant(tt.grant)
		resp, err := w.ask(m, func(r *keyservicev1.GetKeyRequest) {
			r.LeaseId = lease.GetId()
			if tt.change != nil {
				tt.change(r)
			}
		})
		if err != nil {
			t.Errorf("%s: %v", tt.name, err)
			continue
		}
		if resp.GetLease() != nil {
			lease = resp.GetLease()
		}
		o := resp.GetOffline()
		if (o != nil) != (tt.boots > 0) || o.GetLimits().GetForMs() != tt.forMs || o.GetLimits().GetBoots() != tt.boots || !strings.Contains(resp.GetOfflineRefused(), tt.why) {
			t.Errorf("%s: %v, %q", tt.name, o, resp.GetOfflineRefused())
		}
		if o != nil && (len(o.GetPcrs()) != 1 || o.GetPcrs()[0] != 4 || len(o.GetPcrDigest()) != 32) {
			t.Errorf("%s: %v", tt.name, o)
		}
		all := w.audited("get-key")
		last := all[len(all)-1].Offline
		if want := map[bool]string{true: "for ", false: tt.why}[o != nil]; !strings.Contains(last, want) || (last == "") != (o == nil && tt.why == "") {
			t.Errorf("%s: audited %q", tt.name, last)
		}
		if tt.why != "" && !strings.Contains(w.logged.String(), tt.why) {
			t.Errorf("%s: the service's log does not say so", tt.name)
		}
	}
}

// A lease that ends by itself lets another node write while this one opens by its TPM. It
// stays so when the grant is another one.
func TestNoKeyIsLeftWithAMachineWhoseLeaseEnds(t *testing.T) {
	w := newWorld(t)
	w.grant(", takeover: expiry, lease: 24h")
	m := w.machine()
	_, lease := w.provision(m, "data-1")
	w.grant(", offline: {for: 1h, boots: 1}")
	resp, err := w.ask(m, func(r *keyservicev1.GetKeyRequest) { r.LeaseId = lease.GetId() })
	if err != nil || resp.GetOffline() != nil || !strings.Contains(resp.GetOfflineRefused(), "ends by itself") {
		t.Errorf("%v, %q, %v", resp.GetOffline(), resp.GetOfflineRefused(), err)
	}
}

// What was opened without the service is in the audit log with the next contact, whether it
// is allowed or refused.
func TestAnOpeningWithoutTheServiceIsAudited(t *testing.T) {
	w := newWorld(t)
	m := w.machine()
	_, lease := w.provision(m, "data-1")
	report := &keyservicev1.OfflineReport{Boots: 2, SinceMs: 3_600_000}
	contact := func(ctx context.Context) error {
		_, err := m.RenewLease(ctx, &keyservicev1.RenewLeaseRequest{VolumeId: "data-1", LeaseId: lease.GetId(), OpenedOffline: report})
		return failure.FromStatus(err)
	}
	if err := contact(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := w.ask(m, func(r *keyservicev1.GetKeyRequest) { r.LeaseId, r.OpenedOffline = lease.GetId(), report }); err != nil {
		t.Fatal(err)
	}
	w.writePolicy(w.pcr(4), `["other-*"]`, "[open, format]")
	if err := w.server.Reload(); err != nil {
		t.Fatal(err)
	}
	wantClass(t, contact(t.Context()), failure.PolicyDenied)
	all := w.audited("opened-offline")
	if len(all) != 3 {
		t.Fatalf("%d entries: %+v", len(all), all)
	}
	for _, e := range all {
		if e.Volume != "data-1" || !strings.HasPrefix(e.Identity, "tpm:") || e.Offline != "in 2 boots, the first time 1h0m0s ago by the TPM's clock" || e.Result != "reported" {
			t.Errorf("%+v", e)
		}
	}
	report.SinceMs, report.Boots = 1<<64-1, 1<<32-1
	wantClass(t, contact(t.Context()), failure.PolicyDenied)
}
