package keyservice

import (
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/keyagent/keyagent/internal/audit"
	"github.com/keyagent/keyagent/internal/failure"
)

// Case 65: half of what a key service wrote is gone when it starts.
func TestAStartOnHalfOfTheStateIsRefused(t *testing.T) {
	w := newWorld(t)
	w.provision(w.machine(), "data-1")
	w.stop()
	records := filepath.Join(w.dir, "records")
	start := func(cfg Config) error {
		s, err := NewServer(t.Context(), &cfg, slog.New(slog.DiscardHandler))
		if err != nil {
			return err
		}
		return s.Close()
	}
	move := func(from, to string) {
		if err := os.Rename(from, to); err != nil {
			t.Fatal(err)
		}
	}
	// The audit log is gone.
	move(w.cfg.Audit, w.cfg.Audit+".1")
	wantClass(t, start(*w.cfg), failure.Tampered)
	wantClass(t, start(*w.cfg), failure.Tampered) // the refused start began none
	told := *w.cfg
	told.InitAudit = true
	if err := start(told); err != nil {
		t.Fatal(err)
	}
	wantClass(t, start(told), failure.Configuration) // once
	if err := start(*w.cfg); err != nil {
		t.Error(err)
	}
	move(w.cfg.Audit+".1", w.cfg.Audit)
	// The records are gone, as a folder that is not mounted.
	move(records, records+".away")
	wantClass(t, start(*w.cfg), failure.Tampered)
	if _, err := os.Stat(filepath.Join(records, "keyservice")); err == nil {
		t.Error("the refused start made a record MAC key")
	}
	if err := os.RemoveAll(records); err != nil {
		t.Fatal(err)
	}
	move(records+".away", records)
	if err := start(*w.cfg); err != nil {
		t.Errorf("with the records back: %v", err)
	}
	told = *w.cfg
	told.InitRecords = true
	wantClass(t, start(told), failure.Configuration) // there are records
	move(records, records+".lost")
	if err := start(told); err != nil {
		t.Fatal(err)
	}
	w.start()
	if _, _, err := w.get(w.machine(), "data-1", formatOp); err != nil {
		t.Errorf("a volume after its records were given up: %v", err)
	}
}

// An entry that names a volume and no revision of its record says nothing of records.
func TestOnlyRevisionsAreSightings(t *testing.T) {
	h := &history{seen: map[string]uint64{}, recovered: map[string]time.Time{}}
	for _, e := range []audit.Entry{
		{Event: "opened-offline", Volume: "data-1", Result: "reported", Revision: 7},
		{Event: "get-key", Volume: "data-2", Result: "refused", Revision: 7},
		{Event: "get-key", Volume: "data-3", Result: "allowed"},
	} {
		h.note(e)
	}
	if len(h.seen) != 0 {
		t.Errorf("seen: %v", h.seen)
	}
}

func TestTwoKeyServicesDoNotShareAFolder(t *testing.T) {
	w := newWorld(t)
	other := *w.cfg
	other.Audit = filepath.Join(w.dir, "other.log")
	_, err := NewServer(t.Context(), &other, slog.New(slog.DiscardHandler))
	wantClass(t, err, failure.Configuration)
}
