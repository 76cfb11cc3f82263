package luks

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"
)

const goodParams = "aes-xts-plain64 :64:logon:cryptsetup:6f1d3a52-1c6b-4f0c-9a53-0d8a4a6b7c11-d0 0 7:0 32768 3 no_read_workqueue no_write_workqueue sector_size:4096"

func TestALiveTableIsReadBack(t *testing.T) {
	m, err := parseLive(liveAnswer("uuid", 8192, "crypt", goodParams))
	must(t, err)
	got, err := checkTable(m, "data", idData.UUID)
	must(t, err)
	want := Mapping{Name: "data", Path: "/dev/mapper/data", UUID: idData.UUID, Device: DevNum{254, 0}, DataDevice: DevNum{7, 0}, Bytes: 4 << 20}
	if got != want {
		t.Errorf("mapping is %+v, want %+v", got, want)
	}
}

func TestALiveTableWithAnythingElseInItIsAMismatch(t *testing.T) {
	for _, c := range []struct{ name, old, new string }{
		{"a null cipher", "aes-xts-plain64", "cipher_null-ecb"},
		{"a cipher in the kernel's own spelling", "aes-xts-plain64", "capi:xts(aes)-plain64"},
		{"no key", ":64:logon:cryptsetup:6f1d3a52-1c6b-4f0c-9a53-0d8a4a6b7c11-d0", "-"},
		{"a key in the table", ":64:logon:cryptsetup:6f1d3a52-1c6b-4f0c-9a53-0d8a4a6b7c11-d0", strings.Repeat("5ec3e7", 20)},
		{"a shorter key", ":64:", ":32:"},
		{"a key that a user may read", ":logon:", ":user:"},
		{"another volume's key", "6f1d3a52", "c0a9e1b4"},
		{"another digest's key", "-d0 ", "-d1 "},
		{"another IV offset", " 0 7:0", " 8 7:0"},
		{"another data offset", " 32768 ", " 0 "},
		{"a device by path", "7:0", "/dev/loop0"},
		{"a device number with more behind it", "7:0", "7:0x"},
		{"another sector size", "sector_size:4096", "sector_size:512"},
		{"no sector size", "3 no_read_workqueue no_write_workqueue sector_size:4096", "2 no_read_workqueue no_write_workqueue"},
		{"an unknown option", "3 no", "4 same_cpu_crypt no"},
		{"integrity", "3 no", "4 integrity:28:aead no"},
		{"an option twice", "3 no_read_workqueue", "4 no_read_workqueue no_read_workqueue"},
		{"a wrong count", "3 no", "2 no"},
		{"no options", " 3 no_read_workqueue no_write_workqueue sector_size:4096", ""},
		{"nothing", goodParams, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			params := strings.Replace(goodParams, c.old, c.new, 1)
			if params == goodParams {
				t.Fatal("nothing was replaced")
			}
			m, err := parseLive(liveAnswer("uuid", 8192, "crypt", params))
			must(t, err)
			_, err = checkTable(m, "data", idData.UUID)
			wantError(t, err, ErrTableMismatch)
			if strings.Contains(err.Error(), "5ec3e7") {
				t.Errorf("the error shows a key: %v", err)
			}
		})
	}
}

func TestADMUUIDIsOursOnlyInItsOneForm(t *testing.T) {
	good := dmUUID(idData.UUID, "data")
	if uuid, ours := luksUUID(good, "data"); !ours || uuid != idData.UUID {
		t.Errorf("%q is %q, %v", good, uuid, ours)
	}
	for _, dm := range []string{"", "CRYPT-LUKS2-", good + "x", good[1:], "CRYPT-LUKS1" + good[11:], strings.ToUpper(good), "CRYPT-LUKS2-6f1d3a521c6b4f0c9a530d8a4a6b7cz1-data", "LVM-" + good} {
		if _, ours := luksUUID(dm, "data"); ours {
			t.Errorf("%q is taken for ours", dm)
		}
	}
}

func TestALockIsWaitedForUntilTheContextEnds(t *testing.T) {
	l := locks{held: map[string]*lock{}}
	release, err := l.acquire(context.Background(), "a")
	must(t, err)
	other, err := l.acquire(context.Background(), "b")
	must(t, err)
	other()
	ctx, cancel := context.WithTimeout(context.Background(), time.Millisecond)
	defer cancel()
	if _, err := l.acquire(ctx, "a"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error is %v", err)
	}
	release()
	again, err := l.acquire(context.Background(), "a")
	must(t, err)
	again()
	if len(l.held) != 0 {
		t.Errorf("%d locks are kept", len(l.held))
	}
}
