package agent

import (
	"os"
	"strings"
	"testing"
)

// TestTheTableOfStatesIsThatOfTheDocument compares docs/volumes.md with the code, both
// ways.
func TestTheTableOfStatesIsThatOfTheDocument(t *testing.T) {
	text, err := os.ReadFile("../../docs/volumes.md")
	if err != nil {
		t.Fatal(err)
	}
	told := map[State]map[Event]State{}
	for line := range strings.Lines(string(text)) {
		cells := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), " | ")
		if len(cells) != 3 || !strings.Contains(cells[2], " → ") {
			continue
		}
		row := map[Event]State{}
		for one := range strings.SplitSeq(strings.TrimSpace(cells[2]), ", ") {
			event, state, _ := strings.Cut(one, " → ")
			row[Event(event)] = State(state)
		}
		told[State(strings.Trim(cells[0], " `"))] = row
	}
	for _, s := range allStates(told) {
		for _, e := range allEvents {
			if told[s][e] != life[s][e] {
				t.Errorf("%s, %s: the document says %q, the code %q", s, e, told[s][e], life[s][e])
			}
		}
		if len(told[s]) != len(life[s]) {
			t.Errorf("%s has %d events in the document, %d in the code", s, len(told[s]), len(life[s]))
		}
	}
}

// allStates are those of the code and those of the document.
func allStates(told map[State]map[Event]State) []State {
	out := States()
	for s := range told {
		if _, known := life[s]; !known {
			out = append(out, s)
		}
	}
	return out
}
