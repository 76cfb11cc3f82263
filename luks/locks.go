package luks

import (
	"context"
	"sync"
)

// locks holds one lock for each key that somebody holds or waits for. Operations
// on one volume exclude each other; those on two volumes do not meet.
type locks struct {
	mu   sync.Mutex
	held map[string]*lock
}

type lock struct {
	users int
	token chan struct{}
}

var (
	volumes  = locks{held: map[string]*lock{}}
	mappings = locks{held: map[string]*lock{}}
)

// acquire waits for key until ctx ends. A caller that needs a volume and a
// mapping takes the volume first.
func (l *locks) acquire(ctx context.Context, key string) (release func(), err error) {
	l.mu.Lock()
	k, ok := l.held[key]
	if !ok {
		k = &lock{token: make(chan struct{}, 1)}
		l.held[key] = k
	}
	k.users++
	l.mu.Unlock()

	leave := func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if k.users--; k.users == 0 {
			delete(l.held, key)
		}
	}
	select {
	case k.token <- struct{}{}:
		return func() { <-k.token; leave() }, nil
	case <-ctx.Done():
		leave()
		return nil, ctx.Err()
	}
}
