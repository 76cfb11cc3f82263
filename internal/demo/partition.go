package demo

import (
	"encoding/binary"
	"os"
)

// The demo's disk has two partitions, in a table of the PC's old kind: what starts at
// sector 2048 and ends at an odd one, as tools make that give a partition the rest of
// a disk.
const (
	sectorSize     = 512
	firstSectors   = 40<<20/sectorSize + 7
	secondStart    = 2048 + firstSectors + 9 // a multiple of 4096 bytes again
	secondSectors  = (diskSize/sectorSize - secondStart) - 33
	tableAt        = 446
	linuxPartition = 0x83
)

// partition writes the table to a blank disk.
func partition(disk *os.File) error {
	sector := make([]byte, sectorSize)
	for i, p := range [][2]uint32{{2048, firstSectors}, {secondStart, secondSectors}} {
		entry := sector[tableAt+16*i:]
		entry[4] = linuxPartition
		binary.LittleEndian.PutUint32(entry[8:], p[0])
		binary.LittleEndian.PutUint32(entry[12:], p[1])
	}
	copy(sector[sectorSize-2:], "\x55\xaa")
	_, err := disk.WriteAt(sector, 0)
	return err
}
