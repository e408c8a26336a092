package beacon

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Listener is a socket that listens on a port of this machine.
type Listener struct {
	PID   int // of the process that has it
	port  int
	inode string
}

// ErrNobody is a port on which nobody listens.
var ErrNobody = errors.New("nobody listens there on this machine")

// Listening finds who listens on a port.
func Listening(port int) (Listener, error) {
	inode, err := listening(port)
	if err != nil {
		return Listener{}, err
	}
	pid, err := holder(inode)
	return Listener{pid, port, inode}, err
}

// Below says whether it is a socket of the process or of a descendant of it.
func (l Listener) Below(pid int) bool { return descends(l.PID, pid) }

// Check says whether it is still this socket that listens.
func (l Listener) Check() error {
	inode, err := listening(l.port)
	if err == nil && inode != l.inode {
		err = fmt.Errorf("another program listens on port %d now", l.port)
	}
	return err
}

// listening is the socket that listens on a port. Two of them could be two programs, and are refused.
func listening(port int) (string, error) {
	found := map[string]bool{}
	for _, table := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		eachLine(table, func(field []string) {
			if len(field) > 9 && field[3] == "0A" && strings.HasSuffix(field[1], fmt.Sprintf(":%04X", port)) {
				found[field[9]] = true
			}
		})
	}
	for inode := range found {
		if len(found) == 1 {
			return inode, nil
		}
	}
	if len(found) == 0 {
		return "", ErrNobody
	}
	return "", fmt.Errorf("several sockets listen on port %d; which of them is the engine's cannot be told", port)
}

func eachLine(path string, f func(field []string)) {
	file, err := os.Open(path)
	if err != nil {
		return
	}
	defer file.Close()
	for lines := bufio.NewScanner(file); lines.Scan(); {
		f(strings.Fields(lines.Text()))
	}
}

func holder(inode string) (int, error) {
	links, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	for _, link := range links {
		if to, err := os.Readlink(link); err == nil && to == "socket:["+inode+"]" {
			return strconv.Atoi(strings.Split(link, "/")[2])
		}
	}
	return 0, errors.New("the process that listens there cannot be looked into; run kvshield serve as its user")
}

// ownSocket is the status socket that the process itself listens on, empty when it has none.
func ownSocket(pid int) string {
	links, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	own := map[string]bool{}
	for _, link := range links {
		if to, err := os.Readlink(link); err == nil {
			own[to] = true
		}
	}
	found := ""
	eachLine("/proc/net/unix", func(field []string) {
		if len(field) == 8 && filepath.Base(field[7]) == socketName && own["socket:["+field[6]+"]"] {
			found = field[7]
		}
	})
	return found
}
