package session

import (
	"io"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// writeWithin bounds how long a peer may leave its messages unread: the hook reads all the time.
const writeWithin = 2 * time.Second

// Peer is one engine process that has connected.
type Peer struct {
	PID   int // as the kernel tells it
	conn  *net.UnixConn
	send  sync.Mutex
	ended bool // said its last words
	dumps dumps
}

func (p *Peer) refuse(err error) error { return p.write(text(typeRefused, err.Error()), nil) }

func (p *Peer) meter(file *os.File) error {
	if file == nil {
		return nil
	}
	defer file.Close()
	return p.write(encode(typeMeter, nil), file)
}

func (p *Peer) write(b []byte, file *os.File) error {
	p.send.Lock()
	defer p.send.Unlock()
	var rights []byte
	if file != nil {
		rights = unix.UnixRights(int(file.Fd()))
	}
	_ = p.conn.SetWriteDeadline(time.Now().Add(writeWithin))
	_, _, err := p.conn.WriteMsgUnix(b, rights, nil)
	return err
}

func (p *Peer) read() (Type, []byte, *os.File, error) {
	buf := make([]byte, headerSize+bodyMax)
	oob := make([]byte, unix.CmsgSpace(4*4))
	n, oobn, flags, _, err := p.conn.ReadMsgUnix(buf, oob)
	if err != nil {
		return 0, nil, nil, err
	}
	file := firstFile(oob[:oobn])
	t, body, err := understand(buf[:n], flags)
	if err != nil && file != nil {
		file.Close()
		file = nil
	}
	return t, body, file, err
}

func understand(b []byte, flags int) (Type, []byte, error) {
	switch {
	case flags&unix.MSG_TRUNC != 0:
		return 0, nil, malformed("longer than %d bytes", headerSize+bodyMax)
	case flags&unix.MSG_CTRUNC != 0:
		return 0, nil, malformed("more file descriptors than a hook sends")
	case len(b) == 0:
		return 0, nil, io.EOF
	}
	return decode(b)
}

// firstFile takes the first descriptor and closes any other: a peer must not fill our table.
func firstFile(oob []byte) *os.File {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil
	}
	var first *os.File
	for _, m := range messages {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			continue
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			if first == nil {
				first = os.NewFile(uintptr(fd), "model")
			} else {
				unix.Close(fd)
			}
		}
	}
	return first
}
