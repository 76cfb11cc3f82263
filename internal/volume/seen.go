package volume

import "container/list"

// MaxSeen bounds how many volumes are known by another key service's word.
const MaxSeen = 1 << 18

// Sighting is the highest revision that was seen of a volume.
type Sighting struct {
	Volume   string
	Revision uint64
}

// Seen is a part of what a key service has seen of volumes.
type Seen struct {
	// Epoch began when an operator gave up all records, and is the second of that, or some
	// later number. What was seen in another one is of other records.
	Epoch   uint64
	Volumes []Sighting
	Next    uint64 // position behind the part
	More    bool   // there is more behind it
}

// seen is what was seen of volumes, by the audit log, by this process, or by another key
// service. Each change has a number, and the list is in that order, so that what changed since
// some moment is its end.
type seen struct {
	epoch    uint64
	changes  uint64
	order    *list.List // of *sighting
	byVolume map[string]*list.Element
}

type sighting struct {
	Sighting
	change uint64
}

func newSeen() seen { return seen{order: list.New(), byVolume: map[string]*list.Element{}} }

func (s *seen) revision(volume string) uint64 {
	if e, ok := s.byVolume[volume]; ok {
		return e.Value.(*sighting).Revision
	}
	return 0
}

func (s *seen) note(volume string, revision uint64) {
	if revision <= s.revision(volume) {
		return
	}
	e, ok := s.byVolume[volume]
	if !ok {
		e = s.order.PushBack(nil)
		s.byVolume[volume] = e
	}
	s.changes++
	e.Value = &sighting{Sighting{volume, revision}, s.changes}
	s.order.MoveToBack(e)
}

// NoteRevision remembers what was seen of a volume.
func (s *Store) NoteRevision(volume string, revision uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seen.note(volume, revision)
}

// NoteSeen remembers what another key service has seen in this epoch, and reports how many
// volumes there is no room for.
func (s *Store) NoteSeen(epoch uint64, all []Sighting) (left int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if epoch != s.seen.epoch {
		return 0
	}
	for _, v := range all {
		if s.seen.revision(v.Volume) == 0 && len(s.seen.byVolume) >= MaxSeen {
			left++
			continue
		}
		s.seen.note(v.Volume, v.Revision)
	}
	return left
}

// SeenSince returns what changed in what was seen since a position, 0 for all: the oldest change
// first, and at most limit volumes.
func (s *Store) SeenSince(position uint64, limit int) Seen {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := Seen{Epoch: s.seen.epoch, Next: position}
	var first *list.Element
	for e := s.seen.order.Back(); e != nil && e.Value.(*sighting).change > position; e = e.Prev() {
		first = e
	}
	for e := first; e != nil; e = e.Next() {
		if len(out.Volumes) == limit {
			out.More = true
			break
		}
		v := e.Value.(*sighting)
		out.Volumes, out.Next = append(out.Volumes, v.Sighting), v.change
	}
	return out
}

// Epoch is the present one, 0 if no operator ever gave up all records.
func (s *Store) Epoch() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.seen.epoch
}

// BeginEpoch forgets all that was seen: an operator gave up all records. An epoch that is not
// later than the present one changes nothing.
func (s *Store) BeginEpoch(epoch uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if epoch <= s.seen.epoch {
		return
	}
	s.seen.epoch = epoch
	s.seen.order.Init()
	clear(s.seen.byVolume)
}

// Seen returns the highest revision of a volume that was seen.
func (s *Store) Seen(volume string) uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.seen.revision(volume)
}

// Volumes returns the volumes that were seen.
func (s *Store) Volumes() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []string
	for v := range s.seen.byVolume {
		all = append(all, v)
	}
	return all
}
