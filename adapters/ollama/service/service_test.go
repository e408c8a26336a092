package service

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

const stockUnit = `[Unit]
Description=Ollama Service
After=network-online.target

[Service]
ExecStart=/usr/local/bin/ollama serve
User=ollama
Group=ollama
Restart=always
Environment="PATH=/usr/bin"

[Install]
WantedBy=default.target
`

// scratch is a root folder with an Ollama in it, of either generation.
func scratch(t *testing.T, unit string, flags ...string) string {
	t.Helper()
	root := t.TempDir()
	write(t, filepath.Join(root, configDir, unitName), unit)
	write(t, filepath.Join(root, "usr/local/lib/ollama/llama-server"), "")
	source, err := filepath.Abs("../../watch/testdata/host.c")
	if err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(root, "usr/local/bin/ollama")
	if err := os.MkdirAll(filepath.Dir(program), 0o755); err != nil {
		t.Fatal(err)
	}
	if text, err := exec.Command("gcc", append(flags, source, "-o", program)...).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	return root
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func find(t *testing.T, root string) *Service {
	t.Helper()
	s, err := Find(root)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// snapshot is every file below a folder, with its rights and content.
func snapshot(t *testing.T, root string) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		all[path] = info.Mode().String()
		if info.Mode().IsRegular() {
			text, err := os.ReadFile(path)
			all[path] += string(text)
			return err
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func sameFiles(t *testing.T, before, after map[string]string) {
	t.Helper()
	for path, text := range before {
		if after[path] != text {
			t.Errorf("%s is gone or changed", path)
		}
	}
	for path := range after {
		if _, was := before[path]; !was {
			t.Errorf("%s was left behind", path)
		}
	}
}

var options = Options{Command: "/usr/local/bin/kvshield", Mode: "resident"}

func TestEnableAndDisable(t *testing.T) {
	tests := map[string]func(root string){
		"as installed": func(string) {},
		"empty folder": func(root string) { os.Mkdir(filepath.Join(root, configDir, unitName+".d"), 0o755) },
		"with an own drop-in": func(root string) {
			write(t, filepath.Join(root, configDir, unitName+".d", "override.conf"), "[Service]\nExecStart=\nExecStart=-/usr/local/bin/ollama serve --own\n")
		},
	}
	for name, prepare := range tests {
		t.Run(name, func(t *testing.T) {
			root := scratch(t, stockUnit)
			prepare(root)
			before := snapshot(t, root)
			dry, err := find(t, root).Enable(options, true)
			if err != nil || !dry.Written || dry.Text == "" {
				t.Fatalf("dry run: %+v, %v", dry, err)
			}
			sameFiles(t, before, snapshot(t, root))

			done, err := find(t, root).Enable(options, false)
			if err != nil || done != dry {
				t.Fatalf("%+v, %v; a dry run said %+v", done, err, dry)
			}
			if text, _ := os.ReadFile(done.Path); string(text) != done.Text {
				t.Errorf("wrote %q, said %q", text, done.Text)
			}
			enabled := snapshot(t, root)
			if again, err := find(t, root).Enable(options, false); err != nil || again.Written {
				t.Errorf("enabling again: %+v, %v", again, err)
			}
			sameFiles(t, enabled, snapshot(t, root))
			if st := find(t, root).Status(); !st.Enabled || st.Running || st.Generation != "current" {
				t.Errorf("status %+v", st)
			}

			other, err := find(t, root).Enable(Options{options.Command, "permute"}, false)
			if err != nil || !other.Written || !strings.Contains(other.Text, "--mode permute") {
				t.Errorf("another mode: %+v, %v", other, err)
			}
			if c, err := find(t, root).Disable(true); err != nil || !c.Written {
				t.Errorf("dry run of disable: %+v, %v", c, err)
			}
			if c, err := find(t, root).Disable(false); err != nil || !c.Written {
				t.Errorf("disable: %+v, %v", c, err)
			}
			sameFiles(t, before, snapshot(t, root))
			if c, err := find(t, root).Disable(false); err != nil || c.Written {
				t.Errorf("disabling again: %+v, %v", c, err)
			}
		})
	}
}

func TestCommandOfTheService(t *testing.T) {
	const run = " run --mode resident --runtime-dir %t/kvshield-ollama -- "
	tests := map[string]struct{ exec, command, want string }{
		"plain":        {"/usr/local/bin/ollama serve", "/opt/kvshield", "/opt/kvshield" + run + "/usr/local/bin/ollama serve"},
		"prefix":       {"-/usr/local/bin/ollama serve", "/opt/kvshield", "-/opt/kvshield" + run + "/usr/local/bin/ollama serve"},
		"quoted":       {`"/usr/local/bin/ollama" serve "a b"`, "/opt/kvshield", "/opt/kvshield" + run + `"/usr/local/bin/ollama" serve "a b"`},
		"odd path":     {"/usr/local/bin/ollama serve", `/opt/a b%$"`, `"/opt/a b%%$$\""` + run + "/usr/local/bin/ollama serve"},
		"two lines":    {"/usr/local/bin/ollama \\\n  # a comment\n  serve", "/opt/kvshield", "/opt/kvshield" + run + "/usr/local/bin/ollama  serve"},
		"taken back":   {"/bin/false\nExecStart=\nExecStart=/usr/local/bin/ollama serve", "/opt/kvshield", "/opt/kvshield" + run + "/usr/local/bin/ollama serve"},
		"long PATH":    {"/usr/local/bin/ollama serve\nEnvironment=PATH=" + strings.Repeat("/x:", 2000), "/opt/kvshield", "/opt/kvshield" + run + "/usr/local/bin/ollama serve"},
		"other values": {"/usr/local/bin/ollama serve ${FLAGS} %i", "/opt/kvshield", "/opt/kvshield" + run + "/usr/local/bin/ollama serve ${FLAGS} %i"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			root := scratch(t, strings.Replace(stockUnit, "/usr/local/bin/ollama serve", test.exec, 1))
			c, err := find(t, root).Enable(Options{test.command, "resident"}, true)
			if err != nil || !strings.Contains(c.Text, "\nExecStart=\nExecStart="+test.want+"\n") {
				t.Errorf("%v\n%s\nwant %s", err, c.Text, test.want)
			}
		})
	}
}

func TestRefusals(t *testing.T) {
	replace := func(old, new string) string { return strings.Replace(stockUnit, old, new, 1) }
	tests := map[string]struct {
		unit, want string
		flags      []string
		prepare    func(root string)
	}{
		"embedded engine":   {unit: stockUnit, flags: []string{"-DEMBED"}, want: "use kvshield-ollama"},
		"name of its own":   {unit: replace("=/usr/local/bin/ollama", "=@/usr/local/bin/ollama name"), want: "ExecStart=@"},
		"shielded by hand":  {unit: replace("=/usr/local/bin/ollama", "=/usr/bin/kvshield run -- ollama"), want: "nothing to enable"},
		"several":           {unit: replace("ollama serve", "ollama serve ; /bin/true"), want: "several commands"},
		"none":              {unit: replace("ExecStart=/usr/local/bin/ollama serve", ""), want: "0 commands"},
		"program missing":   {unit: replace("bin/ollama", "bin/nollama"), want: "not there"},
		"no Unix sockets":   {unit: replace("User=", "RestrictAddressFamilies=AF_INET\nUser="), want: "add AF_UNIX"},
		"no sockets at all": {unit: replace("User=", "RestrictAddressFamilies=none\nUser="), want: "add AF_UNIX"},
		"overridden": {unit: stockUnit, want: "zzz.conf sets ExecStart=", prepare: func(root string) {
			write(t, filepath.Join(root, configDir, unitName+".d", "zzz.conf"), "[Service]\nExecStart=\nExecStart=/usr/local/bin/ollama serve\n")
		}},
		"foreign drop-in": {unit: stockUnit, want: ErrForeign.Error(), prepare: func(root string) {
			write(t, filepath.Join(root, configDir, unitName+".d", dropInName), "[Service]\nNice=5\n")
		}},
		"a whole unit": {unit: exampleUnit(t, "ollama"), want: "nothing to enable"},
		"folder leads out": {unit: stockUnit, want: "leads out of", prepare: func(root string) {
			os.Symlink(t.TempDir(), filepath.Join(root, configDir, unitName+".d"))
		}},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			root := scratch(t, test.unit, test.flags...)
			if test.prepare != nil {
				test.prepare(root)
			}
			before := snapshot(t, root)
			_, err := find(t, root).Enable(options, false)
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("%v, want %q", err, test.want)
			}
			sameFiles(t, before, snapshot(t, root))
		})
	}
}

func exampleUnit(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile("../../../examples/ollama/" + name + ".service")
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func TestDisableLeavesWhatWasChanged(t *testing.T) {
	root := scratch(t, stockUnit)
	c, err := find(t, root).Enable(options, false)
	if err != nil {
		t.Fatal(err)
	}
	write(t, c.Path, c.Text+"Nice=5\n")
	if _, err := find(t, root).Disable(false); !errors.Is(err, ErrForeign) {
		t.Errorf("%v, want %v", err, ErrForeign)
	}
	if _, err := os.Stat(c.Path); err != nil {
		t.Error("it was removed all the same")
	}
	if st := find(t, root).Status(); st.Enabled || !strings.Contains(st.Warning, dropInName) {
		t.Errorf("status %+v", st)
	}
}

func TestNotFound(t *testing.T) {
	empty, without, masked := t.TempDir(), t.TempDir(), t.TempDir()
	for _, root := range []string{without, masked} {
		if err := os.MkdirAll(filepath.Join(root, configDir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(os.DevNull, filepath.Join(masked, configDir, unitName)); err != nil {
		t.Fatal(err)
	}
	for root, want := range map[string]error{empty: ErrNoSystemd, without: ErrNoUnit, masked: ErrMasked} {
		if _, err := Find(root); !errors.Is(err, want) {
			t.Errorf("%v, want %v", err, want)
		}
	}
}

// systemd's own check of what was written, and of something broken, to know that it checks.
func TestSystemdAnalyzeVerifies(t *testing.T) {
	root := scratch(t, strings.Replace(stockUnit, "/usr/local/bin/ollama", "/bin/true", 1))
	write(t, filepath.Join(root, "bin/true"), "")
	verify := func() string {
		cmd := exec.Command("systemd-analyze", "verify", "--man=no", unitName)
		cmd.Env = append(os.Environ(), "SYSTEMD_UNIT_PATH="+filepath.Join(root, configDir)+":") // and the machine's own units
		out, err := cmd.CombinedOutput()
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) {
			t.Fatalf("%v; install it (Debian: apt-get install systemd)", err)
		}
		return string(out)
	}
	for _, mode := range []string{"resident", "permute"} {
		if _, err := find(t, root).Enable(Options{"/bin/true", mode}, false); err != nil {
			t.Fatal(err)
		}
		if out := verify(); strings.Contains(out, unitName) {
			t.Errorf("mode %s:\n%s", mode, out)
		}
	}
	if _, err := find(t, root).Disable(false); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"embedded", "ollama"} {
		write(t, filepath.Join(root, configDir, unitName), strings.NewReplacer("/usr/local/bin/kvshield-ollama", "/bin/true", "/usr/local/bin/kvshield", "/bin/true", "/usr/local/bin/ollama", "/bin/true").Replace(exampleUnit(t, name)))
		if out := verify(); strings.Contains(out, unitName) {
			t.Errorf("the example %s:\n%s", name, out)
		}
	}
	write(t, filepath.Join(root, configDir, unitName), strings.Replace(stockUnit, "/usr/local/bin/ollama", "/bin/true", 1))
	if _, err := find(t, root).Enable(Options{"/nowhere/kvshield", "resident"}, false); err != nil {
		t.Fatal(err)
	}
	if out := verify(); !strings.Contains(out, "/nowhere/kvshield is not executable") {
		t.Errorf("systemd-analyze does not read the drop-in: it said %q of a command that is missing", out)
	}
}

func TestReachable(t *testing.T) {
	open, err := os.MkdirTemp("/tmp", "kvs-reach-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(open) })
	if err := os.Chmod(open, 0o755); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(open, "closed", "kvshield")
	write(t, path, "")
	s := &Service{User: "nobody"}
	if err := s.Reachable(path); err != nil {
		t.Error(err)
	}
	if err := os.Chmod(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := s.Reachable(path); err == nil || !strings.Contains(err.Error(), "user nobody cannot reach") {
		t.Errorf("%v", err)
	}
	if err := (&Service{}).Reachable(path); err != nil {
		t.Errorf("root: %v", err)
	}
}

func FuzzUnit(f *testing.F) {
	f.Add(stockUnit)
	f.Add("[Service]\nExecStart=\\\n\\\n#\n=\n[")
	f.Fuzz(func(t *testing.T, text string) {
		settings, err := parse(strings.NewReader(text))
		if err != nil {
			return
		}
		splitCommand(last(settings, "ExecStart"))
	})
}
