package enclave_test

import (
	"os/exec"
	"strings"
	"testing"
)

const module = "github.com/kvshield/kvshield/"

// holdsKeys says whether a package can hold a key: the vault, the keeper of caches, and what lies below enclave/internal.
func holdsKeys(pkg string) bool {
	return strings.HasPrefix(pkg, module+"enclave/vault") || strings.HasPrefix(pkg, module+"enclave/resident") || strings.HasPrefix(pkg, module+"enclave/internal/")
}

// The trust boundary is a package boundary: outside enclave/, only the enclave's own program is linked with code that
// can hold a key.
func TestKeysStayBehindThePackageBoundary(t *testing.T) {
	out, err := exec.Command("go", "list", "-f", `{{.ImportPath}}:{{join .Deps " "}}`, module+"...").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	checked := 0
	for line := range strings.Lines(string(out)) {
		pkg, deps, _ := strings.Cut(strings.TrimSpace(line), ":")
		inside := strings.HasPrefix(pkg, module+"enclave/") || pkg == module+"cmd/kvshield-enclave"
		for _, dep := range strings.Fields(deps) {
			if holdsKeys(dep) && !inside {
				t.Errorf("%s depends on %s", pkg, dep)
			}
			if holdsKeys(dep) && pkg == module+"cmd/kvshield-enclave" {
				checked++
			}
		}
	}
	if checked == 0 {
		t.Error("the enclave's own program depends on nothing that holds keys: this test looks for the wrong packages")
	}
}
