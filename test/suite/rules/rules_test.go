// Package rules holds the tests of the house plan: who may import whom, and who
// may call what. A new package that breaks a rule breaks a test.
package rules

import (
	"encoding/json"
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/keyagent/keyagent/"

// graph is the imports of each package of this module, without its tests.
func graph(t *testing.T) map[string][]string {
	t.Helper()
	cmd := exec.Command("go", "list", "-json=ImportPath,Imports", "./...")
	cmd.Dir = "../../.."
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	imports := map[string][]string{}
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p struct {
			ImportPath string
			Imports    []string
		}
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		name := strings.TrimPrefix(p.ImportPath, module)
		for _, i := range p.Imports {
			if own, ok := strings.CutPrefix(i, module); ok {
				imports[name] = append(imports[name], own)
			}
		}
	}
	if len(imports) < 15 {
		t.Fatalf("only %d packages were found", len(imports))
	}
	return imports
}

func below(pkg, dir string) bool { return strings.HasPrefix(pkg, dir+"/") }

func TestABackendNeverImportsASibling(t *testing.T) {
	kinds := []string{"attestation/tpm", "attestation/snp", "attestation/tdx", "attestation/azure", "attestation/svsm", "attestation/nitro"}
	kindOf := func(pkg string) string {
		for _, k := range kinds {
			if pkg == k || below(pkg, k) {
				return k
			}
		}
		return ""
	}
	for pkg, imports := range graph(t) {
		for _, i := range imports {
			for _, dir := range []string{"kms", "storage"} {
				suite := strings.HasSuffix(pkg, "test") || pkg == "kms/setup" || i == "kms/dek" || i == "kms/backend" || i == "storage/framed"
				if below(pkg, dir) && below(i, dir) && !suite {
					t.Errorf("%s imports its sibling %s", pkg, i)
				}
			}
			// Evidence in which one piece of hardware vouches for another is made
			// of the other kinds.
			if a, b := kindOf(pkg), kindOf(i); a != "" && b != "" && a != b && a != "attestation/azure" && a != "attestation/svsm" {
				t.Errorf("%s imports its sibling %s", pkg, i)
			}
		}
	}
}

func TestTheVocabulariesKnowNothingBelowThem(t *testing.T) {
	g := graph(t)
	for _, root := range []string{"attestation", "kms", "storage"} {
		for _, i := range g[root] {
			if below(i, root) {
				t.Errorf("%s imports %s", root, i)
			}
		}
	}
}

func TestLibrariesNeverImportTheRoles(t *testing.T) {
	for pkg, imports := range graph(t) {
		library := slices.ContainsFunc([]string{"attestation", "csi", "kms", "storage", "luks"}, func(dir string) bool {
			return pkg == dir || below(pkg, dir)
		})
		for _, i := range imports {
			if library && (i == "internal/keyservice" || i == "internal/agent" || below(i, "cmd")) {
				t.Errorf("%s imports %s", pkg, i)
			}
		}
	}
}

// TestSimulatorsAreOutOfProduction: only tests may import what lives under test/, and
// only the demo, which no configuration selects, what lives in the lab.
func TestSimulatorsAreOutOfProduction(t *testing.T) {
	for pkg, imports := range graph(t) {
		for _, i := range imports {
			if below(i, "test") && !below(pkg, "test") {
				t.Errorf("%s imports %s", pkg, i)
			}
			lab := i == "internal/lab" || below(i, "internal/lab")
			if lab && pkg != "internal/demo" && !below(pkg, "internal/lab") && !below(pkg, "test") {
				t.Errorf("%s imports %s", pkg, i)
			}
			if i == "storage/memfs" && !below(pkg, "test") && pkg != "kms/setup/setuptest" {
				t.Errorf("%s imports %s, which forgets everything", pkg, i)
			}
		}
	}
}

func TestOnlySetupKnowsAllBackends(t *testing.T) {
	// What lies beside the backends and is none.
	others := []string{"kms/setup", "kms/dek", "kms/setup/setuptest", "kms/backend", "storage/framed"}
	for pkg, imports := range graph(t) {
		for _, i := range imports {
			backend := (below(i, "kms") || below(i, "storage")) && !slices.Contains(others, i)
			// serve makes a master secret on request, and the agent of a test
			// derives what it expects.
			if backend && !slices.Contains(others, pkg) && pkg != "cmd/keyagent" && !below(pkg, "test") {
				t.Errorf("%s imports the backend %s", pkg, i)
			}
		}
	}
}

// files parses each Go file of the module that is neither a test nor generated.
func files(t *testing.T, visit func(path string, f *ast.File)) {
	t.Helper()
	root := "../../.."
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (d.Name() == "testdata" || strings.HasPrefix(d.Name(), ".") && path != root) {
			return fs.SkipDir
		}
		if !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") || strings.HasSuffix(path, ".pb.go") {
			return nil
		}
		f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, path)
		visit(rel, f)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestOnlyVerifiersMakeVerifiedClaims holds the list of files that may call
// attestation.NewVerified.
func TestOnlyVerifiersMakeVerifiedClaims(t *testing.T) {
	allowed := []string{"attestation/atls/channel.go", "internal/evidence/appraise.go"}
	var found []string
	files(t, func(path string, f *ast.File) {
		ast.Inspect(f, func(n ast.Node) bool {
			if s, ok := n.(*ast.SelectorExpr); ok && s.Sel.Name == "NewVerified" {
				found = append(found, path)
			}
			return true
		})
	})
	slices.Sort(found)
	if !slices.Equal(slices.Compact(found), allowed) {
		t.Errorf("NewVerified is called in %v, allowed are %v", found, allowed)
	}
}

func TestNothingIsWiredByInit(t *testing.T) {
	files(t, func(path string, f *ast.File) {
		for _, d := range f.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok && fn.Recv == nil && fn.Name.Name == "init" {
				t.Errorf("%s has an init function", path)
			}
		}
	})
}

func TestEveryPackageSaysWhatItIsFor(t *testing.T) {
	documented := map[string]bool{}
	files(t, func(path string, f *ast.File) {
		dir := filepath.Dir(path)
		documented[dir] = documented[dir] || f.Doc != nil
	})
	for dir, ok := range documented {
		if !ok {
			t.Errorf("%s has no package documentation", dir)
		}
	}
}

// TestNoExpressionIsCompiledAtStart: each costs every command some of its time, and
// most commands use none. Package pattern compiles them when they are used.
func TestNoExpressionIsCompiledAtStart(t *testing.T) {
	files(t, func(name string, file *ast.File) {
		if strings.HasPrefix(name, "test/") {
			return
		}
		for _, d := range file.Decls {
			g, ok := d.(*ast.GenDecl) // of the package: what functions declare is in them
			if !ok || g.Tok != token.VAR {
				continue
			}
			ast.Inspect(g, func(n ast.Node) bool {
				if s, ok := n.(*ast.SelectorExpr); ok && s.Sel.Name == "MustCompile" {
					t.Errorf("%s compiles a regular expression at start", name)
				}
				return true
			})
		}
	})
}

// linked are the packages that packages of this module link.
func linked(t *testing.T, args ...string) []string {
	t.Helper()
	cmd := exec.Command("go", append([]string{"list", "-deps"}, args...)...)
	cmd.Dir = "../../.."
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	return strings.Fields(string(out))
}

// TestTheProgramLinksNoTests: neither package testing, which brings flags and a
// runner, nor anything below test/, with whatever tags the Makefile builds it.
func TestTheProgramLinksNoTests(t *testing.T) {
	makefile := read(t, "Makefile")
	builds := regexp.MustCompile(`(?m)^(?:export GOFLAGS := -tags=|NODE_TAGS := )(\S+)$`).FindAllStringSubmatch(makefile, -1)
	if n := strings.Count(makefile, "-trimpath"); n != 2 || len(builds) != 2 {
		t.Fatalf("the Makefile builds the program %d times, with tags %q", n, builds)
	}
	for _, b := range builds {
		all := linked(t, "-tags", b[1], "./cmd/keyagent")
		if !slices.Contains(all, module+"cmd/keyagent") {
			t.Fatalf("with %s the program is not in its own list", b[1])
		}
		for _, pkg := range all {
			if pkg == "testing" || below(pkg, "testing") || below(pkg, module+"test") {
				t.Errorf("with %s the program links %s", b[1], pkg)
			}
		}
	}
}

// TestTheProgramForNodesIsSmall: it has no key service, and nothing that is large for the
// sake of one. An initrd is larger by it, which firmware hashes.
func TestTheProgramForNodesIsSmall(t *testing.T) {
	for _, pkg := range linked(t, "-tags", "grpcnotrace,keyagent_node", "./cmd/keyagent") {
		own := strings.TrimPrefix(pkg, module)
		if own == "internal/keyservice" || below(own, "kms") || below(own, "storage") || own == "internal/kubekms" || own == "internal/measure" ||
			below(pkg, "github.com/google/cel-go") || below(pkg, "github.com/prometheus") {
			t.Errorf("the program for nodes links %s", pkg)
		}
	}
}

// TestTheKubernetesPluginNeedsNoDisk: it gets keys by the same client as the node
// does, and links neither libcryptsetup nor what speaks to systemd of disks.
func TestTheKubernetesPluginNeedsNoDisk(t *testing.T) {
	for _, pkg := range linked(t, "./internal/kubekms", "./internal/keyclient", "./internal/node") {
		pkg = strings.TrimPrefix(pkg, module)
		if pkg == "luks" || below(pkg, "luks") || pkg == "internal/agent" || pkg == "systemd" {
			t.Errorf("the plugin's packages link %s", pkg)
		}
	}
}
