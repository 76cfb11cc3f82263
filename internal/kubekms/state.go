package kubekms

// State is how far the KEKs in memory can be trusted to be those of the source.
type State string

// The states. Their texts stand in metrics and logs.
const (
	Starting State = "starting" // nothing was fetched yet
	Serving  State = "serving"  // the last fetch succeeded
	Failing  State = "failing"  // it did not, and too few in a row to matter
	Coasting State = "coasting" // too many did not; served for a stated time more
	Purged   State = "purged"   // the KEKs are wiped; every request fails
)

// States are all states.
var States = []State{Starting, Serving, Failing, Coasting, Purged}

// event is what happens to a state.
type event string

const (
	succeeded event = "a fetch succeeded"
	failed    event = "a fetch failed"
	gaveUp    event = "too many fetches in a row failed"
	coasts    event = "too many fetches in a row failed, and coasting is allowed"
	expired   event = "the time is over for which the KEKs may be used"
)

// transitions is the machine. What is not in it leaves a state as it is. Anyone who
// enters Purged wipes the KEKs.
var transitions = map[State]map[event]State{
	Starting: {succeeded: Serving},
	Serving:  {failed: Failing, expired: Purged},
	Failing:  {succeeded: Serving, gaveUp: Purged, coasts: Coasting, expired: Purged},
	Coasting: {succeeded: Serving, expired: Purged},
	Purged:   {succeeded: Serving},
}

func (s State) after(e event) State {
	if next, ok := transitions[s][e]; ok {
		return next
	}
	return s
}
