package e2e

import (
	"os/exec"
	"path/filepath"
	"testing"
)

// synthetic makes a model of random weights of more than 64 MiB, most of which is no attention.
func synthetic(t *testing.T) string {
	t.Helper()
	out := filepath.Join(t.TempDir(), "synthetic.gguf")
	cmd := exec.CommandContext(t.Context(), "go", "run", "./internal/benchmodel", "-o", out, "-layers", "3", "-width", "512", "-heads", "8",
		"-kv-heads", "2", "-ffn", "8192", "-vocab", "1024", "-context", "512", "-type", "F16")
	cmd.Dir = root
	if text, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("benchmodel: %v\n%s", err, text)
	}
	return out
}

// What is unchanged of a model is taken from the original, in large pages from 64 MiB on, however the engine takes its
// model in. Zeros in its place would give other logits altogether.
func TestUnchangedPagesAreShared(t *testing.T) {
	model := synthetic(t)
	all := map[string]any{"n_probs": vocabulary}
	stock := startStock(t, model, nil, "-c", "512")
	want := stock.complete(t, prompts[0], 1, all)
	for _, mode := range []string{"mmap", "none", "dio", "mlock", "mmap+mlock"} {
		t.Run(mode, func(t *testing.T) {
			shielded := startShielded(t, serveOptions{model: model, mode: "permute", args: []string{"-c", "512", "--load-mode", mode}})
			got := shielded.complete(t, prompts[0], 1, all)
			d := distance(logits(t, want, 0), logits(t, got, 0))
			t.Logf("logits differ by %.1e relative", d)
			if d > 1e-2 {
				t.Errorf("logits differ by %.1e relative", d)
			}
		})
	}
}
