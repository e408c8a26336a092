package memory

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

const (
	held     = 200      // tokens in the child's cache
	heldSize = 32 << 20 // of the memory in which it lies
)

// child is the test binary as another process: "hold" keeps a cache until it reads the end of its input; a number is the process
// that it tries to search.
func child(mode string) {
	if pid, err := strconv.Atoi(mode); err == nil {
		_, err := NewScanner(dictionary(1, 100, testColumns)).Search(context.Background(), pid, nil)
		fmt.Printf("%v %v", errors.Is(err, ErrPermission), err)
		return
	}
	memory, err := syscall.Mmap(-1, 0, heldSize, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_PRIVATE|syscall.MAP_ANON)
	if err != nil {
		panic(err)
	}
	copy(memory[heldSize/2:], random(4, heldSize/2)) // the first half stays untouched
	for i, token := range conversation(held) {
		put(memory[heldSize/2+4096+i*rowBytes(F16, testColumns):], rowOf(1, int(token), testColumns), F16, 0, nil)
	}
	fmt.Println("ready")
	_, _ = io.Copy(io.Discard, os.Stdin)
	runtime.KeepAlive(memory)
}

// holder starts a child that keeps a cache. end ends it.
func holder(t *testing.T) (pid int, end func()) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), childMode+"=hold")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := false
	end = func() {
		if !ended {
			ended = true
			in.Close()
			_ = cmd.Wait()
		}
	}
	t.Cleanup(end)
	if line := make([]byte, 16); true {
		if n, err := out.Read(line); err != nil || string(line[:n]) != "ready\n" {
			t.Fatalf("the child said %q, %v", line[:n], err)
		}
	}
	return cmd.Process.Pid, end
}

func TestAnotherProcess(t *testing.T) {
	pid, _ := holder(t)
	s := NewScanner(dictionary(1, testTokens, testColumns))
	var dones []uint64
	var all uint64
	found, err := s.Search(t.Context(), pid, func(done, total uint64) { dones, all = append(dones, done), total })
	if err != nil {
		t.Fatal(err)
	}
	runs := Runs(found.Hits)
	if len(runs) == 0 || !slices.Equal(runs[0].Tokens, conversation(held)) || runs[0].Type != F16 || runs[0].Stride != 2*testColumns {
		t.Errorf("%d hits, and the longest run is not the conversation", len(found.Hits))
	}
	if found.Read < heldSize/2 || found.Empty < heldSize/2-2*chunk || found.Skipped == 0 {
		t.Errorf("%d read, %d empty, %d skipped", found.Read, found.Empty, found.Skipped)
	}
	if !slices.IsSorted(dones) || len(dones) == 0 || dones[len(dones)-1] != all || found.Read+found.Empty+found.Holes != all {
		t.Errorf("progress %d … of %d; %d read, %d empty, %d holes", dones[:min(3, len(dones))], all, found.Read, found.Empty, found.Holes)
	}
	hits, err := s.Process(t.Context(), pid)
	if err != nil || !slices.Equal(hits, found.Hits) {
		t.Errorf("another search found %d hits, not %d: %v", len(hits), len(found.Hits), err)
	}
}

func TestProcessThatEnds(t *testing.T) {
	pid, end := holder(t)
	s := NewScanner(dictionary(1, testTokens, testColumns))
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	found, err := s.Search(ctx, pid, func(uint64, uint64) { end() })
	if !errors.Is(err, ErrEnded) || !errors.Is(err, ErrProcess) || !strings.Contains(err.Error(), "keep it running") {
		t.Errorf("in mid-scan: %v", err)
	}
	if found.Read > heldSize/2 {
		t.Errorf("%d bytes were read of a process that had ended", found.Read)
	}
	if _, err := s.Search(ctx, pid, nil); !errors.Is(err, ErrEnded) {
		t.Errorf("after its end: %v", err)
	}
}

func TestZombie(t *testing.T) {
	cmd := exec.Command("true")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Wait() }()
	for state := ""; !strings.Contains(state, ") Z "); time.Sleep(time.Millisecond) {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", cmd.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		state = string(b)
	}
	if _, err := NewScanner(dictionary(1, 10, testColumns)).Search(t.Context(), cmd.Process.Pid, nil); !errors.Is(err, ErrEnded) {
		t.Error(err)
	}
}

func TestProcessOfSomebodyElse(t *testing.T) {
	if os.Getuid() != 0 {
		if _, err := NewScanner(dictionary(1, 10, testColumns)).Search(t.Context(), 1, nil); !errors.Is(err, fs.ErrPermission) {
			t.Error(err)
		}
		return
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), childMode+"="+strconv.Itoa(os.Getpid()))
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if said := string(out); !strings.HasPrefix(said, "true ") || !strings.Contains(said, "root") {
		t.Errorf("%s", out)
	}
}

func TestProcessThatNeverWas(t *testing.T) {
	for _, pid := range []int{0, -1, 1 << 30} {
		if _, err := NewScanner(dictionary(1, 10, testColumns)).Process(t.Context(), pid); !errors.Is(err, ErrProcess) {
			t.Errorf("process %d: %v", pid, err)
		}
	}
}
