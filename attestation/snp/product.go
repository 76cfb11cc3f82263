package snp

import (
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
)

// The product lines, as AMD's key distribution service names them.
const (
	milan = "Milan"
	genoa = "Genoa"
	turin = "Turin"
)

var products = []string{milan, genoa, turin}

// productOf names the product line of a family and model. Siena and Bergamo
// (models A0h and up) are certified as Genoa, Turin Dense (11h) as Turin.
func productOf(family, model byte) (string, error) {
	switch {
	case family == 0x19 && model <= 0x0F:
		return milan, nil
	case family == 0x19 && (model >= 0x10 && model <= 0x1F || model >= 0xA0 && model <= 0xAF):
		return genoa, nil
	case family == 0x1A && model <= 0x11:
		return turin, nil
	}
	return "", fmt.Errorf("%w: family %#x, model %#x", ErrProduct, family, model)
}

// productNamed is the product line of a certificate's product name. Some have a
// stepping ("Milan-B0"), others have none.
func productNamed(name string) (string, error) {
	line, _, _ := strings.Cut(name, "-")
	if !slices.Contains(products, line) {
		return "", fmt.Errorf("%w: %q", ErrProduct, name)
	}
	return line, nil
}

// tcb is a TCB version by parts. rest holds the reserved ones in their order.
type tcb struct {
	fmc, bootloader, tee, snp, microcode byte
	rest                                 [4]byte
}

// splitTCB takes a TCB version apart: publication 56860, table 3, where Turin
// has a layout of its own.
func splitTCB(product string, v uint64) tcb {
	b := binary.LittleEndian.AppendUint64(nil, v)
	if product == turin {
		return tcb{fmc: b[0], bootloader: b[1], tee: b[2], snp: b[3], rest: [4]byte{0, b[4], b[5], b[6]}, microcode: b[7]}
	}
	return tcb{bootloader: b[0], tee: b[1], rest: [4]byte(b[2:6]), snp: b[6], microcode: b[7]}
}

func (t tcb) String() string {
	return fmt.Sprintf("fmc %d bootloader %d tee %d snp %d microcode %d", t.fmc, t.bootloader, t.tee, t.snp, t.microcode)
}
