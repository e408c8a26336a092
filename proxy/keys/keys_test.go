package keys

import (
	"errors"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func load(t *testing.T, content string) (*Ring, string, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "keys")
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return Load(path)
}

func TestWhoIsLetIn(t *testing.T) {
	ring, warning, err := load(t, "# comment\n\nalice:sk-alice-1\nalice:sk-alice-2\n  bob : sk-bob-123 \nsk-nobody\n")
	if err != nil || warning != "" {
		t.Fatal(err, warning)
	}
	for _, tc := range []struct{ header, value, tenant string }{
		{"Authorization", "Bearer sk-alice-1", "name:alice"},
		{"Authorization", "bearer sk-alice-2", "name:alice"},
		{"X-Api-Key", "sk-bob-123", "name:bob"},
		{"Authorization", "Bearer sk-alice-", ""},
		{"Authorization", "Bearer alice:sk-alice-1", ""},
		{"Authorization", "Bearer ", ""},
		{"Authorization", "sk-alice-1", ""},
		{"Authorization", "Basic sk-alice-1", ""},
		{"X-Api-Key", "", ""},
	} {
		r := httptest.NewRequest("GET", "/", nil)
		r.Header.Set(tc.header, tc.value)
		tenant, ok := ring.Tenant(r)
		if tenant != tc.tenant || ok != (tc.tenant != "") {
			t.Errorf("%s: %s: %q, %t", tc.header, tc.value, tenant, ok)
		}
	}
	r := httptest.NewRequest("GET", "/", nil)
	r.Header.Set("X-Api-Key", "sk-nobody")
	if tenant, ok := ring.Tenant(r); !ok || !strings.HasPrefix(tenant, "key:") || strings.Contains(tenant, "nobody") {
		t.Errorf("%q, %t", tenant, ok)
	}
	if ring.Tenants() != 3 {
		t.Errorf("%d tenants", ring.Tenants())
	}
}

func TestBadFilesAreRefusedAndNotQuoted(t *testing.T) {
	for content, says := range map[string]string{
		"":                                   "no key",
		"# only\n":                           "no key",
		"a:short":                            "line 1",
		"secret with blanks":                 "line 1",
		"a:sk-secret-same\nb:sk-secret-same": "line 2",
	} {
		_, _, err := load(t, content)
		if err == nil || !strings.Contains(err.Error(), says) || strings.Contains(err.Error(), "secret") {
			t.Errorf("%q: %v", content, err)
		}
	}
}

func TestReloadKeepsTheKeysWhenTheFileIsBad(t *testing.T) {
	ring, _, err := load(t, "sk-first-key")
	if err != nil {
		t.Fatal(err)
	}
	r := httptest.NewRequest("GET", "/", nil)
	r.Header.Set("X-Api-Key", "sk-first-key")
	os.WriteFile(ring.path, nil, 0o600)
	if _, err := ring.Reload(); err == nil {
		t.Error("an empty file was taken")
	}
	if _, ok := ring.Tenant(r); !ok {
		t.Error("the keys are gone")
	}
	os.WriteFile(ring.path, []byte("sk-second-key"), 0o600)
	if _, err := ring.Reload(); err != nil {
		t.Fatal(err)
	}
	if _, ok := ring.Tenant(r); ok {
		t.Error("a key that was taken out still works")
	}
}

func TestReloadMayBeRefused(t *testing.T) {
	ring, _, err := load(t, "a:sk-first-key")
	if err != nil {
		t.Fatal(err)
	}
	ring.Check = func(tenants int) error {
		if tenants > 1 {
			return errors.New("too many")
		}
		return nil
	}
	r := httptest.NewRequest("GET", "/", nil)
	r.Header.Set("X-Api-Key", "sk-second-key")
	os.WriteFile(ring.path, []byte("a:sk-first-key\nb:sk-second-key"), 0o600)
	if _, err := ring.Reload(); err == nil || ring.Tenants() != 1 {
		t.Errorf("%v, %d tenants", err, ring.Tenants())
	}
	if _, ok := ring.Tenant(r); ok {
		t.Error("a key that was refused counts")
	}
	os.WriteFile(ring.path, []byte("a:sk-first-key\na:sk-second-key"), 0o600)
	if _, err := ring.Reload(); err != nil {
		t.Error(err)
	}
	if _, ok := ring.Tenant(r); !ok {
		t.Error("another key of the same tenant does not count")
	}
}

func TestOpenModeIsWarnedAbout(t *testing.T) {
	path := filepath.Join(t.TempDir(), "keys")
	os.WriteFile(path, []byte("sk-first-key"), 0o644)
	if _, warning, err := Load(path); err != nil || !strings.Contains(warning, "chmod 600") {
		t.Errorf("%q, %v", warning, err)
	}
}
