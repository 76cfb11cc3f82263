package luks

import (
	"errors"
	"fmt"
)

// The errors that callers tell apart, with [errors.Is]. An error never carries
// key material.
var (
	// ErrInvalid means that a name, a volume ID or a UUID is malformed. Nothing was
	// read or written.
	ErrInvalid = errors.New("invalid argument")

	// ErrInvalidKey means that the DEK is missing, zero, too short or too long. Nothing
	// was read or written.
	ErrInvalidKey = errors.New("key cannot be a DEK")

	// ErrHeaderRefused means that the header breaks a rule of the guard. The error is a
	// [*HeaderError], which names the rule.
	ErrHeaderRefused = errors.New("header refused")

	// ErrHeaderMAC means that the header satisfies the guard but is not the one that
	// was recorded: it was changed, or is an older one, or the DEK or the generation is
	// not this volume's. The four cannot be told apart, since the MAC is keyed by the
	// DEK and is verified before any keyslot is tried.
	ErrHeaderMAC = errors.New("header does not match its MAC")

	// ErrVolumeMismatch means that the header is another volume's, by its UUID.
	ErrVolumeMismatch = errors.New("header belongs to another volume")

	// ErrWrongKey means that the DEK opens no keyslot.
	ErrWrongKey = errors.New("key opens no keyslot")

	// ErrNotBlank means that a device holds data and is therefore not formatted. The
	// error is a [*NotBlankError], which says what was found.
	ErrNotBlank = errors.New("device is not blank")

	// ErrDeviceBusy means that a device is mounted or otherwise in use, or that a
	// mapping is.
	ErrDeviceBusy = errors.New("device is busy")

	// ErrNotActive means that there is no mapping of that name.
	ErrNotActive = errors.New("mapping is not active")

	// ErrNameTaken means that the mapping's name is in use for something else.
	ErrNameTaken = errors.New("mapping name is taken")

	// ErrIO means that a device failed to be read or written. It never means that the
	// device is new.
	ErrIO = errors.New("input/output failure")

	// ErrShortHeader means that a device ended before its header did.
	ErrShortHeader = errors.New("header is incomplete")

	// ErrDeviceSize means that a device cannot hold a header and 1 MiB of data.
	ErrDeviceSize = errors.New("device has an unsuitable size")

	// ErrNotBlockDevice means that a mapping was asked for on something else.
	ErrNotBlockDevice = errors.New("not a block device")

	// ErrTableMismatch means that the kernel's live table is not the one that the
	// header stands for. A mapping that Open had just made was removed.
	ErrTableMismatch = errors.New("live device-mapper table is not as expected")

	// ErrHeaderChanged means that the header on the disk is no longer the one that
	// the volume was opened with. [WriteBack] puts it back.
	ErrHeaderChanged = errors.New("header on the disk has changed")

	// ErrNotRebuildable means that a header is not damaged in exactly one of its
	// copies, or is of version 1, so that no copy can be made from the other.
	ErrNotRebuildable = errors.New("header cannot be rebuilt")

	// ErrNotOurs means that a mapping of the right name, UUID and device does not
	// decrypt with the volume's key: something else made it.
	ErrNotOurs = errors.New("mapping was not made with this volume's key")

	// ErrNoIntegrity means that a volume has less integrity than was asked for. It
	// cannot be added to one that exists.
	ErrNoIntegrity = errors.New("volume was made without the integrity that is asked for")

	// ErrNoGrowth means that a volume with integrity does not grow: how much of it has
	// tags would be the disk's word, and what is wiped anew reads as good data.
	ErrNoGrowth = errors.New("a volume with integrity does not grow")

	// ErrSuspended means that a mapping is suspended. [Resume] ends that.
	ErrSuspended = errors.New("mapping is suspended")

	// ErrShrink means that a device is smaller than the mapping on it.
	ErrShrink = errors.New("device is smaller than its mapping")

	// ErrReadOnlyDevice means that a device refuses to be written.
	ErrReadOnlyDevice = errors.New("device is read-only")

	// ErrDeviceHung means that a device did not answer in time. Nothing is known
	// of what it holds. What was asked of it may still reach it later.
	ErrDeviceHung = errors.New("device does not answer")

	// ErrTooLate means that the time in which a volume may be created has passed.
	// The header area may hold a marker or parts of a header; no data was written.
	ErrTooLate = errors.New("time limit for creating the volume has passed")

	// ErrNoReservations means that a device has no persistent reservations.
	ErrNoReservations = errors.New("device has no persistent reservations")

	// ErrReserved means that another machine holds a device's reservation.
	ErrReserved = errors.New("device is reserved by another machine")

	// ErrKernel means that the kernel lacks a feature. The error names the option.
	ErrKernel = errors.New("kernel lacks a feature")

	// ErrLibrary means that libcryptsetup failed for another reason.
	ErrLibrary = errors.New("libcryptsetup failed")
)

// Rule names one demand of the header guard.
type Rule string

// The rules. Their values are stable: they stand in audit logs and metrics.
const (
	RuleMagic        Rule = "not a LUKS2 header"
	RuleBinaryHeader Rule = "binary header"
	RuleChecksum     Rule = "checksum"
	RuleCopies       Rule = "copies disagree"
	RuleTrailing     Rule = "trailing bytes"
	RuleJSONSyntax   Rule = "JSON syntax"
	RuleJSONDepth    Rule = "JSON depth"
	RuleJSONSize     Rule = "JSON size"
	RuleDuplicateKey Rule = "duplicate key"
	RuleUnknownField Rule = "unknown field"
	RuleMissingField Rule = "missing field"
	RuleFieldType    Rule = "field type"
	RuleNullCipher   Rule = "null cipher"
	RuleCipher       Rule = "cipher"
	RuleKeySize      Rule = "key size"
	RuleKeyslotCount Rule = "keyslot count"
	RuleKeyslotType  Rule = "keyslot type"
	RuleKeyslotArea  Rule = "keyslot area"
	RuleKDF          Rule = "key derivation"
	RuleKDFCost      Rule = "key derivation cost"
	RuleSegmentCount Rule = "segment count"
	RuleSegmentType  Rule = "segment type"
	RuleSegmentFlags Rule = "segment flags"
	RuleIntegrity    Rule = "segment integrity"
	RuleOffset       Rule = "segment offset"
	RuleSize         Rule = "segment size"
	RuleIVTweak      Rule = "IV tweak"
	RuleSectorSize   Rule = "sector size"
	RuleDigest       Rule = "digest"
	RuleToken        Rule = "token"
	RuleRequirement  Rule = "requirement"
	RuleFlags        Rule = "persistent flags"
	RuleConfig       Rule = "configuration"
)

// HeaderError is the refusal of a header. It wraps [ErrHeaderRefused].
type HeaderError struct {
	Rule  Rule
	Where string // the field, such as "segments.0.encryption"
	Found string // what stands there, quoted and shortened; may be empty
}

func (e *HeaderError) Error() string {
	s := fmt.Sprintf("%v: %s: %s", ErrHeaderRefused, e.Rule, e.Where)
	if e.Found != "" {
		s += " is " + e.Found
	}
	return s
}

func (e *HeaderError) Unwrap() error { return ErrHeaderRefused }

func refuse(rule Rule, where, found string) error {
	if found != "" {
		found = fmt.Sprintf("%.48q", found)
	}
	return &HeaderError{Rule: rule, Where: where, Found: found}
}

// NotBlankError says what stands on a device that should be blank. It wraps
// [ErrNotBlank].
type NotBlankError struct {
	Offset int64  // of the first byte that was found, in bytes
	Found  string // such as "a GPT partition table"
}

func (e *NotBlankError) Error() string {
	return fmt.Sprintf("%v: found %s at byte %d", ErrNotBlank, e.Found, e.Offset)
}

func (e *NotBlankError) Unwrap() error { return ErrNotBlank }
