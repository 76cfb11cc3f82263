package kms_test

import (
	"fmt"

	"github.com/keyagent/keyagent/kms"
)

// A backend takes the parameters that it knows, and refuses the rest. Errors do not
// repeat values, which may be secret.
func ExampleParseURI() {
	u, err := kms.ParseURI("kms://aws?keyName=alias/disks&secret=xyz")
	if err != nil {
		fmt.Println(err)
		return
	}
	key, err := u.Required("keyName")
	fmt.Println(u.Name, key, err)
	fmt.Println(u.Done())
	// Output:
	// aws alias/disks <nil>
	// invalid URI: kms://aws does not know the parameter "secret"
}
