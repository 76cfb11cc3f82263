package nodev1

import (
	"slices"

	"google.golang.org/grpc/metadata"
)

// FeaturesHeader is in the header of each answer of the agent. Its values name what the
// agent does with fields that an older one passes over in silence: a caller that depends
// on one looks first, since what an agent has created it does not take back.
const FeaturesHeader = "keyagent-features"

// FeatureIntegrity is OpenRequest.integrity, and FeatureSource OpenRequest.source.
const (
	FeatureIntegrity = "integrity"
	FeatureSource    = "source"
)

// Has reports whether the agent that answered with this header has a feature.
func Has(header metadata.MD, feature string) bool {
	return slices.Contains(header.Get(FeaturesHeader), feature)
}
