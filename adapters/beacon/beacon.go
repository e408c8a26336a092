// Package beacon tells whether a program that listens on a port of this machine runs under `kvshield run`.
//
// The run's supervisor answers on a socket in its runtime directory ([Serve]). [Find] goes the other way: from the port to the
// process that listens on it, to the session socket in that process's environment, to the socket beside it, whose peer must be an ancestor
// of the process. What the supervisor vouches for is that nothing below it computes with a model that came past the hook: its watch
// ends whatever does. It cannot vouch for a program that only passes requests on to somewhere else.
//
// It keeps mistakes out, not a hostile process of the same user, who could imitate all of this.
package beacon

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	socketName = "status.sock"
	within     = 2 * time.Second
	maxAnswer  = 64 << 10
	maxDepth   = 64
)

// Answer is what a supervisor says of its run.
type Answer struct {
	Mode        string `json:"mode"`
	Backend     string `json:"backend"`
	Hardware    bool   `json:"hardware_protection"`
	Statement   string `json:"statement"`
	Enclave     bool   `json:"enclave"` // there is one now
	Transitions uint64 `json:"transitions"`
	Bytes       uint64 `json:"bytes"`
	Shielded    int    `json:"models_shielded"`
	Refused     int    `json:"models_refused"`
	Ended       int    `json:"engines_ended"`
}

// Serve answers on a socket in the runtime directory until ctx ends.
func Serve(ctx context.Context, dir string, answer func() Answer) error {
	l, err := net.Listen("unix", filepath.Join(dir, socketName))
	if err != nil {
		return fmt.Errorf("cannot open the status socket: %w", err)
	}
	context.AfterFunc(ctx, func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				c.SetDeadline(time.Now().Add(within))
				json.NewEncoder(c).Encode(answer())
			}()
		}
	}()
	return nil
}

// Program is a program under a run.
type Program struct {
	PID    int // of the process that listens
	port   int
	inode  string
	socket string
}

// ErrNobody is a port on which nobody listens.
var ErrNobody = errors.New("nobody listens there on this machine")

// Find finds who listens on a port, and asks its supervisor.
func Find(port int) (*Program, Answer, error) {
	inode, err := listening(port)
	if err != nil {
		return nil, Answer{}, err
	}
	pid, err := holder(inode)
	if err != nil {
		return nil, Answer{}, err
	}
	session := variable(pid, "KVSHIELD_SOCKET")
	if session == "" {
		return nil, Answer{}, fmt.Errorf("the process %d that listens on port %d was not started under kvshield run", pid, port)
	}
	p := &Program{pid, port, inode, filepath.Join(filepath.Dir(session), socketName)}
	a, err := p.ask()
	return p, a, err
}

// Check says whether the program is still the one that listens, and asks its supervisor again.
func (p *Program) Check() (Answer, error) {
	inode, err := listening(p.port)
	if err != nil {
		return Answer{}, err
	}
	if inode != p.inode {
		return Answer{}, fmt.Errorf("another program listens on port %d now", p.port)
	}
	return p.ask()
}

func (p *Program) ask() (Answer, error) {
	var a Answer
	c, err := net.DialTimeout("unix", p.socket, within)
	if err != nil {
		return a, fmt.Errorf("the kvshield run of process %d does not answer", p.PID)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(within))
	supervisor, err := peer(c.(*net.UnixConn))
	if err != nil || !descends(p.PID, supervisor) {
		return a, fmt.Errorf("process %d does not belong to the kvshield run that it names", p.PID)
	}
	if err := json.NewDecoder(io.LimitReader(c, maxAnswer)).Decode(&a); err != nil {
		return a, fmt.Errorf("the kvshield run of process %d does not answer", p.PID)
	}
	if !a.Enclave {
		return a, errors.New("the enclave is restarting")
	}
	return a, nil
}

// peer is the process at the other end, which must be this user's or root's.
func peer(c *net.UnixConn) (int, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) { cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return 0, err
	}
	if credErr != nil {
		return 0, credErr
	}
	if int(cred.Uid) != os.Getuid() && cred.Uid != 0 {
		return 0, errors.New("another user's")
	}
	return int(cred.Pid), nil
}

func descends(pid, ancestor int) bool {
	for range maxDepth {
		if pid == ancestor {
			return true
		}
		if pid = parent(pid); pid <= 1 {
			return false
		}
	}
	return false
}

func parent(pid int) int {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	if len(fields) < 2 {
		return 0
	}
	n, _ := strconv.Atoi(fields[1])
	return n
}

func variable(pid int, name string) string {
	env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
	if err != nil {
		return ""
	}
	for _, e := range strings.Split(string(env), "\x00") {
		if v, ok := strings.CutPrefix(e, name+"="); ok {
			return v
		}
	}
	return ""
}

// listening is the socket that listens on a port. Two of them could be two programs, and are refused.
func listening(port int) (string, error) {
	found := map[string]bool{}
	for _, table := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		f, err := os.Open(table)
		if err != nil {
			continue
		}
		for lines := bufio.NewScanner(f); lines.Scan(); {
			field := strings.Fields(lines.Text())
			if len(field) > 9 && field[3] == "0A" && strings.HasSuffix(field[1], fmt.Sprintf(":%04X", port)) {
				found[field[9]] = true
			}
		}
		f.Close()
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

func holder(inode string) (int, error) {
	links, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	for _, link := range links {
		if to, err := os.Readlink(link); err == nil && to == "socket:["+inode+"]" {
			return strconv.Atoi(strings.Split(link, "/")[2])
		}
	}
	return 0, errors.New("the process that listens there cannot be looked into; run kvshield serve as its user")
}
