package plugin

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestLentFilesAreReadUntilReleased(t *testing.T) {
	c, ctx := start(t, nil), bounded(t)
	var files []*os.File
	for _, text := range []string{"first", "second"} {
		path := filepath.Join(t.TempDir(), "f")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		files = append(files, f)
	}
	paths, release, err := c.Lend(ctx, files...)
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []string{"first", "second"} {
		if m, err := c.Inspect(ctx, paths[i:]); err != nil || m.Name != want {
			t.Errorf("file %d: %q, %v", i, m.Name, err)
		}
	}
	release()
	eventually(t, "the loan to end", func() bool {
		m, err := c.Inspect(ctx, paths)
		return err != nil || m.Name != "first"
	})
}

func TestLendRefusesNumbers(t *testing.T) {
	for n, want := range map[int]string{0: "0 files in one loan", maxLent + 1: "254 files in one loan"} {
		if _, _, err := (&Client{}).Lend(bounded(t), make([]*os.File, n)...); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Lend of %d: %v", n, err)
		}
	}
}

// Only the host may lend: the socket's directory is closed to others, and their number would be wrong besides.
func TestStrangersCannotLend(t *testing.T) {
	d, err := listenFiles(socketDir(t), os.Getpid()+1)
	if err != nil {
		t.Fatal(err)
	}
	defer d.close()
	conn, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: d.address(), Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if numbers, err := lend(conn, []*os.File{os.Stdin}); err == nil {
		t.Errorf("a stranger's file was taken as %v", numbers)
	}
}
