package main

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"kvshield": func() { os.Exit(Main()) }})
}

// repository is the root of the source tree.
func repository(t *testing.T) string {
	t.Helper()
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	for _, needed := range []string{"bin/kvshield-enclave", "bin/libkvshield.so", ".engine/bin/llama-server"} {
		if _, err := os.Stat(filepath.Join(root, needed)); err != nil {
			t.Fatalf("%s is missing: run `make build engine`", needed)
		}
	}
	return root
}

func TestScripts(t *testing.T) {
	root := repository(t)
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { busy.Close() }) // the scripts run after this function returns
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(e *testscript.Env) error {
			e.Setenv("KVSHIELD_HOOK", filepath.Join(root, "bin", "libkvshield.so"))
			e.Setenv("KVSHIELD_ENCLAVE", filepath.Join(root, "bin", "kvshield-enclave"))
			e.Setenv("DEMO", filepath.Join(root, "examples", "model", "demo.gguf"))
			e.Setenv("ENGINES", filepath.Join(root, ".engine", "bin"))
			e.Setenv("BUSY", busy.Addr().String())
			e.Setenv("CC", "cc")
			e.Setenv("PATH", e.Getenv("PATH")+string(os.PathListSeparator)+filepath.Join(root, ".engine", "bin"))
			return nil
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"oneline": oneLine,
			"cut":     cut,
			"poke":    poke,
			"quick":   quick,
		},
	})
}

// quick fails the script when its last command began more than the given time ago: `quick start` notes the time.
func quick(ts *testscript.TestScript, neg bool, args []string) {
	const key = "QUICK"
	if args[0] == "start" {
		ts.Setenv(key, time.Now().Format(time.RFC3339Nano))
		return
	}
	began, err := time.Parse(time.RFC3339Nano, ts.Getenv(key))
	ts.Check(err)
	limit, err := time.ParseDuration(args[0])
	ts.Check(err)
	if took := time.Since(began); took > limit {
		ts.Fatalf("took %v, more than %v", took, limit)
	}
}

// oneLine checks that standard error is one line that begins as every message of the command does.
func oneLine(ts *testscript.TestScript, neg bool, args []string) {
	text := ts.ReadFile("stderr")
	var lines []string
	for line := range strings.Lines(text) {
		// What is said while it works is no part of the error.
		if !strings.HasPrefix(line, "kvshield: loading ") {
			lines = append(lines, line)
		}
	}
	if len(lines) != 1 || !strings.HasPrefix(lines[0], "kvshield: ") {
		ts.Fatalf("want one line that begins with \"kvshield: \", got\n%s", text)
	}
}

// cut writes the first N bytes of a file to another.
func cut(ts *testscript.TestScript, neg bool, args []string) {
	var n int
	_, err := fmt.Sscan(args[2], &n)
	ts.Check(err)
	b := ts.ReadFile(args[0])
	ts.Check(os.WriteFile(ts.MkAbs(args[1]), []byte(b[:n]), 0o644))
}

// poke copies a file and replaces the first occurrence of a text by one of the same length.
func poke(ts *testscript.TestScript, neg bool, args []string) {
	b := ts.ReadFile(args[0])
	if !strings.Contains(b, args[2]) || len(args[2]) != len(args[3]) {
		ts.Fatalf("cannot replace %q by %q", args[2], args[3])
	}
	ts.Check(os.WriteFile(ts.MkAbs(args[1]), []byte(strings.Replace(b, args[2], args[3], 1)), 0o644))
}
