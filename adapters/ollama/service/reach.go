package service

import (
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
)

// Reachable says whether the service's user can run the programs and read the libraries that kvshield consists of. It looks at
// owners and at the rights of everybody; a user who has them by a group is told to give them to everybody.
func (s *Service) Reachable(paths ...string) error {
	uid := s.uid()
	if uid == 0 {
		return nil
	}
	for _, path := range paths {
		for at := path; at != "/" && at != "."; at = filepath.Dir(at) {
			if !mayUse(at, uid) {
				return fmt.Errorf("the service's user %s cannot reach %s (rights of %s); put kvshield, kvshield-enclave and libkvshield.so where everybody may run them, such as /usr/local/lib/kvshield", s.User, path, at)
			}
		}
	}
	return nil
}

// uid of the service's user; one of no account where it is not known here.
func (s *Service) uid() uint32 {
	if s.User == "" || s.User == "root" {
		return 0
	}
	name := s.User
	if u, err := user.Lookup(name); err == nil {
		name = u.Uid
	}
	n, err := strconv.ParseUint(name, 10, 32)
	if err != nil {
		return ^uint32(0)
	}
	return uint32(n)
}

func mayUse(path string, uid uint32) bool {
	info, err := os.Stat(path)
	if err != nil {
		return false
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	need := os.FileMode(0o001)
	if info.Mode().IsRegular() {
		need = 0o004
	}
	return ok && (info.Mode()&need == need || st.Uid == uid && info.Mode()&(need<<6) == need<<6)
}
