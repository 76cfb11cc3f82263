package demo

import (
	"encoding/json"
	"fmt"
	"html"
	"io"
	"strings"
	"time"

	"github.com/keyagent/keyagent/internal/lab"
)

// Moment is one point of a boot.
type Moment struct {
	Name string
	At   time.Duration // since power on
	Took time.Duration // of keyagent's own work that ended here, if it says
}

// Timeline is a boot from power on to a mounted volume.
type Timeline struct {
	Title   string
	Moments []Moment
	Added   time.Duration // from keyagent's start to the volume's mount
}

// wanted are the moments in their order, and where they come from.
var wanted = []string{"userspace", "attested", "key", "formatted", "mapped", "filesystem", "confirmed", "mounted"}

// readTimeline finds the moments in a guest's console.
func readTimeline(title string, lines []lab.Line) Timeline {
	t := Timeline{Title: title, Moments: []Moment{{Name: "power on"}}}
	var started, mounted time.Duration
	found := map[string]Moment{}
	for _, l := range lines {
		if mark, ok := strings.CutPrefix(l.Text, "KEYAGENT-MARK "); ok {
			_, name, _ := strings.Cut(mark, " ")
			found[name] = Moment{Name: name, At: l.At}
			if name == "keyagent" {
				started = l.At
			}
			continue
		}
		var step struct {
			Msg  string
			Step string
			Took float64 `json:"took_ms"`
		}
		if i := strings.IndexByte(l.Text, '{'); i >= 0 && json.Unmarshal([]byte(l.Text[i:]), &step) == nil && step.Msg == "step" {
			found[step.Step] = Moment{step.Step, l.At, time.Duration(step.Took * float64(time.Millisecond))}
			if step.Step == "mounted" {
				mounted = l.At
			}
		}
	}
	// The first key waits for the attestation, which has a line of its own.
	if key, ok := found["key"]; ok && key.Took > found["attested"].Took {
		key.Took -= found["attested"].Took
		found["key"] = key
	}
	for _, name := range wanted {
		if m, ok := found[name]; ok {
			t.Moments = append(t.Moments, m)
		}
	}
	if started > 0 && mounted > started {
		t.Added = mounted - started
	}
	return t
}

// Print writes the timeline as text.
func (t Timeline) Print(w io.Writer) {
	fmt.Fprintf(w, "%s\n", t.Title)
	for _, m := range t.Moments {
		took := ""
		if m.Took > 0 {
			took = fmt.Sprintf("  (took %.1f ms)", float64(m.Took.Microseconds())/1000)
		}
		fmt.Fprintf(w, "  %8.3f s  %s%s\n", m.At.Seconds(), m.Name, took)
	}
	if t.Added > 0 {
		fmt.Fprintf(w, "  keyagent added %d ms, from its start to the mounted volume, under CPU emulation\n", t.Added.Milliseconds())
	}
}

// The drawing's measures, in SVG units.
const (
	svgWidth  = 900
	svgLeft   = 110
	svgRight  = 20
	svgRow    = 26
	svgHeader = 40
	svgFooter = 30
)

// SVG draws timelines below each other on one scale, under a heading.
func SVG(w io.Writer, heading string, all []Timeline) error {
	var end time.Duration
	rows := 0
	for _, t := range all {
		rows += len(t.Moments) + 1
		end = max(end, t.Moments[len(t.Moments)-1].At)
	}
	end = max(end, time.Second)
	height := svgHeader + rows*svgRow + svgFooter
	x := func(d time.Duration) float64 {
		return svgLeft + float64(d)/float64(end)*(svgWidth-svgLeft-svgRight-150)
	}
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" font-family="sans-serif" font-size="13">`+"\n", svgWidth, height, svgWidth, height)
	fmt.Fprintf(&b, `<rect width="%d" height="%d" fill="#ffffff"/>`+"\n", svgWidth, height)
	fmt.Fprintf(&b, `<text x="16" y="24" font-size="16" font-weight="bold">%s</text>`+"\n", html.EscapeString(heading))
	y := svgHeader
	for _, t := range all {
		y += svgRow
		title := t.Title
		if t.Added > 0 {
			title += fmt.Sprintf(": keyagent added %d ms", t.Added.Milliseconds())
		}
		fmt.Fprintf(&b, `<text x="16" y="%d" font-weight="bold">%s</text>`+"\n", y, html.EscapeString(title))
		var before time.Duration
		for _, m := range t.Moments {
			y += svgRow
			color := "#b8c4d0"
			if m.Took > 0 {
				color = "#2f6fb0"
			}
			fmt.Fprintf(&b, `<text x="16" y="%d">%s</text>`+"\n", y, html.EscapeString(m.Name))
			fmt.Fprintf(&b, `<rect x="%.1f" y="%d" width="%.1f" height="16" fill="%s"/>`+"\n", x(before), y-13, max(2, x(m.At)-x(before)), color)
			label := fmt.Sprintf("%.2f s", m.At.Seconds())
			if m.Took > 0 {
				label += fmt.Sprintf(", took %.0f ms", float64(m.Took.Microseconds())/1000)
			}
			fmt.Fprintf(&b, `<text x="%.1f" y="%d" fill="#333333">%s</text>`+"\n", x(m.At)+8, y, label)
			before = m.At
		}
	}
	b.WriteString("</svg>\n")
	_, err := io.WriteString(w, b.String())
	return err
}
