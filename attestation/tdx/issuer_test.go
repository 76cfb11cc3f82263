package tdx

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-configfs-tsm/configfs/configfsi"
	"github.com/google/go-tdx-guest/client"
	"github.com/google/go-tdx-guest/client/linuxabi"
	"google.golang.org/protobuf/proto"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/endorsement"
	"github.com/keyagent/keyagent/test/sim/intel"
)

// issue runs the attester's half of an exchange.
func issue(opts IssuerOptions) ([]byte, error) {
	i, err := NewIssuer(opts)
	if err != nil {
		return nil, err
	}
	a, err := i.Begin(context.Background())
	if err != nil {
		return nil, err
	}
	defer a.Close()
	if a.Offer() != nil || i.Kind() != attestation.TDX {
		return nil, errors.New("a TD offers nothing")
	}
	return a.Evidence(context.Background(), nil, testBinder)
}

func TestWhatATDIssuesIsAccepted(t *testing.T) {
	for _, shape := range shapes {
		s := newScene(t, shape.change)
		path := filepath.Join(t.TempDir(), "CCEL")
		if err := os.WriteFile(path, append(bytes.Clone(s.ev.EventLog), bytes.Repeat([]byte{0xff}, 60000)...), 0o600); err != nil {
			t.Fatal(err)
		}
		opts := IssuerOptions{TSM: s.m.TSM(s.fields), EventLog: path, Endorsements: &intel.PCS{World: s.w},
			Log: func(what string, err error) { t.Errorf("%s: %v", what, err) }}
		if how, err := Detect(opts); how != "configfs-tsm" || err != nil {
			t.Fatalf("%q, %v", how, err)
		}
		data := must[[]byte](t)(issue(opts))
		var ev attestv1.TDXEvidence
		if err := proto.Unmarshal(data, &ev); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(ev.EventLog, s.ev.EventLog) || len(ev.Quote) != len(s.ev.Quote) {
			t.Error("padding came along")
		}
		if c, err := verifyWith(s.verifier(), &ev); err != nil || c.Facts["event_log"] != true {
			t.Errorf("%s: %v", shape.name, err)
		}
	}
}

func TestCollateralThatIsNotToBeHadIsLeftOut(t *testing.T) {
	s := newScene(t)
	var logged []error
	opts := IssuerOptions{TSM: s.m.TSM(s.fields), EventLog: "/does/not/exist", Endorsements: nobody{endorsement.ErrUnavailable},
		Log: func(_ string, err error) { logged = append(logged, err) }}
	data := must[[]byte](t)(issue(opts))
	if len(logged) != 1 || !errors.Is(logged[0], endorsement.ErrUnavailable) || !strings.Contains(logged[0].Error(), "root CRL") {
		t.Errorf("%v", logged)
	}
	var ev attestv1.TDXEvidence
	if err := proto.Unmarshal(data, &ev); err != nil || len(ev.EventLog) != 0 {
		t.Fatalf("%v, log of %d bytes", err, len(ev.EventLog))
	}
	// A verifier that can ask accepts it; one that cannot says what is missing.
	if _, err := verifyWith(s.verifier(), &ev); !errors.Is(err, ErrEndorsementMissing) {
		t.Error(err)
	}
	s.source = &intel.PCS{World: s.w}
	if _, err := verifyWith(s.verifier(), &ev); err != nil {
		t.Error(err)
	}
}

func TestAMachineThatIsNoTDHasNoDevice(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	snp := intel.TSM("sev_guest", func([64]byte) ([]byte, error) { return []byte("report"), nil })
	for name, opts := range map[string]IssuerOptions{
		"nothing":               {Device: "/does/not/exist"},
		"a file":                {Device: file},
		"reports of a SEV VM":   {Device: "/does/not/exist", TSM: snp},
		"a configfs that fails": {Device: "/does/not/exist", TSM: brokenTSM{snp}},
	} {
		if _, err := issue(opts); !errors.Is(err, attestation.ErrNoDevice) {
			t.Errorf("%s: %v", name, err)
		}
		if how, err := Detect(opts); !errors.Is(err, attestation.ErrNoDevice) || how != "" {
			t.Errorf("%s: %q, %v", name, how, err)
		}
	}
}

type brokenTSM struct{ configfsi.Client }

func (brokenTSM) MkdirTemp(string, string) (string, error) { return "", os.ErrPermission }

func TestAQuoteThatIsNotOursIsNotSent(t *testing.T) {
	s := newScene(t)
	for name, report := range map[string]func([64]byte) ([]byte, error){
		"over other data": func([64]byte) ([]byte, error) { f := s.fields; f.Report[0]++; return s.m.Quote(f) },
		"no quote":        func([64]byte) ([]byte, error) { return []byte("busy"), nil },
		"an error":        func([64]byte) ([]byte, error) { return nil, os.ErrDeadlineExceeded },
	} {
		opts := IssuerOptions{TSM: intel.TSM("tdx_guest", report), EventLog: "/does/not/exist"}
		if _, err := issue(opts); err == nil || errors.Is(err, attestation.ErrRefused) {
			t.Errorf("%s: %v", name, err)
		}
	}
	i := must[*Issuer](t)(NewIssuer(IssuerOptions{TSM: s.m.TSM(s.fields)}))
	a, err := i.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.Evidence(t.Context(), []byte{1}, testBinder); err == nil {
		t.Error("a question was answered")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := i.Begin(ctx); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// device is a driver with Intel's patches. It answers with a length that the host
// chooses.
type device struct {
	quote  []byte
	length uint32
}

func (device) Open(string) error { return nil }
func (device) Close() error      { return nil }

func (d device) Ioctl(_ uintptr, request any) (uintptr, error) {
	if q, ok := request.(*linuxabi.TdxQuoteReq); ok {
		h := q.Buffer.(*linuxabi.TdxQuoteHdr)
		h.OutLen = d.length
		copy(h.Data[:], d.quote)
	}
	return 0, nil
}

// TestTheHostDoesNotChooseALengthThatPanics: the library slices by it.
func TestTheHostDoesNotChooseALengthThatPanics(t *testing.T) {
	s := newScene(t)
	for length, fine := range map[uint32]bool{uint32(len(s.ev.Quote)): true, linuxabi.ReqBufSize + 1: false, 1 << 31: false} {
		got, err := client.GetRawQuote(bounded{device{s.ev.Quote, length}}, testBinder)
		if fine != (err == nil) || fine && !bytes.Equal(got, s.ev.Quote) {
			t.Errorf("%d: %v", length, err)
		}
	}
}

func TestAnEventLogThatIsTooLargeIsAnError(t *testing.T) {
	s := newScene(t)
	path := filepath.Join(t.TempDir(), "CCEL")
	log := bytes.Clone(s.ev.EventLog)
	// One event whose data is a megabyte.
	log = append(log, 1, 0, 0, 0, 4, 0, 0, 0, 1, 0, 0, 0, 0x0c, 0)
	log = append(log, make([]byte, 48)...)
	log = binary.LittleEndian.AppendUint32(log, 1<<20)
	log = append(log, make([]byte, 1<<20)...)
	if err := os.WriteFile(path, log, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := readEventLog(path); err == nil || !strings.Contains(err.Error(), "larger than") {
		t.Error(err)
	}
	if _, err := readEventLog(t.TempDir()); err == nil {
		t.Error("a directory is no log")
	}
}
