package client

import (
	"errors"
	"net"
	"strconv"
	"strings"
)

const (
	defaultPort = "11434"
	loopback    = "127.0.0.1"
)

// Errors of Address.
var (
	ErrForm   = errors.New("it takes an address as OLLAMA_HOST does, such as 127.0.0.1:11434")
	ErrRemote = errors.New("it takes an Ollama that listens on this machine, by its loopback address")
)

// Address is host:port of an Ollama on this machine, written in any way that OLLAMA_HOST may be: host, host:port, :port, with http://
// before it or not. An address that stands for all of the machine's is the loopback one.
func Address(text string) (string, error) {
	port := defaultPort
	rest := strings.TrimSpace(text)
	if scheme, after, ok := strings.Cut(rest, "://"); ok {
		if scheme != "http" {
			return "", ErrForm
		}
		rest, port = after, "80"
	}
	rest, path, _ := strings.Cut(rest, "/")
	if path != "" {
		return "", ErrForm
	}
	host, given, err := net.SplitHostPort(rest)
	if err != nil {
		host = strings.Trim(rest, "[]")
	} else {
		port = given
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return "", ErrForm
	}
	if host == "" || host == "localhost" {
		host = loopback
	}
	ip := net.ParseIP(host)
	switch {
	case ip == nil:
		return "", ErrRemote
	case ip.IsUnspecified():
		ip = net.ParseIP(loopback)
	case !ip.IsLoopback():
		return "", ErrRemote
	}
	return net.JoinHostPort(ip.String(), port), nil
}
