package lab

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
)

// SearchFile counts how often needle stands in a file of any size, overlapping
// occurrences included.
func SearchFile(path string, needle []byte) (int, error) {
	file, err := os.Open(path)
	if err != nil {
		return 0, fmt.Errorf("search: %w", err)
	}
	defer file.Close()
	count, err := searchReader(file, needle, 1<<20)
	if err != nil {
		return 0, fmt.Errorf("search %s: %w", path, err)
	}
	return count, nil
}

// searchReader reads chunk bytes at a time and keeps the end of what it read,
// one byte short of the needle, so that one across two chunks is found, once.
func searchReader(r io.Reader, needle []byte, chunk int) (int, error) {
	if len(needle) == 0 {
		return 0, errors.New("empty needle")
	}
	count, kept := 0, 0
	buf := make([]byte, len(needle)-1+chunk)
	for {
		n, err := io.ReadFull(r, buf[kept:])
		data := buf[:kept+n]
		for at := 0; ; {
			i := bytes.Index(data[at:], needle)
			if i < 0 {
				break
			}
			count++
			at += i + 1
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return count, nil
		}
		if err != nil {
			return count, err
		}
		kept = copy(buf, data[len(data)-(len(needle)-1):])
	}
}
