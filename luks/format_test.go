package luks

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/keyagent/keyagent/internal/secret"
)

func TestFormatMakesAHeaderThatIsAdoptedAndHasTheSameMAC(t *testing.T) {
	ctx := context.Background()
	path, macs := formatted(t, idData, dataKey(t))
	got, err := Adopt(ctx, path, idData, dataKey(t))
	must(t, err)
	if got.MACs() != macs {
		t.Errorf("adopted MACs are %x, format gave %x", got.MACs(), macs)
	}
	_, err = ReadHeader(ctx, HeaderRequest{path, idData, macs}, dataKey(t))
	must(t, err)
	state, err := Probe(ctx, path, idData, dataKey(t))
	if err != nil || state != StateLUKS2 {
		t.Errorf("state is %v, %v", state, err)
	}
}

func TestFormatWritesNothingBeyondTheGuardedBytes(t *testing.T) {
	path, _ := formatted(t, idData, dataKey(t))
	raw, err := os.ReadFile(path)
	must(t, err)
	if !allZero(raw[guardedSize:]) {
		t.Error("bytes beyond the keyslot were written")
	}
}

func TestTwoFormatsHaveNoKeyMaterialInCommon(t *testing.T) {
	a, _ := formatted(t, idData, dataKey(t))
	b, _ := formatted(t, idData, dataKey(t))
	first, err := os.ReadFile(a)
	must(t, err)
	second, err := os.ReadFile(b)
	must(t, err)
	if bytes.Equal(first[areasOffset:areasOffset+64], second[areasOffset:areasOffset+64]) {
		t.Error("two keyslots begin alike")
	}
}

func TestTheStockToolAcceptsWhatFormatWrites(t *testing.T) {
	path, _ := formatted(t, idData, dataKey(t))
	keys := filepath.Join(t.TempDir(), "key")
	for _, c := range []struct {
		dek  *secret.Bytes
		want int
	}{{dataKey(t), 0}, {logsKey(t), 2}} {
		must(t, c.dek.Use(func(p []byte) error { return os.WriteFile(keys, p, 0o600) }))
		cmd := exec.Command("cryptsetup", "open", "--test-passphrase", "--key-file", keys, path)
		out, err := cmd.CombinedOutput()
		if cmd.ProcessState == nil {
			t.Fatalf("cryptsetup is needed (`make deps`): %v", err)
		}
		if code := cmd.ProcessState.ExitCode(); code != c.want {
			t.Errorf("exit code is %d, want %d: %s", code, c.want, out)
		}
	}
	out, err := exec.Command("cryptsetup", "luksDump", path).CombinedOutput()
	must(t, err)
	for _, line := range []string{idData.UUID, "aes-xts-plain64", "sector: 4096 [bytes]", "Iterations: 1000"} {
		if !strings.Contains(string(out), line) {
			t.Errorf("luksDump has no %q:\n%s", line, out)
		}
	}
}

func TestFormatNeverWritesOverData(t *testing.T) {
	marker := func(id Identity, dek *secret.Bytes) []byte {
		m, err := newMarker(id, dek)
		must(t, err)
		return m
	}
	later := idData
	later.Generation++
	const size = 64 << 20
	ours := marker(idData, dataKey(t))
	for _, c := range []struct {
		name   string
		offset int64
		data   []byte
		found  string
	}{
		{"one bit in the first sector", 511, []byte{1}, "data at byte 511"},
		{"one bit just below 16 MiB", dataOffset - 1, []byte{1}, "data at byte 16777215"},
		{"one bit just below 32 MiB", blankHead - 1, []byte{1}, "data at byte 33554431"},
		{"one bit in the last sector", size - 1, []byte{1}, "data at byte 67108863"},
		{"a page in the middle", 48 << 20, bytes.Repeat([]byte{0xff}, 256<<10), "data at byte"},
		{"what is left of a GPT", 512, []byte("EFI PART"), "data at byte 512"},
		{"a LUKS1 header", 0, []byte("LUKS\xba\xbe\x00\x01"), "a signature of crypto_LUKS"},
		{"half a LUKS2 header", 0, header(t)[:8192], "a LUKS2 header"},
		{"a secondary header only", metadataSize, header(t)[metadataSize:areasOffset], "a signature of crypto_LUKS"},
		{"another volume's marker", 0, marker(idLogs, logsKey(t)), "a format marker that does not verify"},
		{"this volume's marker under another DEK", 0, marker(idData, logsKey(t)), "a format marker that does not verify"},
		{"this volume's marker of another generation", 0, marker(later, dataKey(t)), "a format marker that does not verify"},
		{"this volume's marker, changed", 0, append([]byte("KEYAGENT\x00FORMAT\x00x"), ours[17:]...), "a format marker that does not verify"},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := image(t, size)
			patch(t, path, c.data, c.offset)
			before := digest(t, path)
			_, err := formatImage(path, idData, dataKey(t))
			wantError(t, err, ErrNotBlank)
			if !strings.Contains(err.Error(), c.found) {
				t.Errorf("error is %q, want %q in it", err, c.found)
			}
			wantError(t, CheckBlank(context.Background(), path), ErrNotBlank)
			state, err := Probe(context.Background(), path, idData, dataKey(t))
			must(t, err)
			if state != StateOther && state != StateLUKS2 {
				t.Errorf("state is %v", state)
			}
			if digest(t, path) != before {
				t.Error("the disk has changed")
			}
		})
	}
}

func TestAMarkerDoesNotExcuseDataElsewhere(t *testing.T) {
	path := image(t, 20<<20)
	m, err := newMarker(idData, dataKey(t))
	must(t, err)
	patch(t, path, m, 0)
	patch(t, path, []byte("data"), maxGuardedSize)
	before := digest(t, path)
	_, err = formatImage(path, idData, dataKey(t))
	wantError(t, err, ErrNotBlank)
	if digest(t, path) != before {
		t.Error("the disk has changed")
	}
}

func TestProbeTellsAnInterruptedFormatOnlyWithTheKey(t *testing.T) {
	ctx := context.Background()
	path := image(t, 20<<20)
	state, err := Probe(ctx, path, idData, dataKey(t))
	if err != nil || state != StateBlank {
		t.Errorf("state of zeros is %v, %v", state, err)
	}
	m, err := newMarker(idData, dataKey(t))
	must(t, err)
	patch(t, path, m, 0)
	patch(t, path, header(t)[sectorSize:50000], sectorSize)
	for _, c := range []struct {
		dek  *secret.Bytes
		want State
	}{{dataKey(t), StateInterrupted}, {logsKey(t), StateOther}, {nil, StateOther}} {
		state, err := Probe(ctx, path, idData, c.dek)
		if err != nil || state != c.want {
			t.Errorf("state is %v, %v, want %v", state, err, c.want)
		}
	}
}

func TestFormatRefusesWhatCannotHoldAVolume(t *testing.T) {
	ctx := context.Background()
	h := newTestHeader(t, idData, dataKey(t))
	for _, size := range []int64{0, minDevice - 1} {
		_, err := formatImage(image(t, size), idData, dataKey(t))
		wantError(t, err, ErrDeviceSize)
	}
	pipe := filepath.Join(t.TempDir(), "pipe")
	must(t, unix.Mkfifo(pipe, 0o600))
	file := image(t, 20<<20)
	for name, path := range map[string]string{
		"a regular file": file, "a character device": "/dev/zero", "a pipe that nobody writes to": pipe,
	} {
		t.Run(name, func(t *testing.T) {
			wantError(t, Write(ctx, WriteRequest{path, idData, h, DeadlineIn(time.Minute)}, dataKey(t)), ErrNotBlockDevice)
		})
	}
	must(t, CheckBlank(ctx, file))
	none := filepath.Join(t.TempDir(), "none")
	wantError(t, Write(ctx, WriteRequest{none, idData, h, DeadlineIn(time.Minute)}, dataKey(t)), os.ErrNotExist)
	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	wantError(t, Write(cancelled, WriteRequest{file, idData, h, DeadlineIn(time.Minute)}, dataKey(t)), context.Canceled)
}

// A partition may end within a sector of 4096 bytes.
func TestADeviceOfAnOddSizeIsFormatted(t *testing.T) {
	path := image(t, 20<<20+7*sectorSize)
	_, err := formatImage(path, idData, dataKey(t))
	must(t, err)
	d, err := openShared(context.Background(), path)
	must(t, err)
	defer d.Close()
	if got := d.plainBytes(); got != 4<<20 {
		t.Errorf("mapping would have %d bytes", got)
	}
}

func TestMalformedArgumentsAreRefusedBeforeAnythingIsTouched(t *testing.T) {
	ctx := context.Background()
	for _, id := range []Identity{
		{},
		{Volume: "", UUID: idData.UUID},
		{Volume: "../data", UUID: idData.UUID},
		{Volume: "da/ta", UUID: idData.UUID},
		{Volume: "data\n", UUID: idData.UUID},
		{Volume: "data\x00", UUID: idData.UUID},
		{Volume: "dаta", UUID: idData.UUID}, // a Cyrillic letter
		{Volume: "-data", UUID: idData.UUID},
		{Volume: strings.Repeat("v", 129), UUID: idData.UUID},
		{Volume: "data", UUID: ""},
		{Volume: "data", UUID: strings.ToUpper(idData.UUID)},
		{Volume: "data", UUID: strings.ReplaceAll(idData.UUID, "-", "")},
		{Volume: "data", UUID: idData.UUID + "\n"},
	} {
		_, err := NewHeader(ctx, id, Layout{}, dataKey(t))
		wantError(t, err, ErrInvalid)
		wantError(t, Write(ctx, WriteRequest{"/nonexistent", id, nil, Deadline{}}, dataKey(t)), ErrInvalid)
		_, err = Adopt(ctx, "/nonexistent", id, dataKey(t))
		wantError(t, err, ErrInvalid)
		_, _, err = Open(ctx, OpenRequest{Device: "/nonexistent", Name: "data", Identity: id, MACs: MACs{Header: MAC{1}}}, dataKey(t))
		wantError(t, err, ErrInvalid)
	}
	for _, name := range []string{"", ".", "..", "a/b", "a b", "control\n", strings.Repeat("n", 81)} {
		_, _, err := Open(ctx, OpenRequest{Device: "/nonexistent", Name: name, Identity: idData, MACs: MACs{Header: MAC{1}}}, dataKey(t))
		wantError(t, err, ErrInvalid)
		wantError(t, Close(ctx, CloseRequest{Name: name, UUID: idData.UUID}), ErrInvalid)
		_, err = Status(ctx, name)
		wantError(t, err, ErrInvalid)
	}
	for _, macs := range []MACs{{}, {Copies: [2]MAC{{1}, {2}}}, {Header: MAC{1}, Copies: [2]MAC{{}, {2}}}} {
		_, _, err := Open(ctx, OpenRequest{Device: "/nonexistent", Name: "data", Identity: idData, MACs: macs}, dataKey(t))
		wantError(t, err, ErrHeaderMAC)
	}
	for _, req := range []CloseRequest{{Name: "data"}, {Name: "data", UUID: "x"}, {Name: "data", UUID: idData.UUID, Throwaway: true}} {
		wantError(t, Close(ctx, req), ErrInvalid)
	}
	closed := key(t, 1, 32)
	must(t, closed.Close())
	_, err := NewHeader(ctx, idData, Layout{}, closed)
	wantError(t, err, secret.ErrClosed)
}

func TestOpenWantsABlockDevice(t *testing.T) {
	path, macs := formatted(t, idData, dataKey(t))
	_, _, err := Open(context.Background(), OpenRequest{Device: path, Name: "data", Identity: idData, MACs: macs}, dataKey(t))
	wantError(t, err, ErrNotBlockDevice)
}

func TestAdoptAcceptsOnlyAHeaderThatTheKeyOpens(t *testing.T) {
	ctx := context.Background()
	path, _ := formatted(t, idData, dataKey(t))
	_, err := Adopt(ctx, path, idData, logsKey(t))
	wantError(t, err, ErrWrongKey)
	_, err = Adopt(ctx, path, idLogs, dataKey(t))
	wantError(t, err, ErrVolumeMismatch)
	patch(t, path, []byte{0xff}, areasOffset+5)
	_, err = Adopt(ctx, path, idData, dataKey(t))
	wantError(t, err, ErrWrongKey)
	patch(t, path, make([]byte, sectorSize), 0)
	_, err = Adopt(ctx, path, idData, dataKey(t))
	wantRule(t, err, RuleMagic)
}

// What libcryptsetup says belongs into the error, and nowhere else.
func TestTheLibrarysMessagesBecomePartOfTheError(t *testing.T) {
	err := withSession(filepath.Join(t.TempDir(), "none"), func(*session) error { return nil })
	wantError(t, err, ErrLibrary)
	err = withSession(image(t, 20<<20), func(s *session) error { return s.format("not a UUID", nil) })
	wantError(t, err, ErrLibrary)
	if !strings.Contains(err.Error(), "UUID") {
		t.Errorf("error is %v", err)
	}
	t.Log(err)
}

// stock runs the stock tool, which must succeed.
func stock(t testing.TB, args ...string) []byte {
	t.Helper()
	out, err := exec.Command("cryptsetup", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("cryptsetup %v (is it installed? `make deps`): %v: %s", args, err, out)
	}
	return out
}
