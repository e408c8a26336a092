package plugin

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/kvshield/kvshield/plugin/pb"
)

// maxLent is what one message can carry (SCM_MAX_FD).
const maxLent = 253

// fileDesk takes in descriptors that the host lends to the enclave. A hardened enclave may not follow
// /proc/PID/fd/N into the host, but it may use what it was handed. A loan lasts as long as its connection.
type fileDesk struct {
	listener *net.UnixListener
	host     int // the only process that may lend
}

func listenFiles(dir string, host int) (*fileDesk, error) {
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: filepath.Join(dir, fmt.Sprintf("files-%d.sock", os.Getpid())), Net: "unixpacket"})
	if err != nil {
		return nil, fmt.Errorf("cannot make the socket for files: %w", err)
	}
	d := &fileDesk{l, host}
	go d.serve()
	return d, nil
}

func (d *fileDesk) address() string { return d.listener.Addr().String() }
func (d *fileDesk) close()          { d.listener.Close() }

func (d *fileDesk) serve() {
	for {
		c, err := d.listener.AcceptUnix()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			if peerPID(c) == d.host {
				hold(c)
			}
		}()
	}
}

func peerPID(c *net.UnixConn) int {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0
	}
	pid := 0
	_ = raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			pid = int(cred.Pid)
		}
	})
	return pid
}

// hold takes one message of descriptors, answers with their numbers here, and closes them when the host hangs up.
func hold(c *net.UnixConn) {
	buf := make([]byte, 1)
	oob := make([]byte, unix.CmsgSpace(4*maxLent))
	_, n, _, _, err := c.ReadMsgUnix(buf, oob)
	if err != nil {
		return
	}
	messages, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil {
		return
	}
	var numbers []byte
	for _, m := range messages {
		fds, _ := unix.ParseUnixRights(&m)
		for _, fd := range fds {
			defer unix.Close(fd)
			numbers = binary.LittleEndian.AppendUint32(numbers, uint32(fd))
		}
	}
	if _, err := c.Write(numbers); err != nil {
		return
	}
	_, _ = c.Read(buf) // returns when the loan ends
}

// Lend makes files of this process usable by the enclave and returns the paths under which it sees them. Release ends
// the loan. Where an enclave cannot be handed descriptors, the paths lead into this process instead.
func (c *Client) Lend(ctx context.Context, files ...*os.File) (paths []string, release func(), err error) {
	if len(files) == 0 || len(files) > maxLent {
		return nil, nil, fmt.Errorf("%d files in one loan, where 1 to %d are possible", len(files), maxLent)
	}
	r, err := c.rpc.Files(ctx, &pb.FilesRequest{})
	if err != nil {
		return nil, nil, fromStatus(err)
	}
	if r.GetAddress() == "" {
		return hostPaths(files), func() {}, nil
	}
	conn, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: r.GetAddress(), Net: "unixpacket"})
	if err != nil {
		return nil, nil, &GoneError{err.Error()}
	}
	numbers, err := lend(conn, files)
	if err != nil {
		conn.Close()
		return nil, nil, &GoneError{err.Error()}
	}
	for _, n := range numbers {
		paths = append(paths, fmt.Sprintf("/proc/self/fd/%d", n))
	}
	return paths, func() { conn.Close() }, nil
}

func hostPaths(files []*os.File) []string {
	var paths []string
	for _, f := range files {
		paths = append(paths, fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), f.Fd()))
	}
	return paths
}

func lend(conn *net.UnixConn, files []*os.File) ([]uint32, error) {
	var fds []int
	for _, f := range files {
		fds = append(fds, int(f.Fd()))
	}
	if _, _, err := conn.WriteMsgUnix([]byte{0}, unix.UnixRights(fds...), nil); err != nil {
		return nil, err
	}
	buf := make([]byte, 4*maxLent)
	n, err := conn.Read(buf)
	if err != nil {
		return nil, err
	}
	if n != 4*len(files) {
		return nil, errors.New("the enclave took another number of files than it was lent")
	}
	var numbers []uint32
	for i := 0; i < n; i += 4 {
		numbers = append(numbers, binary.LittleEndian.Uint32(buf[i:]))
	}
	return numbers, nil
}
