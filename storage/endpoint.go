package storage

import (
	"errors"
	"net"
	"net/url"
)

// CheckEndpoint returns an error unless endpoint is the URL of a service that
// objects may be sent to: https, or http on a loopback address. loopback says
// that it is the latter. The errors do not repeat the URL, which may hold what it
// must not.
func CheckEndpoint(endpoint string) (loopback bool, err error) {
	u, err := url.Parse(endpoint)
	if err != nil || u.Hostname() == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return false, errors.New("the endpoint must be of the form https://HOST:PORT")
	}
	ip := net.ParseIP(u.Hostname())
	switch {
	case u.Scheme == "https":
		return false, nil
	case u.Scheme == "http" && ip != nil && ip.IsLoopback():
		return true, nil
	}
	return false, errors.New("the endpoint must be https, or http on a loopback address")
}
