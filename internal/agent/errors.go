package agent

import (
	"errors"

	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/luks"
)

// classify gives the errors of package luks their class and a hint.
func classify(err error) error {
	for _, row := range []struct {
		is    error
		class failure.Class
		hint  string
	}{
		{luks.ErrHeaderRefused, failure.HeaderRefused, "find out who changed it, then keyagent restore-header with a backup"},
		{luks.ErrHeaderMAC, failure.HeaderRefused, "the header is not the one that was recorded: keyagent restore-header with the newest backup"},
		{luks.ErrShortHeader, failure.HeaderRefused, ""},
		{luks.ErrHeaderChanged, failure.HeaderRefused, "keyagent restore-header puts it back"},
		{luks.ErrVolumeMismatch, failure.HeaderRefused, "is this the right disk? compare device in the configuration; of a clone, source names what it is a clone of"},
		{luks.ErrTableMismatch, failure.HeaderRefused, ""},
		{luks.ErrWrongKey, failure.WrongKey, "the key service's key is not this disk's"},
		{luks.ErrInvalidKey, failure.WrongKey, ""},
		{luks.ErrNotBlank, failure.NotBlank, "keyagent never formats a disk that holds something; erase it yourself if you mean to"},
		{luks.ErrDeviceBusy, failure.DeviceBusy, "something else uses the device"},
		{luks.ErrDeviceHung, failure.DeviceBusy, "the disk does not answer: look at the host; other volumes go on"},
		{luks.ErrNameTaken, failure.DeviceBusy, "close the other mapping, or choose another name"},
		{luks.ErrNotOurs, failure.DeviceBusy, "another program opened something under this name: close it with that program"},
		{luks.ErrTooLate, failure.State, "it took too long; run it again"},
		{luks.ErrNotBlockDevice, failure.Configuration, "device must be a disk or a partition"},
		{luks.ErrReadOnlyDevice, failure.Configuration, "say read_only: true, or make the disk writable"},
		{luks.ErrDeviceSize, failure.Configuration, "a volume needs 17 MiB at least, and never shrinks"},
		{luks.ErrNotRebuildable, failure.HeaderRefused, "keyagent restore-header VOLUME FILE writes a backup back"},
		{luks.ErrNoGrowth, failure.State, "move the data to a larger volume"},
		{luks.ErrNoIntegrity, failure.Configuration, "integrity cannot be added to a volume that exists: move the data to a new one, or leave integrity out; one that was never finished ends with keyagent volume reset on the service"},
		{luks.ErrShrink, failure.State, "a volume never shrinks: restore the size of its disk"},
		{luks.ErrNotActive, failure.NotFound, "the volume is not open"},
		{luks.ErrIO, failure.DeviceBusy, "the disk failed to read or write: look at the kernel's log"},
		{luks.ErrSuspended, failure.State, "keyagent resume it first"},
		{luks.ErrReserved, failure.Held, "another machine holds the disk's reservation"},
		{luks.ErrKernel, failure.Configuration, ""},
		{luks.ErrInvalid, failure.Usage, ""},
	} {
		if errors.Is(err, row.is) {
			return failure.New(row.class, err, row.hint)
		}
	}
	return err
}
