package luks

import "fmt"

// KeptHeader is the header of a volume that is open, from the bytes that [Header.Bytes]
// gave and that the caller kept where only it can write. It satisfies the guard, and is
// believed to have those MACs: nothing is verified without the DEK. It serves
// [Matches] and [WriteBack].
func KeptHeader(raw []byte, uuid string, macs MACs) (*Header, error) {
	g, err := guard(raw)
	if err != nil {
		return nil, fmt.Errorf("header that was kept: %w", err)
	}
	if g.uuid != uuid {
		return nil, fmt.Errorf("header that was kept: %w: its UUID is %s, expected is %s", ErrVolumeMismatch, g.uuid, uuid)
	}
	return &Header{raw: g.raw, uuid: g.uuid, form: g.form, bytes: g.bytes, macs: macs, damaged: undamaged}, nil
}
