package replicas

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/keyclient"
	"github.com/keyagent/keyagent/test/sim/emulator"
)

// nodes is how many ask: make test-full sets more.
func nodes(t *testing.T) int {
	t.Helper()
	if text := os.Getenv("KEYAGENT_TEST_NODES"); text != "" {
		return must[int](t)(strconv.Atoi(text))
	}
	return 60
}

// victim is what is killed and started again.
type victim struct {
	name  string
	kill  func()
	start func()
}

// run is what nodes have been told.
type run struct {
	t    *testing.T
	done atomic.Int64 // requests that were answered

	mu        sync.Mutex
	keys      map[string][sha256.Size]byte // by volume, of every answer
	confirmed map[string]keyclient.MACs    // what was acknowledged
	last      error                        // of a node
}

// saw compares a key with what anybody got of the volume before.
func (r *run) saw(volume string, k *keyclient.Key) {
	sum := digest(k)
	r.mu.Lock()
	defer r.mu.Unlock()
	if known, ok := r.keys[volume]; ok && known != sum {
		r.t.Errorf("volume %s has two keys", volume)
	}
	r.keys[volume] = sum
	r.done.Add(1)
}

// provision creates the node's own volume, from wherever an attempt before was cut off.
func (r *run) provision(ctx context.Context, n *node, volume string) error {
	k, err := n.client.GetKey(ctx, keyclient.Request{Volume: volume, Format: true, LeaseID: n.lease})
	if err != nil {
		return err
	}
	defer k.Close()
	defer func() {
		if k.Lease != nil {
			n.lease = k.Lease.ID
		}
	}()
	switch k.State {
	case keyclient.Active:
		r.saw(volume, k)
		return nil
	case keyclient.Pending:
		var m keyclient.MACs
		for _, part := range []*[32]byte{&m.Header, &m.Copies[0], &m.Copies[1]} {
			rand.Read(part[:])
		}
		if _, err := n.client.BeginFormat(ctx, k, m); err != nil {
			return err
		}
		if err := n.client.HeaderStands(ctx, k); err != nil {
			return err
		}
	}
	if err := n.client.Confirm(ctx, k); err != nil {
		return err
	}
	r.mu.Lock()
	r.confirmed[volume] = k.MACs
	r.mu.Unlock()
	r.saw(volume, k)
	return nil
}

// open gets the key of the node's own volume, and of one that it shares.
func (r *run) open(ctx context.Context, n *node, own, shared string) error {
	k, err := n.client.GetKey(ctx, keyclient.Request{Volume: own, LeaseID: n.lease})
	if err != nil {
		return err
	}
	defer k.Close()
	r.saw(own, k)
	if k.Lease == nil {
		return errors.New("no lease")
	}
	n.lease = k.Lease.ID
	r.mu.Lock()
	m, acknowledged := r.confirmed[own]
	r.mu.Unlock()
	if acknowledged && m != k.MACs {
		r.t.Errorf("volume %s has other MACs than were confirmed", own)
	}
	d := keyclient.Diskless{Keys: n.client, Volume: shared, Domain: "test"}
	s, err := d.Obtain(ctx)
	if err != nil {
		return err
	}
	defer s.Close()
	r.saw(shared, s)
	return nil
}

// transient reports an error that a node meets while others are killed, and tries again after.
func transient(err error) bool {
	switch failure.Of(err).Class {
	case failure.Unreachable, failure.State, failure.Held, failure.Internal, failure.NotFound:
		return true
	}
	return false
}

// story has all nodes ask all the time, while one victim after the other is killed: in the
// meantime the others serve on. In the end each node gets its keys, which are the ones that it
// had, and nothing that was acknowledged is gone.
func story(t *testing.T, w *world, victims []victim) {
	t.Helper()
	n := nodes(t)
	r := &run{t: t, keys: map[string][sha256.Size]byte{}, confirmed: map[string]keyclient.MACs{}}
	all := make([]*node, n)
	for i := range all {
		all[i] = w.node(i)
	}
	names := func(i int) (own, shared string) { return fmt.Sprint("own-", i), fmt.Sprint("shared-", i%(n/5+1)) }
	began := time.Now()
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for i, one := range all {
		own, shared := names(i)
		wg.Go(func() {
			made := false
			for ctx.Err() == nil {
				var err error
				if !made {
					err = r.provision(ctx, one, own)
					made = err == nil
				} else {
					err = r.open(ctx, one, own, shared)
				}
				if err == nil || ctx.Err() != nil {
					continue
				}
				if !transient(err) {
					t.Errorf("%s: %v", one.name, err)
					return
				}
				r.mu.Lock()
				r.last = err
				r.mu.Unlock()
			}
		})
	}
	// progress waits until as many requests more were answered.
	progress := func(more int64) {
		t.Helper()
		want := r.done.Load() + more
		for deadline := time.Now().Add(2 * time.Minute); r.done.Load() < want; time.Sleep(20 * time.Millisecond) {
			if time.Now().After(deadline) {
				r.mu.Lock()
				defer r.mu.Unlock()
				for _, one := range w.replicas {
					t.Logf("%s: %s", one.dir, one.p.Log.Tail())
				}
				t.Fatalf("nobody is served: %d of %d requests; a node's last error: %v", r.done.Load(), want, r.last)
			}
			if t.Failed() {
				stop()
				t.FailNow()
			}
		}
	}
	progress(int64(n) / 2) // in the middle of creating
	for _, v := range victims {
		before := r.done.Load()
		v.kill()
		progress(int64(n) / 2)
		v.start()
		progress(int64(n) / 4)
		t.Logf("%s was killed and came back: %d requests meanwhile", v.name, r.done.Load()-before)
	}
	stop()
	wg.Wait()
	served := r.done.Load()
	t.Logf("%d nodes, %d requests in %s", n, served, time.Since(began).Round(time.Second))
	var last sync.WaitGroup
	for i, one := range all {
		own, shared := names(i)
		last.Go(func() {
			// An answer that brought a lease may have been lost: until that lease ends.
			for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(time.Second) {
				err := r.provision(t.Context(), one, own)
				if err == nil {
					err = r.open(t.Context(), one, own, shared)
				}
				if err == nil {
					return
				}
				if failure.Of(err).Class != failure.Held || time.Now().After(deadline) {
					t.Errorf("in the end: %s: %v", one.name, err)
					return
				}
			}
		})
	}
	last.Wait()
	if len(r.keys) < n {
		t.Errorf("keys of %d volumes were seen, of %d nodes", len(r.keys), n)
	}
	for _, one := range w.replicas {
		if strings.Contains(one.p.Log.String(), "panic") {
			t.Errorf("%s: %s", one.dir, one.p.Log.Tail())
		}
	}
}

func (w *world) victims() []victim {
	var out []victim
	for i, r := range w.replicas {
		out = append(out, victim{fmt.Sprint("replica ", i), r.Kill, func() { r.start() }})
	}
	return out
}

func TestReplicasAndMembersOfEtcdAreKilledInTurn(t *testing.T) {
	members := emulator.EtcdCluster(t, 3)
	var endpoints []string
	for _, m := range members {
		endpoints = append(endpoints, m.URL)
	}
	w := newWorld(t, "storage://etcd?endpoints="+strings.Join(endpoints, ",")+"&prefix=keyagent/")
	w.addReplicas(3)
	victims := w.victims()
	for i, m := range members {
		victims = append(victims, victim{fmt.Sprint("member ", i, " of etcd"), m.Kill, func() {
			if err := m.Start(); err != nil {
				t.Fatal(err)
			}
		}})
	}
	story(t, w, victims)
}

func TestReplicasOverS3AreKilledInTurn(t *testing.T) {
	server := emulator.S3(t)
	w := newWorld(t, "storage://aws?bucket=records&createBucket=true&region=us-east-1&endpoint="+server.URL)
	w.env = []string{"AWS_ACCESS_KEY_ID=" + server.AccessKey, "AWS_SECRET_ACCESS_KEY=" + server.Secret}
	w.addReplicas(3)
	story(t, w, w.victims())
}
