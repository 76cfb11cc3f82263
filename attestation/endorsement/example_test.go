package endorsement_test

import (
	"context"
	"fmt"

	"github.com/keyagent/keyagent/attestation/endorsement"
)

// vendor stands for what programs make with NewHTTP.
type vendor struct{}

func (vendor) Get(_ context.Context, r endorsement.Request) (endorsement.Document, error) {
	fmt.Println("asked for", r.URL)
	return endorsement.Document{Body: []byte("certificate")}, nil
}

// A vendor is asked once for what its name says it always is.
func ExampleCache() {
	c, err := endorsement.NewCache(endorsement.CacheOptions{Source: vendor{}})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer c.Close()
	for range 2 {
		d, err := c.Get(context.Background(), endorsement.Request{Name: "vcek-7", URL: "https://kds.example/vcek/7"})
		fmt.Println(string(d.Body), err)
	}
	// Output:
	// asked for https://kds.example/vcek/7
	// certificate <nil>
	// certificate <nil>
}
