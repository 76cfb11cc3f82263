package luks

import (
	"math/rand/v2"
	"testing"
)

func TestRoomIsTheInverseOfNeed(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for _, i := range []Integrity{"", HMACSHA256} {
		for range 2000 {
			data := 1 + r.Int64N(1<<r.IntN(50))
			room := Room(Need(data, i), i)
			if room < data || room >= data+2*dataSectorSize {
				t.Fatalf("%q: for %d bytes %d are needed, which have room for %d", i, data, Need(data, i), room)
			}
			if less := Room(Need(data, i)-dataSectorSize, i); less >= room {
				t.Fatalf("%q: a smaller device has room for %d, and not fewer than %d", i, less, room)
			}
		}
		for _, small := range []int64{-1, 0, dataOffset, dataOffset + 4095} {
			if n := Room(small, i); n != 0 {
				t.Errorf("%q: %d bytes have room for %d", i, small, n)
			}
		}
	}
}

// modelProvided is what dm-integrity offers on a device of that size, by the arithmetic
// of Linux 6.1, drivers/md/dm-integrity.c: with tags of 32 bytes, blocks of 4096, its own
// defaults and fix_padding, behind a header of 16 MiB.
func modelProvided(device int64) int64 {
	const (
		superblock     = 8
		section        = 32<<3 + 8 // 4 entries of 104 bytes in each of 8 sectors, their data, and those sectors
		log2Interleave = 15
		run            = 32 << (log2Interleave - 3) / sectorSize
	)
	total := device / sectorSize
	sections := max(min(131072, total>>7)/section, 1)
	initial := int64(superblock) + section*sections
	fits := func(sectors int64) bool {
		area, offset := (sectors-1)>>log2Interleave, (sectors-1)&(1<<log2Interleave-1)
		last := dataOffset/sectorSize + area<<log2Interleave + (area+1)*run + initial + offset
		return last < total
	}
	sectors := int64(0)
	for bit := int64(1) << 50; bit >= 8; bit >>= 1 {
		if fits(sectors | bit) {
			sectors |= bit
		}
	}
	return sectors * sectorSize
}

// A volume never has more than the kernel offers, and not much less.
func TestThereIsRoomForWhatAVolumeHas(t *testing.T) {
	if got := modelProvided(40 << 20); got != 24629248 { // as the kernel said
		t.Fatalf("the model says %d", got)
	}
	r := rand.New(rand.NewPCG(3, 4))
	for range 20000 {
		device := int64(20<<20) + r.Int64N(1<<(21+r.IntN(28)))
		room, offered := Room(device, HMACSHA256), modelProvided(device)
		if room > offered {
			t.Fatalf("a device of %d bytes: a volume of %d, and the kernel offers %d", device, room, offered)
		}
		if room < offered-offered/64-8<<20 {
			t.Errorf("a device of %d bytes: a volume of %d, though the kernel offers %d", device, room, offered)
		}
	}
}
