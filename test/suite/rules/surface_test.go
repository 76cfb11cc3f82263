package rules

import (
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/doc"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// roots are the folders of public packages: all but the commands, the tests and what
// is internal.
var roots = []string{"./api/...", "./attestation/...", "./csi/...", "./kms/...", "./luks/...", "./storage/...", "./systemd/..."}

// public loads the public packages as their importers see them.
func public(t *testing.T) (packages []*types.Package) {
	t.Helper()
	cmd := exec.Command("go", append([]string{"list", "-export", "-deps", "-json=ImportPath,Export"}, roots...)...)
	cmd.Dir = "../../.."
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	exports := map[string]string{}
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p struct{ ImportPath, Export string }
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		exports[p.ImportPath] = p.Export
	}
	imports := importer.ForCompiler(token.NewFileSet(), "gc", func(path string) (io.ReadCloser, error) { return os.Open(exports[path]) })
	for path := range exports {
		if own, ok := strings.CutPrefix(path, module); ok && !below(own, "internal") {
			p, err := imports.Import(path)
			if err != nil {
				t.Fatal(err)
			}
			packages = append(packages, p)
		}
	}
	return packages
}

// surface is what a caller of one declaration has to name.
type surface struct {
	seen  map[types.Type]bool
	found []string // types of internal packages
}

// declaration looks at an exported declaration. An alias is a name that callers have,
// whatever it stands for.
func (s *surface) declaration(o types.Object) {
	name, ok := o.(*types.TypeName)
	if !ok {
		s.visit(o.Type())
		return
	}
	if named, ok := name.Type().(*types.Named); ok {
		s.members(named)
	}
}

// members looks at what a value of a type shows.
func (s *surface) members(named *types.Named) {
	if s.seen[named] {
		return
	}
	s.seen[named] = true
	s.visit(named.Underlying())
	for m := range named.Methods() {
		if m.Exported() {
			s.visit(m.Type())
		}
	}
}

func (s *surface) visit(t types.Type) {
	switch t := t.(type) {
	case *types.Alias:
		if !s.internal(t.Obj()) && !t.Obj().Exported() {
			s.visit(t.Rhs())
		}
	case *types.Named:
		for a := range t.TypeArgs().Types() {
			s.visit(a)
		}
		if !s.internal(t.Obj()) && !t.Obj().Exported() {
			s.members(t)
		}
	case *types.Signature:
		s.visit(t.Params())
		s.visit(t.Results())
	case *types.Tuple:
		for v := range t.Variables() {
			s.visit(v.Type())
		}
	case *types.Struct:
		for f := range t.Fields() {
			if f.Exported() || f.Embedded() {
				s.visit(f.Type())
			}
		}
	case *types.Interface:
		for m := range t.Methods() {
			if m.Exported() {
				s.visit(m.Type())
			}
		}
	case *types.Map:
		s.visit(t.Key())
		s.visit(t.Elem())
	case interface{ Elem() types.Type }: // pointers, slices, arrays, channels
		s.visit(t.Elem())
	}
}

func (s *surface) internal(o *types.TypeName) bool {
	if o.Pkg() == nil || !strings.HasPrefix(o.Pkg().Path(), module+"internal/") {
		return false
	}
	s.found = append(s.found, fmt.Sprintf("%s.%s", o.Pkg().Path(), o.Name()))
	return true
}

// TestPublicPackagesShowNoTypeOfAnInternalOne: a caller could not name it. An exported
// alias, such as kms.Secret, gives it a name.
func TestPublicPackagesShowNoTypeOfAnInternalOne(t *testing.T) {
	packages := public(t)
	if len(packages) < 35 {
		t.Fatalf("only %d packages were found", len(packages))
	}
	for _, p := range packages {
		for _, name := range p.Scope().Names() {
			o := p.Scope().Lookup(name)
			if !o.Exported() {
				continue
			}
			s := surface{seen: map[types.Type]bool{}}
			s.declaration(o)
			for _, what := range s.found {
				t.Errorf("%s.%s shows %s (hint: an exported alias)", strings.TrimPrefix(p.Path(), module), name, strings.TrimPrefix(what, module))
			}
		}
	}
}

// isPublic says whether a package is for other modules. The suites that backends pass
// are, too, and need a *testing.T of their caller.
func isPublic(dir string) bool {
	return slices.ContainsFunc(roots, func(root string) bool {
		top := strings.TrimSuffix(strings.TrimPrefix(root, "./"), "/...")
		return dir == top || below(dir, top)
	}) && !below(dir, "api")
}

// TestEveryPublicPackageHasAnExampleThatRuns: go test compares what it prints.
func TestEveryPublicPackageHasAnExampleThatRuns(t *testing.T) {
	runs := map[string]bool{}
	files(t, func(path string, _ *ast.File) {
		if dir := filepath.Dir(path); isPublic(dir) && !strings.HasSuffix(dir, "test") {
			runs[dir] = false
		}
	})
	for dir := range runs {
		tests, err := filepath.Glob(filepath.Join("../../..", dir, "*_test.go"))
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range tests {
			f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ParseComments|parser.SkipObjectResolution)
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range doc.Examples(f) {
				runs[dir] = runs[dir] || e.Output != ""
			}
		}
		if !runs[dir] {
			t.Errorf("%s has no example with an output", dir)
		}
	}
}

// TestErrorsOfPublicPackagesSayWhatTheyMean: in one shape, so that a reader finds what
// sets two of them apart. Those that stand in a list without comments say it by their
// own text.
func TestErrorsOfPublicPackagesSayWhatTheyMean(t *testing.T) {
	files(t, func(path string, f *ast.File) {
		if !isPublic(filepath.Dir(path)) {
			return
		}
		for _, d := range f.Decls {
			g, ok := d.(*ast.GenDecl)
			if !ok || g.Tok != token.VAR {
				continue
			}
			for _, spec := range g.Specs {
				v := spec.(*ast.ValueSpec)
				text := v.Doc.Text()
				if !g.Lparen.IsValid() {
					text = g.Doc.Text()
				}
				name := v.Names[0].Name
				listed := g.Lparen.IsValid() && text == ""
				if strings.HasPrefix(name, "Err") && !listed && !strings.HasPrefix(text, name+" means that ") {
					t.Errorf("%s: the comment of %s is %q", path, name, text)
				}
			}
		}
	})
}
