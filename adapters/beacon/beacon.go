// Package beacon tells whether a program that listens on a port of this machine runs under `kvshield run`.
//
// The run's supervisor answers on a socket in its runtime directory ([Light]). [Find] goes the other way: from the port to the
// process that listens on it, to the session socket in that process's environment, to the socket beside it, whose peer must be an ancestor
// of the process. A program that has its supervisor inside, as kvshield-ollama does, listens on that socket itself. What the supervisor vouches for is that nothing below it computes with a model that came past the hook: its watch
// ends whatever does. It cannot vouch for a program that only passes requests on to somewhere else.
//
// It keeps mistakes out, not a hostile process of the same user, who could imitate all of this.
package beacon

import (
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

// Program is a program under a run.
type Program struct {
	Listener
	socket string
}

// Find finds who listens on a port, and asks its supervisor.
func Find(port int) (*Program, Answer, error) {
	l, err := Listening(port)
	if err != nil {
		return nil, Answer{}, err
	}
	p := &Program{Listener: l, socket: ownSocket(l.PID)} // a program that has the supervisor inside, as kvshield-ollama does
	if session := variable(l.PID, "KVSHIELD_SOCKET"); p.socket == "" && session != "" {
		p.socket = filepath.Join(filepath.Dir(session), socketName)
	}
	if p.socket == "" {
		return nil, Answer{}, fmt.Errorf("the process %d that listens on port %d was not started under kvshield run", l.PID, port)
	}
	a, err := p.ask()
	return p, a, err
}

// Check says whether the program is still the one that listens, and asks its supervisor again.
func (p *Program) Check() (Answer, error) {
	if err := p.Listener.Check(); err != nil {
		return Answer{}, err
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
