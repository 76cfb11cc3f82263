package keyservice

import (
	"sync"
	"time"
)

// What strangers can make the log say is bounded: a burst, so that each machine of a
// fleet that is refused at once is found under its correlation ID, and a rate.
const (
	strangersBurst = 200
	strangersRate  = 10 // lines a second
)

// maxErrorText bounds an error in the log: certificates of strangers hold long names.
const maxErrorText = 2 << 10

// strangers decides which of the lines that anybody can cause are written.
type strangers struct {
	now func() time.Time

	mu       sync.Mutex
	left     float64
	last     time.Time
	withheld int
}

func newStrangers(now func() time.Time) *strangers {
	return &strangers{now: now, left: strangersBurst, last: now()}
}

// allow reports whether a line may be written, and how many were not since the last
// one that was.
func (s *strangers) allow() (withheld int, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	s.left = min(strangersBurst, s.left+now.Sub(s.last).Seconds()*strangersRate)
	s.last = now
	if s.left < 1 {
		s.withheld++
		return 0, false
	}
	s.left--
	withheld, s.withheld = s.withheld, 0
	return withheld, true
}

// brief is an error's text, cut.
func brief(err error) string {
	text := err.Error()
	if len(text) > maxErrorText {
		return text[:maxErrorText] + "…"
	}
	return text
}
