package secret

import (
	"os"
	"sync"
)

// A mapping costs four system calls, and keys are short and made often. Secrets of
// up to slotSize bytes therefore share pages: each page is a mapping as any other,
// cut into slots, and stays locked while a slot of it is in use.
const (
	slotSize = 128
	// spare is how many pages without a slot in use are kept for the next.
	spare = 8
)

// area is where one secret is: a slot of a page, or a mapping of its own.
type area struct {
	data []byte
	page *page // nil for a mapping of its own
	slot int   // in page
	own  *mapping
}

// page is a mapping whose slots are given out.
type page struct {
	mapping *mapping
	free    []int // slots
}

// slots gives out slots of pages.
type slots struct {
	mu    sync.Mutex
	pages []*page // that have a slot to give, in no order
	empty int     // of them, those without a slot in use
}

var shared slots

func newArea(n int) (*area, error) {
	if n <= slotSize {
		return shared.take()
	}
	m, err := newMapping(n)
	if err != nil {
		return nil, err
	}
	return &area{data: m.data, own: m}, nil
}

// destroy overwrites the secret and gives its memory back.
func (a *area) destroy() error {
	if a.page == nil {
		return a.own.destroy()
	}
	return shared.give(a)
}

func perPage() int { return os.Getpagesize() / slotSize }

func (s *slots) take() (*area, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.pages) == 0 {
		m, err := newMapping(os.Getpagesize())
		if err != nil {
			return nil, err
		}
		p := &page{mapping: m}
		for i := range perPage() {
			p.free = append(p.free, i)
		}
		s.pages = append(s.pages, p)
		s.empty++
	}
	p := s.pages[len(s.pages)-1]
	if len(p.free) == perPage() {
		s.empty--
	}
	i := p.free[len(p.free)-1]
	p.free = p.free[:len(p.free)-1]
	if len(p.free) == 0 {
		s.pages = s.pages[:len(s.pages)-1]
	}
	// No capacity beyond the slot: an append cannot reach a neighbour.
	return &area{data: p.mapping.data[i*slotSize : (i+1)*slotSize : (i+1)*slotSize], page: p, slot: i}, nil
}

func (s *slots) give(a *area) error {
	Wipe(a.data)
	s.mu.Lock()
	defer s.mu.Unlock()
	p := a.page
	if len(p.free) == 0 {
		s.pages = append(s.pages, p)
	}
	p.free = append(p.free, a.slot)
	if len(p.free) < perPage() {
		return nil
	}
	if s.empty < spare {
		s.empty++
		return nil
	}
	for i, have := range s.pages {
		if have == p {
			s.pages[i] = s.pages[len(s.pages)-1]
			s.pages = s.pages[:len(s.pages)-1]
			break
		}
	}
	return p.mapping.destroy()
}
