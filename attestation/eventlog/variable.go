package eventlog

import (
	"bytes"
	"crypto/x509"
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/google/go-eventlog/tcg"
)

// describeVariable returns the name and the content of a variable of the firmware.
func describeVariable(kind tcg.EventType, data []byte) (name, detail string) {
	c := &cursor{rest: data}
	c.take(16) // vendor
	chars, size := c.u64(), c.u64()
	if c.short || chars > uint64(len(c.rest))/2 || size > uint64(len(c.rest)) {
		return "EFI variable", ""
	}
	raw := printable(text(c.take(int(chars) * 2)))
	value := c.take(int(size))
	if c.short {
		return "EFI variable", ""
	}
	name = variableName(raw)
	if kind == tcg.EFIVariableAuthority {
		return authorityName(raw), authority(value)
	}
	switch {
	case slices.Contains([]string{"PK", "KEK", "db", "dbx", "dbr", "dbt", "MokList", "MokListX"}, raw):
		return name, signatureLists(value)
	case raw == "BootOrder" || raw == "DriverOrder":
		return name, bootOrder(value)
	case isBootEntry(raw):
		return name, bootEntry(value)
	case len(value) == 1:
		return name, fmt.Sprintf("value %d", value[0])
	}
	return name, fmt.Sprintf("%d bytes", len(value))
}

func variableName(name string) string {
	switch name {
	case "SecureBoot":
		return "Secure Boot state (SecureBoot)"
	case "PK", "KEK", "db", "dbx", "dbr", "dbt":
		return "Secure Boot " + name
	case "":
		return "EFI variable"
	}
	return "EFI variable " + name
}

func isBootEntry(name string) bool {
	for _, prefix := range []string{"Boot", "Driver"} {
		n, ok := strings.CutPrefix(name, prefix)
		if ok && len(n) == 4 && strings.Trim(n, "0123456789ABCDEFabcdef") == "" {
			return true
		}
	}
	return false
}

// bootEntry shows the title and the path of an EFI_LOAD_OPTION (UEFI 2.10,
// section 3.1.3).
func bootEntry(value []byte) string {
	c := &cursor{rest: value}
	c.take(4) // attributes
	size := int(c.u16())
	end := -1
	for i := 0; i+1 < len(c.rest); i += 2 {
		if c.rest[i] == 0 && c.rest[i+1] == 0 {
			end = i + 2
			break
		}
	}
	if c.short || end < 0 {
		return fmt.Sprintf("%d bytes", len(value))
	}
	title := printable(text(c.take(end)))
	out := fmt.Sprintf("%q", title)
	if path := c.take(size); !c.short && len(path) > 0 {
		if shown := devicePath(path); shown != "" {
			out += " at " + shown
		}
	}
	return out
}

func bootOrder(value []byte) string {
	var out []string
	for i := 0; i+1 < len(value) && len(out) < 32; i += 2 {
		out = append(out, fmt.Sprintf("%04X", binary.LittleEndian.Uint16(value[i:])))
	}
	return strings.Join(out, ", ")
}

func authorityName(variable string) string {
	switch variable {
	case "":
		return "authority of a program"
	case "SbatLevel":
		return "shim's revocation level (SbatLevel)"
	}
	return "authority of a program, from " + variable
}

// authority shows what let a program run: the certificate that it is signed
// under, its own digest, or a text of shim's. The value is an EFI_SIGNATURE_DATA,
// an owner and a certificate, or, by shim, the certificate alone.
func authority(value []byte) string {
	if isText(value) {
		return printable(string(value))
	}
	for _, der := range [][]byte{value, value[min(16, len(value)):]} {
		if cert, err := x509.ParseCertificate(der); err == nil {
			return printable(cert.Subject.String())
		}
	}
	if len(value) == 16+32 {
		return fmt.Sprintf("digest %x", value[16:])
	}
	return fmt.Sprintf("%d bytes", len(value))
}

// Kinds of signature lists (UEFI 2.10, section 32.4.1).
const (
	certX509       = "A5C059A1-94E4-4AA7-87B5-AB155C2BF072"
	certSHA256     = "C1C41626-504C-4092-ACA9-41F936934328"
	certX509SHA256 = "3BD2A492-96C0-4079-B420-FCF98EF103ED"
)

// signatureLists counts what a database of Secure Boot has: certificates by their
// subject, hashes by number, and the newest date of a revoked certificate.
func signatureLists(value []byte) string {
	c := &cursor{rest: value}
	var subjects []string
	var certificates, hashes, revoked, other int
	var newest time.Time
	for len(c.rest) > 0 {
		kind := guid(c.take(16))
		total, header, size := c.u32(), c.u32(), c.u32()
		if c.short || size < 16 || uint64(total) < 28+uint64(header) || uint64(total)-28 > uint64(len(c.rest)) {
			return fmt.Sprintf("%d bytes", len(value))
		}
		list := c.take(int(total) - 28)[header:]
		for len(list) >= int(size) {
			entry := list[16:size]
			list = list[size:]
			switch kind {
			case certX509:
				certificates++
				if cert, err := x509.ParseCertificate(entry); err == nil && len(subjects) < 8 {
					subjects = append(subjects, subject(cert))
				}
			case certSHA256:
				hashes++
			case certX509SHA256:
				revoked++
				if at := efiTime(entry[min(32, len(entry)):]); at.After(newest) {
					newest = at
				}
			default:
				other++
			}
		}
	}
	var out []string
	for _, n := range []struct {
		count int
		what  string
	}{{certificates, "certificates"}, {hashes, "hashes"}, {revoked, "revoked certificates"}, {other, "others"}} {
		if n.count > 0 {
			out = append(out, fmt.Sprintf("%d %s", n.count, n.what))
		}
	}
	if len(out) == 0 {
		return "empty"
	}
	s := strings.Join(out, ", ")
	if !newest.IsZero() {
		s += ", newest of " + newest.Format(time.DateOnly)
	}
	if len(subjects) > 0 {
		s += ": " + strings.Join(subjects, "; ")
	}
	return printable(s)
}

func subject(cert *x509.Certificate) string {
	if cert.Subject.CommonName != "" {
		return cert.Subject.CommonName
	}
	return cert.Subject.String()
}

// efiTime reads the first fields of an EFI_TIME, or nothing where it is zero.
func efiTime(b []byte) time.Time {
	if len(b) < 7 || len(bytes.Trim(b[:7], "\x00")) == 0 {
		return time.Time{}
	}
	return time.Date(int(binary.LittleEndian.Uint16(b)), time.Month(b[2]), int(b[3]), int(b[4]), int(b[5]), int(b[6]), 0, time.UTC)
}
