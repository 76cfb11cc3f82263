package lab

import (
	"debug/elf"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sort"
)

// libraryDirs is where the loader of amd64 Debian looks.
var libraryDirs = []string{
	"/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib64", "/usr/lib64", "/lib", "/usr/lib",
}

// closure returns the loader and the shared libraries that a program needs to
// start, as paths on this machine, sorted. It reads the ELF headers; the program
// itself is not run. Libraries that it opens later by name are not found.
func closure(program string) ([]string, error) {
	found := map[string]bool{}
	todo := []string{program}
	for len(todo) > 0 {
		path := todo[0]
		todo = todo[1:]
		needed, loader, err := needs(path)
		if err != nil {
			return nil, fmt.Errorf("libraries of %s: %w", path, err)
		}
		if loader != "" {
			found[loader] = true
		}
		for _, name := range needed {
			lib, err := findLibrary(name)
			if err != nil {
				return nil, fmt.Errorf("libraries of %s: %w", path, err)
			}
			if !found[lib] {
				found[lib] = true
				todo = append(todo, lib)
			}
		}
	}
	paths := make([]string, 0, len(found))
	for path := range found {
		paths = append(paths, path)
	}
	sort.Strings(paths)
	return paths, nil
}

// needs reads the names of the libraries and the loader that one file asks for.
// A file that is not ELF (a script) asks for nothing.
func needs(path string) (libraries []string, loader string, err error) {
	file, err := elf.Open(path)
	if err != nil {
		var format *elf.FormatError
		if errors.As(err, &format) {
			return nil, "", nil
		}
		return nil, "", err
	}
	defer file.Close()
	for _, prog := range file.Progs {
		if prog.Type != elf.PT_INTERP {
			continue
		}
		name := make([]byte, prog.Filesz)
		if _, err := prog.ReadAt(name, 0); err != nil {
			return nil, "", err
		}
		loader = string(name[:max(len(name)-1, 0)])
	}
	libraries, err = file.ImportedLibraries()
	if err != nil {
		return nil, "", err
	}
	return libraries, loader, nil
}

func findLibrary(name string) (string, error) {
	for _, dir := range libraryDirs {
		path := filepath.Join(dir, name)
		if _, err := os.Stat(path); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("%s is in none of %v", name, libraryDirs)
}
