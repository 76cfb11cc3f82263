package tdx

import (
	"encoding/hex"
	"fmt"
	"io"
	"maps"
	"slices"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation/facts"
)

// Summary is what evidence says, for people. None of it is verified.
type Summary struct {
	QuoteVersion  uint16            `json:"quote_version"`
	Identity      string            `json:"identity,omitempty"`
	FMSPC         string            `json:"fmspc,omitempty"`
	CA            string            `json:"ca,omitempty"`
	TCBSVN        string            `json:"tee_tcb_svn"`
	Debug         bool              `json:"debug"`
	ReportData    string            `json:"report_data"`
	Measurements  map[string]string `json:"measurements"`
	Carried       []string          `json:"carried"` // which collateral
	EventLogBytes int               `json:"event_log_bytes"`
}

// Summarize reads evidence without verifying it.
func Summarize(ev *attestv1.TDXEvidence) (*Summary, error) {
	q, err := Parse(ev.GetQuote())
	if err != nil {
		return nil, err
	}
	claims := q.Claims()
	s := &Summary{
		QuoteVersion: q.Version, TCBSVN: hex.EncodeToString(q.body.teeTCBSVN), Debug: claims.Facts[string(facts.Debug)] == true,
		ReportData: hex.EncodeToString(q.ReportData[:]), Measurements: map[string]string{},
		Carried: []string{}, EventLogBytes: len(ev.GetEventLog()),
	}
	for name, m := range claims.Measurements {
		s.Measurements[name] = hex.EncodeToString(m.Value)
	}
	if p, err := parsePCK(q.chain); err == nil {
		s.Identity, s.FMSPC, s.CA = p.identity(), p.FMSPC, p.ca
	}
	for i, d := range documents(ev.GetCollateral()) {
		if len(d.Body) > 0 {
			s.Carried = append(s.Carried, docNames[i])
		}
	}
	return s, nil
}

// Print writes the summary for a person.
func (s *Summary) Print(w io.Writer) {
	fmt.Fprintf(w, "quote            version %d\n", s.QuoteVersion)
	if s.Identity != "" {
		fmt.Fprintf(w, "platform         %s, FMSPC %s, certified by the %s CA\n", s.Identity, s.FMSPC, s.CA)
	}
	fmt.Fprintf(w, "TEE TCB SVN      %s\n", s.TCBSVN)
	if s.Debug {
		fmt.Fprintf(w, "debug            the host can read and change this TD\n")
	}
	for _, name := range slices.Sorted(maps.Keys(s.Measurements)) {
		fmt.Fprintf(w, "%-16s %s\n", name, s.Measurements[name])
	}
	for _, name := range s.Carried {
		fmt.Fprintf(w, "carries          %s\n", name)
	}
	fmt.Fprintf(w, "event log        %d bytes\n", s.EventLogBytes)
}
