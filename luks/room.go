package luks

import (
	"context"
	"fmt"
	"sort"
)

// DeviceBytes is the size of a device.
func DeviceBytes(ctx context.Context, device string) (int64, error) {
	d, err := openShared(ctx, device)
	if err != nil {
		return 0, fmt.Errorf("size of %s: %w", device, err)
	}
	defer d.Close()
	return d.size, nil
}

// Room is how many bytes of data a device of that size has: with integrity some MiB less
// than dm-integrity could offer. It is a multiple of 4096, and never negative.
func Room(device int64, integrity Integrity) int64 {
	if integrity == "" {
		return max(device-dataOffset, 0) &^ (dataSectorSize - 1)
	}
	if device < Need(dataSectorSize, integrity) {
		return 0
	}
	sectors := sort.Search(int(device/dataSectorSize), func(n int) bool {
		return Need(int64(n+1)*dataSectorSize, integrity) > device
	})
	return int64(sectors) * dataSectorSize
}

// Need is how large a device must be for that many bytes of data: the header, and for a
// volume with integrity the tags, the journal and what is lost by rounding. The inverse
// of [Room].
func Need(data int64, integrity Integrity) int64 {
	data = (data + dataSectorSize - 1) &^ (dataSectorSize - 1)
	if integrity == "" {
		return data + dataOffset
	}
	// Tags of 32 bytes for 4096, in runs of 128 KiB for 16 MiB; a journal that the
	// kernel makes a 128th of the device and at most 64 MiB long.
	const maxJournal, rounding = 64 << 20, 1 << 20
	part := (data + 127) / 128
	device := data + 2*part + dataOffset + 2*rounding
	return data + dataOffset + part + min(device/128, maxJournal) + rounding
}
