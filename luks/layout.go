package luks

// Where things stand on a device, in bytes. Version 1 of the whitelist knows
// this one layout; libcryptsetup writes it when asked for the default metadata
// size and a data offset of 16 MiB.
const (
	sectorSize   = 512
	binarySize   = 4096     // a binary header, checksummed with its JSON area
	metadataSize = 16 << 10 // one copy: binary header and JSON area
	jsonSize     = metadataSize - binarySize
	areasOffset  = 2 * metadataSize // the keyslots' areas follow the two copies
	areaSize     = 258048           // 64 bytes × 4000 stripes, rounded up to 4096
	guardedSize  = areasOffset + areaSize
	dataOffset   = 16 << 20
	areasSize    = dataOffset - areasOffset
	minDataSize  = 1 << 20
	minDevice    = dataOffset + minDataSize

	// Of the forms with tags.
	authAreaSize   = 385024 // 96 bytes × 4000 stripes, rounded up to 4096
	maxGuardedSize = areasOffset + authAreaSize
	macKeySize     = 32
	aeadAreaSize   = 65536 // 16 bytes × 4000 stripes, rounded up to 4096
	aeadKeySize    = 16
	tagSize        = 32 // for each sector of data
	superblockSize = 4096

	dataSectorSize = 4096
	volumeKeySize  = 64
	kdfIterations  = 1000
	cipherName     = "aes"
	cipherMode     = "xts-plain64"
	cipherSpec     = cipherName + "-" + cipherMode
)
