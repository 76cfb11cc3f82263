package policy

import (
	"fmt"
	"sync"

	"github.com/google/cel-go/cel"
)

// Expressions see the request and the claims, and nothing of the outside:
//
//	volume, operation, profile   string
//	identity, trust              string, of the TPM
//	tpm                          map of the claims' facts
//	now                          timestamp of the server's clock
var environment = sync.OnceValues(func() (*cel.Env, error) {
	return cel.NewEnv(
		cel.Variable("volume", cel.StringType),
		cel.Variable("operation", cel.StringType),
		cel.Variable("profile", cel.StringType),
		cel.Variable("identity", cel.StringType),
		cel.Variable("trust", cel.StringType),
		cel.Variable("tpm", cel.MapType(cel.StringType, cel.DynType)),
		cel.Variable("now", cel.TimestampType),
	)
})

// maxCost bounds the work of one evaluation, in CEL's own units.
const maxCost = 100_000

func compile(source string) (cel.Program, error) {
	env, err := environment()
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
	return env.Program(ast, cel.CostLimit(maxCost))
}

func evaluate(program cel.Program, a *Appraisal, r Request) (bool, error) {
	c, _ := a.verified.Claims("tpm")
	out, _, err := program.Eval(map[string]any{
		"volume": r.Volume, "operation": string(r.Operation), "profile": a.Profile,
		"identity": c.Identity, "trust": c.Trust, "tpm": c.Facts, "now": r.Now,
	})
	if err != nil {
		return false, fmt.Errorf("expression: %w", err)
	}
	ok, isBool := out.Value().(bool)
	return isBool && ok, nil
}
