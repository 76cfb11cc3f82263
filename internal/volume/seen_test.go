package volume

import (
	"fmt"
	"slices"
	"testing"

	"github.com/keyagent/keyagent/storage/memfs"
)

func TestWhatWasSeenIsToldOnceInPages(t *testing.T) {
	s := newStore(t, memfs.New(), newClock().now, false)
	for i := range 25 {
		s.NoteRevision(fmt.Sprintf("data-%02d", i), uint64(i+1))
	}
	s.NoteRevision("data-03", 2) // known
	s.NoteRevision("data-03", 99)
	s.NoteRevision("data-99", 0) // nothing was seen
	told := map[string]uint64{}
	position := uint64(0)
	for n := 0; ; n++ {
		page := s.SeenSince(position, 10)
		if len(page.Volumes) > 10 || n > 3 {
			t.Fatalf("page %d has %d", n, len(page.Volumes))
		}
		for _, v := range page.Volumes {
			if told[v.Volume] != 0 {
				t.Errorf("%s is told twice", v.Volume)
			}
			told[v.Volume] = v.Revision
		}
		position = page.Next
		if !page.More {
			break
		}
	}
	if len(told) != 25 || told["data-03"] != 99 || told["data-24"] != 25 {
		t.Errorf("%v", told)
	}
	if page := s.SeenSince(position, 10); len(page.Volumes) != 0 || page.More || page.Next != position {
		t.Errorf("nothing is new: %+v", page)
	}
	s.NoteRevision("data-07", 70)
	if page := s.SeenSince(position, 10); !slices.Equal(page.Volumes, []Sighting{{"data-07", 70}}) || page.More {
		t.Errorf("one is new: %+v", page)
	}
}

// What another key service saw before all records were given up is of other records.
func TestAnEpochForgets(t *testing.T) {
	s := newStore(t, memfs.New(), newClock().now, false)
	s.NoteRevision("data-1", 7)
	position := s.SeenSince(0, 10).Next
	s.BeginEpoch(0)
	if s.Seen("data-1") != 7 {
		t.Error("the present epoch began anew")
	}
	s.BeginEpoch(2)
	s.BeginEpoch(1)
	if s.Epoch() != 2 || s.Seen("data-1") != 0 || len(s.Volumes()) != 0 {
		t.Errorf("epoch %d, revision %d", s.Epoch(), s.Seen("data-1"))
	}
	s.NoteSeen(1, []Sighting{{"data-1", 7}})
	s.NoteSeen(3, []Sighting{{"data-1", 7}})
	if s.Seen("data-1") != 0 {
		t.Error("it was told of another epoch")
	}
	s.NoteSeen(2, []Sighting{{"data-1", 3}, {"data-1", 2}})
	page := s.SeenSince(position, 10)
	if page.Epoch != 2 || !slices.Equal(page.Volumes, []Sighting{{"data-1", 3}}) {
		t.Errorf("%+v", page)
	}
}

func TestWhatOthersHaveSeenIsBounded(t *testing.T) {
	s := newStore(t, memfs.New(), newClock().now, false)
	page := make([]Sighting, MaxSeen+10)
	for i := range page {
		page[i] = Sighting{fmt.Sprintf("v%d", i), 1}
	}
	if left := s.NoteSeen(0, page); left != 10 || len(s.Volumes()) != MaxSeen {
		t.Errorf("%d are left out, %d are known", left, len(s.Volumes()))
	}
	if left := s.NoteSeen(0, []Sighting{{"v0", 5}}); left != 0 || s.Seen("v0") != 5 {
		t.Error("what is known is not known better")
	}
	s.NoteRevision("mine", 1) // what this key service has seen itself counts always
	if s.Seen("mine") != 1 {
		t.Error("its own volume is forgotten")
	}
}
