// Package demo shows the whole main job on one machine: a guest that boots
// measured by a software TPM under OVMF, a key service outside it, and a disk.
//
// Everything that decides is the product's own code, in its own processes; only
// the machine is simulated. The demo is a subcommand and cannot be reached by
// configuration.
package demo

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/keyagent/keyagent/internal/lab"
)

// Options configure [Run].
type Options struct {
	Program string    // the keyagent that runs in the guest and as service
	Out     string    // folder for the timeline and the logs
	Text    io.Writer // progress and results
	Verbose bool      // show the guests' consoles
}

// ErrStory: the demo did not end as it should.
var ErrStory = errors.New("the demo did not go as it should")

// ErrMissingTool: this machine lacks a program or file that the demo needs.
var ErrMissingTool = lab.ErrMissingTool

// diskSize of the guest's data disk in bytes.
const diskSize = 64 << 20

type story struct {
	Options
	dir     string
	start   time.Time
	tpm     *lab.TPM
	service *Service
	disk    string
	images  images
	lines   []Timeline
}

// Run tells the story. It needs the programs of test/deps/packages.
func Run(ctx context.Context, opts Options) (err error) {
	if err := lab.Check(); err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "keyagent-demo-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := os.MkdirAll(opts.Out, 0o755); err != nil {
		return err
	}
	s := &story{Options: opts, dir: dir, start: time.Now(), disk: filepath.Join(dir, "disk.img")}
	for _, act := range []struct {
		title string
		play  func(context.Context) error
	}{
		{"Preparing: a kernel for the guest, a TPM with a maker's certificate, a key service", s.prepare},
		{"Measuring: reference values, before the guest was ever started", s.measure},
		{"First boot: the disk is blank; format, mount, write", s.first},
		{"Second boot: open the disk and read it back", s.second},
		{"Third boot: one more word on the kernel command line", s.third},
		{"Timeline", s.timeline},
	} {
		s.say("\n== %s", act.title)
		if err := act.play(ctx); err != nil {
			return errors.Join(err, s.stop())
		}
	}
	return s.stop()
}

func (s *story) say(format string, args ...any) {
	fmt.Fprintf(s.Text, "[%5.1f s] %s\n", time.Since(s.start).Seconds(), fmt.Sprintf(format, args...))
}

func (s *story) path(name string) string { return filepath.Join(s.dir, name) }

func (s *story) stop() error {
	if s.service == nil {
		return nil
	}
	err := s.service.Stop()
	log := strings.Join(s.service.Log(), "\n") + "\n"
	return errors.Join(err, os.WriteFile(filepath.Join(s.Out, "service.log"), []byte(log), 0o644))
}

func (s *story) prepare(ctx context.Context) error {
	cache, err := lab.OpenCache("")
	if err != nil {
		return err
	}
	if s.images.kernel, err = cache.Kernel(ctx); err != nil {
		return err
	}
	s.images.dir = s.dir
	s.say("kernel %s", s.images.kernel.Release)
	ca, err := lab.NewCA(s.path("tpm-maker"), "demo")
	if err != nil {
		return err
	}
	if s.tpm, err = ca.NewTPM(ctx, s.path("tpm"), lab.TPMOptions{}); err != nil {
		return err
	}
	s.say("TPM made, its endorsement key certified by %s", "demo EK CA")
	if s.service, err = NewService(s.path("service"), s.Program); err != nil {
		return err
	}
	disk, err := os.Create(s.disk)
	if err != nil {
		return err
	}
	return errors.Join(disk.Truncate(diskSize), partition(disk), disk.Close(), copyTo(ca.IssuerCert(), s.path("service/tpm-maker.pem")))
}

func copyTo(from, to string) error {
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, data, 0o644)
}

const command = "demo"

func (s *story) measure(ctx context.Context) error {
	uki, _, err := s.images.build(ctx, "guest", script, lab.CommandLine(command), s.Program, s.service.CA())
	if err != nil {
		return err
	}
	s.say("guest image built: %s", size(uki))
	log, err := Reference(ctx, s.dir, s.images.kernel, s.tpm, false)
	if err != nil {
		return err
	}
	s.say("a trusted boot of the firmware gave its event log, %d bytes", len(log))
	if err := os.WriteFile(s.path("trusted.log"), log, 0o600); err != nil {
		return err
	}
	profile, err := s.service.Run(ctx, "measure", "--name", "guest", "--trust", "root:demo", "--uki", uki,
		"--event-log", s.path("trusted.log"), "--pcrs", "0,1,2,3,4,5,6,7,11")
	if err != nil {
		return err
	}
	if err := s.service.WritePolicy("tpm-maker.pem", profile); err != nil {
		return err
	}
	checked, err := s.service.Run(ctx, "policy", "check", "policy.yaml")
	if err != nil {
		return err
	}
	s.say("keyagent measure: PCRs 4 and 11 from the image file, the rest from that log")
	s.say("keyagent policy check: %s", bytes.TrimSpace(checked))
	if err := s.service.Start(ctx); err != nil {
		return err
	}
	s.say("key service on %s", s.service.Address)
	return nil
}

func size(path string) string {
	st, err := os.Stat(path)
	if err != nil {
		return "?"
	}
	return fmt.Sprintf("%.1f MB", float64(st.Size())/1e6)
}

// boot runs the guest to its end and returns its console.
func (s *story) boot(ctx context.Context, name, esp string) (status int, lines []lab.Line, err error) {
	g, err := lab.Boot(ctx, lab.Options{
		ESP: esp, TPM: s.tpm, Data: s.disk,
		Forward: []lab.Forward{{Guest: KeyServiceAddress, Host: s.service.Address}},
		Console: func(l lab.Line) {
			if s.Verbose || strings.HasPrefix(l.Text, "DEMO ") || strings.HasPrefix(l.Text, "keyagent: ") ||
				strings.HasPrefix(l.Text, "hint: ") || strings.HasPrefix(l.Text, "correlation id") {
				s.say("  guest: %s", l.Text)
			}
		},
	})
	if err != nil {
		return 0, nil, err
	}
	defer g.Close()
	status, err = g.Wait(ctx)
	lines = g.Lines()
	var text strings.Builder
	for _, l := range lines {
		fmt.Fprintf(&text, "%8.3f %s\n", l.At.Seconds(), l.Text)
	}
	return status, lines, errors.Join(err, os.WriteFile(filepath.Join(s.Out, name+".console"), []byte(text.String()), 0o644))
}

func has(lines []lab.Line, text string) bool {
	for _, l := range lines {
		if strings.Contains(l.Text, text) {
			return true
		}
	}
	return false
}

func (s *story) succeed(ctx context.Context, name, title, want string) error {
	status, lines, err := s.boot(ctx, name, s.path("guest.esp"))
	if err != nil {
		return err
	}
	if status != 0 || !has(lines, want) {
		return fmt.Errorf("%w: %s: exit status %d, see %s.console", ErrStory, name, status, filepath.Join(s.Out, name))
	}
	s.lines = append(s.lines, readTimeline(title, lines))
	return nil
}

func (s *story) first(ctx context.Context) error {
	return s.succeed(ctx, "first", "First boot, which formats", "DEMO wrote: written by the first boot")
}

func (s *story) second(ctx context.Context) error {
	return s.succeed(ctx, "second", "Second boot, which opens", "DEMO read inside it: and inside it")
}

// third changes one word and expects a refusal that both sides can explain,
// each as far as it may.
func (s *story) third(ctx context.Context) error {
	_, esp, err := s.images.build(ctx, "changed", script, lab.CommandLine(command, "init.debug"), s.Program, s.service.CA())
	if err != nil {
		return err
	}
	before, err := digest(s.disk)
	if err != nil {
		return err
	}
	status, lines, err := s.boot(ctx, "third", esp)
	if err != nil {
		return err
	}
	after, err := digest(s.disk)
	if err != nil {
		return err
	}
	entry, err := s.service.Await(ctx, "attestation refused", "", 10*time.Second)
	if err != nil {
		return err
	}
	id, _ := entry["correlation_id"].(string)
	text, _ := entry["error"].(string)
	s.say("key service: refused, correlation id %s", id)
	for part := range strings.SplitSeq(text, "; ") {
		s.say("  %s", part)
	}
	switch {
	case status != 3 || !has(lines, "DEMO refused: exit code 6"):
		err = fmt.Errorf("%w: the changed guest was not refused, exit status %d", ErrStory, status)
	case has(lines, "DEMO the "):
		err = fmt.Errorf("%w: the disk is open in the refused guest", ErrStory)
	case !has(lines, "evidence refused") || !has(lines, id):
		err = fmt.Errorf("%w: the guest's console does not show the class and the correlation ID %s", ErrStory, id)
	case !strings.Contains(text, "kernel command line") || !strings.Contains(text, "expected") || !strings.Contains(text, "found"):
		err = fmt.Errorf("%w: the key service's log does not name the event: %s", ErrStory, text)
	case before != after:
		err = fmt.Errorf("%w: the refused guest changed the disk", ErrStory)
	}
	if err != nil {
		return err
	}
	s.say("the disk stayed shut, and not a byte of it changed")
	return nil
}

func digest(path string) (sum [sha256.Size]byte, err error) {
	f, err := os.Open(path)
	if err != nil {
		return sum, err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return sum, err
	}
	h.Sum(sum[:0])
	return sum, nil
}

func (s *story) timeline(ctx context.Context) error {
	for _, t := range s.lines {
		t.Print(s.Text)
	}
	checked, err := s.service.Run(ctx, "audit", "verify", s.service.AuditLog())
	if err != nil {
		return err
	}
	s.say("keyagent audit verify: %s", bytes.TrimSpace(checked))
	path := filepath.Join(s.Out, "timeline.svg")
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	if err := errors.Join(SVG(f, "From power on to a mounted volume", s.lines), f.Close()); err != nil {
		return err
	}
	s.say("drawn in %s; consoles and the service's log are beside it", path)
	return nil
}
