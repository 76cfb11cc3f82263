//go:build !keyagent_node

package policy

import (
	"fmt"
	"maps"
	"slices"

	"github.com/google/cel-go/cel"

	"github.com/keyagent/keyagent/attestation"
)

// Expressions see the request, and of the claims those that the profile demands: a
// machine may bring others, which nothing was compared with.
//
//	volume, operation, profile   string
//	identity, trust              string, of the TPM, or else of the profile's first claims
//	kinds                        list of the profile's kinds, composites included
//	tpm, snp and other kinds     maps of the claims' facts, with their identity and trust;
//	                             empty where the profile demands no such claims
//	now                          timestamp of the server's clock
func environment(kinds []Kind) (*cel.Env, error) {
	variables := []cel.EnvOption{
		cel.Variable("volume", cel.StringType),
		cel.Variable("operation", cel.StringType),
		cel.Variable("profile", cel.StringType),
		cel.Variable("identity", cel.StringType),
		cel.Variable("trust", cel.StringType),
		cel.Variable("kinds", cel.ListType(cel.StringType)),
		cel.Variable("now", cel.TimestampType),
	}
	for _, k := range kinds {
		variables = append(variables, cel.Variable(string(k.Name), cel.MapType(cel.StringType, cel.DynType)))
	}
	return cel.NewEnv(variables...)
}

// maxCost bounds the work of one evaluation, in CEL's own units.
const maxCost = 100_000

func compile(kinds []Kind, source string) (condition, error) {
	env, err := environment(kinds)
	if err != nil {
		return nil, err
	}
	ast, issues := env.Compile(source)
	if issues.Err() != nil {
		return nil, fmt.Errorf("expression: %w", issues.Err())
	}
	if ast.OutputType() != cel.BoolType {
		return nil, fmt.Errorf("expression gives %s, it must give bool", ast.OutputType())
	}
	program, err := env.Program(ast, cel.CostLimit(maxCost))
	if err != nil {
		return nil, err
	}
	return expression{program}, nil
}

type expression struct{ cel.Program }

func (e expression) holds(a *Appraisal, r Request) (bool, error) {
	input := map[string]any{"volume": r.Volume, "operation": string(r.Operation), "profile": a.Profile, "now": r.Now}
	var speaker attestation.Claims
	var kinds []string
	for _, k := range a.policy.kinds {
		input[string(k.Name)] = map[string]any{}
	}
	for _, c := range a.verified.All() {
		if !slices.Contains(a.kinds, c.Kind) {
			continue
		}
		if len(kinds) == 0 || c.Kind == attestation.TPM {
			speaker = c
		}
		kinds = append(kinds, string(c.Kind))
		seen := map[string]any{"identity": c.Identity, "trust": c.Trust}
		maps.Copy(seen, c.Facts)
		input[string(c.Kind)] = seen
	}
	input["identity"], input["trust"], input["kinds"] = speaker.Identity, speaker.Trust, kinds
	out, _, err := e.Eval(input)
	if err != nil {
		return false, fmt.Errorf("expression: %w", err)
	}
	ok, isBool := out.Value().(bool)
	return isBool && ok, nil
}
