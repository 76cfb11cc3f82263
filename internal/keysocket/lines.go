package keysocket

import (
	"sync"
	"time"
)

// lines bounds what callers can make the log say: a burst, and a rate. The zero value
// has its burst.
type lines struct {
	mu       sync.Mutex
	spent    int
	last     time.Time
	withheld int
}

// allow reports whether a line may be written, and how many were not since the last one.
func (l *lines) allow(now time.Time) (withheld int, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if back := int(now.Sub(l.last) / linesEvery); back > 0 {
		l.spent = max(0, l.spent-back)
		l.last = now
	}
	if l.spent >= linesBurst {
		l.withheld++
		return 0, false
	}
	l.spent++
	withheld, l.withheld = l.withheld, 0
	return withheld, true
}
