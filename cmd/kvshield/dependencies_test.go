package main

import (
	"os/exec"
	"strings"
	"testing"
)

const module = "github.com/kvshield/kvshield/"

// Who imports kvshield's libraries does not pay for OpenTelemetry's SDK, nor for gRPC's and Prometheus' ends of it; the enclave least of all.
func TestOnlyTelemetryLinksItsSDK(t *testing.T) {
	out, err := exec.Command("go", "list", "-f", `{{.ImportPath}}:{{join .Deps " "}}`, module+"...").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	linked := 0
	for line := range strings.Lines(string(out)) {
		pkg, deps, _ := strings.Cut(strings.TrimSpace(line), ":")
		may := pkg == module+"telemetry" || pkg == module+"telemetry/export" || pkg == module+"cmd/kvshield"
		for _, dep := range strings.Fields(deps) {
			sdk := strings.HasPrefix(dep, "go.opentelemetry.io/otel/sdk") || strings.HasPrefix(dep, "go.opentelemetry.io/otel/exporters") || strings.HasPrefix(dep, "github.com/prometheus/")
			if sdk && !may {
				t.Errorf("%s depends on %s", pkg, dep)
			}
			if sdk && pkg == module+"cmd/kvshield" {
				linked++
			}
			if pkg == module+"cmd/kvshield-enclave" && strings.HasPrefix(dep, module+"telemetry") {
				t.Errorf("the enclave's program is linked with %s", dep)
			}
		}
	}
	if linked == 0 {
		t.Error("the command depends on no SDK: this test looks for the wrong packages")
	}
}
