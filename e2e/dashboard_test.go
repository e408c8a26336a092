package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"math"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

var exampleTelemetry = filepath.Join(root, "examples", "telemetry")

// panel of the dashboard, with what it asks Prometheus.
type panel struct {
	Title   string
	Type    string
	Targets []struct{ Expr string }
}

func dashboard(t *testing.T) []panel {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(exampleTelemetry, "grafana", "dashboards", "kvshield.json"))
	if err != nil {
		t.Fatal(err)
	}
	var d struct{ Panels []panel }
	if err := json.Unmarshal(text, &d); err != nil {
		t.Fatal(err)
	}
	d.Panels = slices.DeleteFunc(d.Panels, func(p panel) bool { return p.Type == "row" })
	if len(d.Panels) == 0 {
		t.Fatal("the dashboard has no panels")
	}
	return d.Panels
}

// filled puts values in the place of Grafana's variables.
func filled(expr, model, mode string) string {
	return strings.NewReplacer("$__rate_interval", "1m", "$model", model, "$mode", mode).Replace(expr)
}

func tool(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("no %s on this machine (Debian: apt-get install prometheus)", name)
	}
	return path
}

// Prometheus' own checker reads every expression, and both configurations.
func TestPromtoolReadsTheExamples(t *testing.T) {
	promtool := tool(t, "promtool")
	var rules strings.Builder
	rules.WriteString("groups:\n- name: dashboard\n  rules:\n")
	n := 0
	for _, p := range dashboard(t) {
		for _, target := range p.Targets {
			expr, _ := json.Marshal(filled(target.Expr, ".*", ".*")) // JSON is YAML
			fmt.Fprintf(&rules, "  - record: panel_%d\n    expr: %s\n", n, expr)
			n++
		}
	}
	file := filepath.Join(t.TempDir(), "rules.yml")
	if err := os.WriteFile(file, []byte(rules.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"check", "rules", file},
		{"check", "config", "--syntax-only", filepath.Join(exampleTelemetry, "prometheus.yml")},
		{"check", "config", "--syntax-only", filepath.Join(exampleTelemetry, "prometheus-direct.yml")},
	} {
		out, err := exec.Command(promtool, args...).CombinedOutput()
		if err != nil || args[1] == "rules" && !strings.Contains(string(out), fmt.Sprintf("%d rules found", n)) {
			t.Errorf("promtool %v: %v\n%s", args, err, out)
		}
	}
}

var counted = regexp.MustCompile(`(\w+\()?[a-z_]+_(?:total|sum|count|bucket)\b`)

// A sum divided by a count is the mean of a whole life; only their rates say how things stand.
func TestNoPanelShowsTheMeanOfALifetime(t *testing.T) {
	for _, p := range dashboard(t) {
		for _, target := range p.Targets {
			for _, m := range counted.FindAllStringSubmatch(target.Expr, -1) {
				if m[1] != "rate(" && m[1] != "increase(" {
					t.Errorf("%s: %s is no rate in %s", p.Title, m[0], target.Expr)
				}
			}
		}
	}
}

// prometheus is a real one that reads from a run of kvshield.
type prometheus struct {
	url string
	log *buffer
}

func startPrometheus(t *testing.T, program, target string) *prometheus {
	t.Helper()
	config, err := os.ReadFile(filepath.Join(exampleTelemetry, "prometheus-direct.yml"))
	if err != nil {
		t.Fatal(err)
	}
	text := strings.NewReplacer("127.0.0.1:8080", target, "scrape_interval: 5s", "scrape_interval: 1s").Replace(string(config))
	if !strings.Contains(text, target) || !strings.Contains(text, ": 1s") {
		t.Fatal("the example's configuration has other values now")
	}
	dir := t.TempDir()
	file := filepath.Join(dir, "prometheus.yml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	p := &prometheus{url: "http://" + freeAddress(t), log: &buffer{}}
	ctx, cancel := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, program, "--config.file="+file, "--storage.tsdb.path="+filepath.Join(dir, "data"), "--web.listen-address="+strings.TrimPrefix(p.url, "http://"), "--enable-feature=exemplar-storage", "--log.level=warn")
	cmd.Stdout, cmd.Stderr = p.log, p.log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cancel(); _ = cmd.Wait() })
	return p
}

// get asks the API for something.
func (p *prometheus) get(path string, query url.Values, data any) error {
	resp, err := http.Get(p.url + path + "?" + query.Encode())
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	var answer struct {
		Status, Error string
		Data          json.RawMessage
	}
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
		return err
	}
	if answer.Status != "success" {
		return fmt.Errorf("%s: %s", answer.Status, answer.Error)
	}
	return json.Unmarshal(answer.Data, data)
}

// value is one that an expression has now; an error when it has none.
func (p *prometheus) value(expr string) (float64, error) {
	var data struct {
		Result []struct{ Value [2]any }
	}
	if err := p.get("/api/v1/query", url.Values{"query": {expr}}, &data); err != nil {
		return 0, err
	}
	for _, r := range data.Result {
		if v, err := strconv.ParseFloat(fmt.Sprint(r.Value[1]), 64); err == nil && !math.IsNaN(v) {
			return v, nil
		}
	}
	return 0, fmt.Errorf("nothing")
}

func (p *prometheus) values(t *testing.T, label, match string) []string {
	t.Helper()
	var list []string
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(200 * time.Millisecond) {
		if err := p.get("/api/v1/label/"+label+"/values", url.Values{"match[]": {match}}, &list); err == nil && len(list) > 0 {
			return list
		}
	}
	t.Fatalf("no value of %s in %s\n%s", label, match, p.log)
	return nil
}

// Every panel shows something of a real run, with its model and mode chosen.
func TestTheDashboardOfARealRun(t *testing.T) {
	program := tool(t, "prometheus")
	s := startShielded(t, serveOptions{model: demoModel, args: []string{"-np", "2"}})
	prom := startPrometheus(t, program, strings.TrimPrefix(s.url, "http://"))
	defer s.busy(t)()
	if status, _, err := s.as("", "/props", map[string]any{}); err != nil || status != http.StatusForbidden {
		t.Fatalf("POST /props: %d, %v", status, err)
	}
	modes := prom.values(t, "kvshield_mode", "kvshield_info")
	models := prom.values(t, "gen_ai_request_model", "gen_ai_server_request_duration_seconds_count")
	if !slices.Equal(modes, []string{"resident"}) {
		t.Errorf("modes: %q", modes)
	}
	model := strings.ReplaceAll(regexp.QuoteMeta(models[0]), `\`, `\\`) // within quotes, as Grafana puts it
	end := time.Now().Add(patience)
	for _, panel := range dashboard(t) {
		for _, target := range panel.Targets {
			expr := filled(target.Expr, model, modes[0])
			_, err := prom.value(expr)
			for err != nil && time.Now().Before(end) {
				time.Sleep(200 * time.Millisecond)
				_, err = prom.value(expr)
			}
			if err != nil {
				t.Errorf("%s: %v for %s", panel.Title, err, expr)
			}
		}
	}
	names := prom.values(t, "__name__", `{job="kvshield"}`)
	for _, panel := range dashboard(t) {
		for _, target := range panel.Targets {
			for _, name := range metricsOf(target.Expr) {
				if !slices.Contains(names, name) {
					t.Errorf("%s: a run exports no %s", panel.Title, name)
				}
			}
		}
	}
}

var (
	labels = regexp.MustCompile(`\{[^}]*\}|\bby \([^)]*\)`)
	metric = regexp.MustCompile(`\b(?:kvshield|gen_ai)_\w+\b`)
)

func metricsOf(expr string) []string {
	return metric.FindAllString(labels.ReplaceAllString(expr, ""), -1)
}
