// Command localkms serves the AWS KMS of github.com/nsmithuk/local-kms for
// tests. That project's own server listens on all addresses, this one on a
// loopback address only.
//
//	localkms ADDRESS FOLDER
package main

import (
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"reflect"
	"strings"

	"github.com/nsmithuk/local-kms/src/config"
	"github.com/nsmithuk/local-kms/src/data"
	"github.com/nsmithuk/local-kms/src/handler"
	"github.com/sirupsen/logrus"
)

func main() {
	if len(os.Args) != 3 {
		log.Fatal("usage: localkms ADDRESS FOLDER")
	}
	address, err := net.ResolveTCPAddr("tcp", os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	if !address.IP.IsLoopback() {
		log.Fatalf("%s is not a loopback address", os.Args[1])
	}
	config.AWSRegion, config.AWSAccountId = "eu-west-2", "111122223333"
	config.DatabasePath = os.Args[2]
	database := data.NewDatabase(config.DatabasePath)
	logger := logrus.New()
	log.Fatal(http.ListenAndServe(address.String(), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		serve(w, r, handler.NewRequestHandler(r, logger, database))
	})))
}

// serve calls the method that X-Amz-Target names: "TrentService.Encrypt".
func serve(w http.ResponseWriter, r *http.Request, h *handler.RequestHandler) {
	service, operation, _ := strings.Cut(r.Header.Get("X-Amz-Target"), ".")
	method := reflect.ValueOf(h).MethodByName(operation)
	if r.Method != http.MethodPost || service != "TrentService" || !method.IsValid() || method.Type().NumIn() != 0 || method.Type().NumOut() != 1 {
		http.Error(w, fmt.Sprintf("no operation %q", operation), http.StatusNotImplemented)
		return
	}
	response, ok := method.Call(nil)[0].Interface().(handler.Response)
	if !ok {
		http.Error(w, fmt.Sprintf("%q is not an operation", operation), http.StatusNotImplemented)
		return
	}
	w.Header().Set("Content-Type", "application/x-amz-json-1.1")
	w.WriteHeader(response.Code)
	_, _ = io.WriteString(w, response.Body)
}
