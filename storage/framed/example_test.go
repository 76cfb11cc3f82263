package framed_test

import (
	"bytes"
	"fmt"

	"github.com/keyagent/keyagent/storage/framed"
)

func Example() {
	body, token := framed.Frame([]byte("a record"))
	data, mine, err := framed.Read(bytes.NewReader(body))
	fmt.Printf("%s, %v, %v\n", data, mine == token, err)
	_, _, err = framed.Unframe(append(body, '!'))
	fmt.Println(err)
	// Output:
	// a record, true, <nil>
	// object is corrupt
}
