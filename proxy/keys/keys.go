// Package keys lets in who has an API key, and says whose it is.
//
// A file has one key a line, `name:key` or just the key; empty lines and lines that begin with # are skipped. Keys that share a name are
// one tenant's. A key without a name is a tenant of its own. Keys are kept as hashes under a random salt, and compared in constant time.
package keys

import (
	"bufio"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
)

const (
	minKey  = 8
	maxFile = 1 << 20
)

type key struct {
	sum    [sha256.Size]byte
	tenant string
}

// Ring is the keys of a file.
type Ring struct {
	// Check may refuse a file that is read again, by the number of tenants in it. It is set before that, and may be nil.
	Check func(tenants int) error

	path string
	salt []byte
	keys atomic.Pointer[[]key]
}

// Load reads the file. Warning, when not empty, is what is wrong with the file's mode.
func Load(path string) (r *Ring, warning string, err error) {
	r = &Ring{path: path, salt: make([]byte, sha256.Size)}
	if _, err := rand.Read(r.salt); err != nil {
		return nil, "", err
	}
	warning, err = r.Reload()
	return r, warning, err
}

// Reload reads the file again. When it cannot be used, the keys stay what they were.
func (r *Ring) Reload() (warning string, err error) {
	f, err := os.Open(r.path)
	if err != nil {
		return "", fmt.Errorf("cannot read the API keys: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return "", fmt.Errorf("cannot read the API keys: %w", err)
	}
	if info.Mode().Perm()&0o077 != 0 {
		warning = fmt.Sprintf("%s can be read by others (mode %04o); use chmod 600", r.path, info.Mode().Perm())
	}
	list, err := r.parse(io.LimitReader(f, maxFile))
	if err != nil {
		return warning, fmt.Errorf("%s: %w", r.path, err)
	}
	if r.Check != nil {
		if err := r.Check(tenants(list)); err != nil {
			return warning, err
		}
	}
	r.keys.Store(&list)
	return warning, nil
}

// parse never repeats a line in its errors.
func (r *Ring) parse(in io.Reader) ([]key, error) {
	var list []key
	owner := map[[sha256.Size]byte]string{}
	lines := bufio.NewScanner(in)
	for n := 1; lines.Scan(); n++ {
		line := strings.TrimSpace(strings.TrimPrefix(lines.Text(), "\ufeff"))
		if line == "" || line[0] == '#' {
			continue
		}
		name, secret, named := strings.Cut(line, ":")
		if !named {
			name, secret = "", line
		}
		name, secret = strings.TrimSpace(name), strings.TrimSpace(secret)
		if len(secret) < minKey || strings.ContainsAny(secret, " \t") {
			return nil, fmt.Errorf("line %d: a key has at least %d characters and no blanks", n, minKey)
		}
		k := key{sum: r.sum(secret), tenant: "name:" + name}
		if name == "" {
			k.tenant = "key:" + hex.EncodeToString(k.sum[:8])
		}
		if other, ok := owner[k.sum]; ok && other != k.tenant {
			return nil, fmt.Errorf("line %d: this key is there already, under another name", n)
		}
		owner[k.sum] = k.tenant
		list = append(list, k)
	}
	if err := lines.Err(); err != nil {
		return nil, err
	}
	if len(list) == 0 {
		return nil, errors.New("there is no key in it; write one on a line, as name:key")
	}
	return list, nil
}

func (r *Ring) sum(secret string) (sum [sha256.Size]byte) {
	h := hmac.New(sha256.New, r.salt)
	io.WriteString(h, secret)
	h.Sum(sum[:0])
	return sum
}

// Tenants counts who has keys.
func (r *Ring) Tenants() int { return tenants(*r.keys.Load()) }

func tenants(list []key) int {
	names := map[string]bool{}
	for _, k := range list {
		names[k.tenant] = true
	}
	return len(names)
}

// Tenant of a request, from Authorization: Bearer, else from X-Api-Key.
func (r *Ring) Tenant(req *http.Request) (string, bool) {
	secret := presented(req.Header)
	if secret == "" {
		return "", false
	}
	sum := r.sum(secret)
	tenant, found := "", false
	for _, k := range *r.keys.Load() { // all of them, whichever fits
		if hmac.Equal(k.sum[:], sum[:]) {
			tenant, found = k.tenant, true
		}
	}
	return tenant, found
}

func presented(h http.Header) string {
	scheme, secret, _ := strings.Cut(h.Get("Authorization"), " ")
	if strings.EqualFold(scheme, "Bearer") {
		return strings.TrimSpace(secret)
	}
	return h.Get("X-Api-Key")
}

// Strip takes the key out: the engine is not told it.
func Strip(h http.Header) {
	h.Del("Authorization")
	h.Del("X-Api-Key")
}
