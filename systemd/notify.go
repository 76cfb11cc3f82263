// Package systemd holds keyagent's units and what speaks to systemd: readiness,
// progress within a start-up's time limit, and the watchdog.
package systemd

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"time"
	"unicode"

	"github.com/coreos/go-systemd/v22/daemon"
)

// Notifier tells systemd about this service, see sd_notify(3). A nil Notifier,
// and one of a process that systemd did not start, says nothing.
type Notifier struct {
	mu   sync.Mutex
	last string // status
}

// NewNotifier returns a notifier.
func NewNotifier() *Notifier { return &Notifier{} }

func (n *Notifier) send(state string) {
	if n != nil {
		// Nobody listening is normal; a failure to notify is seen by systemd.
		_, _ = daemon.SdNotify(false, state)
	}
}

// Ready ends the start-up.
func (n *Notifier) Ready(status string) {
	n.shown(status)
	n.send("READY=1\nSTATUS=" + line(status))
}

// Status is what systemctl status shows until the next one, or the next start. It says
// nothing if that stands there already.
func (n *Notifier) Status(text string) {
	if n.shown(text) {
		n.send("STATUS=" + line(text))
	}
}

// shown keeps the status, and reports whether it is another one.
func (n *Notifier) shown(status string) (other bool) {
	if n == nil {
		return false
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	other = n.last != status
	n.last = status
	return other
}

// line is text without the ends of lines, behind which systemd would read another word
// than what somebody else's error says.
func line(text string) string {
	const most = 512 // for a person
	text = strings.Join(strings.FieldsFunc(text, unicode.IsControl), " ")
	if len(text) > most {
		text = strings.ToValidUTF8(text[:most], "") + "…"
	}
	return text
}

// Stopping begins the shutdown.
func (n *Notifier) Stopping() { n.send(daemon.SdNotifyStopping) }

// Waiting says what a start-up waits for, and asks for the time that the wait
// may take, plus some for what follows.
func (n *Notifier) Waiting(what string, d time.Duration) {
	n.shown(what)
	n.send(fmt.Sprintf("STATUS=%s\nEXTEND_TIMEOUT_USEC=%d", line(what), (d + time.Minute).Microseconds()))
}

// Watch answers the unit's watchdog, if it has one, until ctx ends.
func (n *Notifier) Watch(ctx context.Context) error {
	interval, err := daemon.SdWatchdogEnabled(false)
	if n == nil || err != nil || interval == 0 {
		<-ctx.Done()
		return nil
	}
	t := time.NewTicker(interval / 2)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
			n.send(daemon.SdNotifyWatchdog)
		}
	}
}
