package llamacpp_test

import (
	"os/exec"
	"strings"
	"testing"
)

// A process that loads no model runs as it always did: with the hook preloaded and no socket to call.
func TestInert(t *testing.T) {
	for name, test := range map[string]struct {
		command []string
		want    string
	}{
		"a shell":      {[]string{"sh", "-c", "echo hi"}, "hi\n"},
		"a pipeline":   {[]string{"sh", "-c", "echo hi | cat && (exec echo there)"}, "hi\nthere\n"},
		"files":        {[]string{"sh", "-c", "d=$(mktemp -d) && dd if=/dev/zero of=$d/f bs=4096 count=1 oflag=direct,excl 2>/dev/null || dd if=/dev/zero of=$d/f bs=4096 count=1 2>/dev/null; stat -c %s $d/f; rm -r $d"}, "4096\n"},
		"python":       {[]string{"python3", "-c", "import mmap,tempfile; f=tempfile.TemporaryFile(); f.write(b'x'*8192); f.flush(); print(len(mmap.mmap(f.fileno(),0)))"}, "8192\n"},
		"its version":  {[]string{engine("llama-server"), "--version"}, "version"},
		"list devices": {[]string{engine("llama-server"), "--list-devices"}, "Available devices"},
	} {
		t.Run(name, func(t *testing.T) {
			program, err := exec.LookPath(test.command[0])
			if err != nil {
				t.Skipf("%s is not on this machine", test.command[0])
			}
			r := run(t, "", program, test.command[1:]...)
			if r.code != 0 || !strings.Contains(r.stdout+r.stderr, test.want) || len(r.said()) != 0 {
				t.Errorf("exit code %d, printed %q\n%s", r.code, r.stdout, r.stderr)
			}
		})
	}
}
