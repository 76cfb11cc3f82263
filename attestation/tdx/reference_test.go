package tdx

import (
	"errors"
	"testing"

	"github.com/keyagent/keyagent/test/sim/intel"
)

// A file of evidence is anybody's: what is not verified has the form that the rest
// relies on, or is refused.
func TestUnverifiedCollateralHasItsForm(t *testing.T) {
	for name, change := range map[string]func(s *scene){
		"a mask longer than its value": func(s *scene) {
			s.qeIdentity(func(o intel.Object) { o["attributes"] = "" })
		},
		"a level of one component": func(s *scene) {
			s.tcbInfo(func(o intel.Object) {
				o["tcbLevels"] = []intel.Object{{"tcb": intel.Object{"sgxtcbcomponents": []any{}, "tdxtcbcomponents": []any{}, "pcesvn": 0}, "tcbStatus": "UpToDate"}}
			})
		},
		"a level of many components": func(s *scene) {
			many := make([]intel.Object, 17)
			for i := range many {
				many[i] = intel.Object{"svn": 0}
			}
			s.tcbInfo(func(o intel.Object) {
				o["tcbLevels"] = []intel.Object{{"tcb": intel.Object{"sgxtcbcomponents": many, "tdxtcbcomponents": many, "pcesvn": 0}, "tcbStatus": "UpToDate"}}
			})
		},
		"more than a document ever is": func(s *scene) { s.ev.Collateral.TcbInfo = make([]byte, maxJSON+1) },
	} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t)
			if _, err := UnverifiedClaims(s.ev); err != nil {
				t.Fatal(err)
			}
			change(s)
			if _, err := UnverifiedClaims(s.ev); !errors.Is(err, ErrCollateral) {
				t.Error(err)
			}
		})
	}
	// Part of it was not to be had when the file was made: the rest still counts.
	s := newScene(t)
	s.ev.Collateral.QeIdentity = nil
	if c, err := UnverifiedClaims(s.ev); err != nil || c.Facts["tcb_status"] != nil {
		t.Errorf("%v, %v", c.Facts["tcb_status"], err)
	}
}
