package snp

import (
	"encoding/binary"
	"fmt"

	"github.com/google/go-sev-guest/abi"
	"github.com/google/uuid"
)

// maxTable is what the kernel's driver takes of a certificate table, in bytes.
const maxTable = 16 << 10

// entry of a certificate table: a GUID and where its bytes are.
type tableEntry struct {
	guid uuid.UUID
	data []byte
}

// parseTable reads what the host hands over beside a report: AMD's GHCB
// specification (56421), MSG_REPORT_REQ. The host is hostile, so that sums of its
// numbers may not overflow; go-sev-guest's reader lets them, and panics.
func parseTable(data []byte) ([]tableEntry, error) {
	if len(data) > maxTable {
		return nil, fmt.Errorf("certificate table of %d bytes", len(data))
	}
	var entries []tableEntry
	for at := 0; ; at += abi.CertTableEntrySize {
		if at == 0 && zero(data) {
			return nil, nil // the host has none
		}
		if len(data)-at < abi.CertTableEntrySize {
			return nil, fmt.Errorf("certificate table has no end")
		}
		head := data[at : at+abi.CertTableEntrySize]
		if zero(head) {
			break
		}
		from := uint64(binary.LittleEndian.Uint32(head[16:]))
		to := from + uint64(binary.LittleEndian.Uint32(head[20:]))
		if from < uint64(at)+abi.CertTableEntrySize || to > uint64(len(data)) {
			return nil, fmt.Errorf("certificate table says that an entry is in bytes %d to %d of %d", from, to, len(data))
		}
		entries = append(entries, tableEntry{uuid.UUID(head[:16]), data[from:to]})
	}
	return entries, nil
}

// leafOf is the table's certificate for a report's key, or nil.
func leafOf(entries []tableEntry, signer abi.ReportSigner) []byte {
	want := uuid.MustParse(abi.VcekGUID)
	if signer == abi.VlekReportSigner {
		want = uuid.MustParse(abi.VlekGUID)
	}
	for _, e := range entries {
		if e.guid == want && len(e.data) > 0 {
			return e.data
		}
	}
	return nil
}
