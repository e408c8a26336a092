package tenant

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
)

// passedOn is a request as the engine gets it.
type passedOn struct {
	method, path, body string
	slot               int // what Granted was told; 99 when nothing
}

// sharing sends requests through Share and returns what the engine gets. While one is held, its slot is in use.
type sharing struct {
	t    *testing.T
	pool *Pool
	mu   sync.Mutex
	got  []passedOn
	hold chan struct{} // nil: answered at once
	in   chan struct{}
}

type slotKey struct{}

func share(t *testing.T, slots int) *sharing {
	s := &sharing{t: t, pool: &Pool{}, in: make(chan struct{}, 16)}
	s.pool.Resize(slots)
	return s
}

func (s *sharing) send(method, path, body string) *httptest.ResponseRecorder {
	told := 99
	h := Share(Config{Pool: s.pool, Granted: func(ctx context.Context, slot int) { *ctx.Value(slotKey{}).(*int) = slot }},
		http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			text, err := io.ReadAll(r.Body)
			if err != nil || r.ContentLength >= 0 && int64(len(text)) != r.ContentLength {
				s.t.Errorf("%d bytes announced, %d sent, %v", r.ContentLength, len(text), err)
			}
			s.mu.Lock()
			s.got = append(s.got, passedOn{r.Method, r.URL.Path, string(text), told})
			s.mu.Unlock()
			s.in <- struct{}{}
			if s.hold != nil {
				<-s.hold
			}
		}))
	w := httptest.NewRecorder()
	r := httptest.NewRequest(method, path, strings.NewReader(body))
	h.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), slotKey{}, &told)))
	return w
}

func TestShareNamesSlots(t *testing.T) {
	long := strings.Repeat("a", 300)
	for name, test := range map[string]struct {
		method, path, body, want string
		slot                     int
	}{
		"completion":          {"POST", "/completion", `{"prompt":"p"}`, `{"id_slot":0,"prompt":"p"}`, 0},
		"chat":                {"POST", "/v1/chat/completions", `{"messages":[]}`, `{"id_slot":0,"messages":[]}`, 0},
		"by number":           {"POST", "/completion", `{"id_slot":1,"prompt":"p"}`, `{"id_slot":1,"prompt":"p"}`, 1},
		"any":                 {"POST", "/completion", `{"id_slot":-1}`, `{"id_slot":0}`, 0},
		"one that is not":     {"POST", "/completion", `{"id_slot":2}`, `{"id_slot":2}`, AnySlot},
		"several answers":     {"POST", "/v1/completions", `{"prompt":"p", "n":2}`, `{"prompt":"p", "n":2}`, AnySlot},
		"several prompts":     {"POST", "/completion", `{"prompt":[ "p","q"]}`, `{"prompt":[ "p","q"]}`, AnySlot},
		"prompts of tokens":   {"POST", "/completion", `{"prompt":[[1],[2]]}`, `{"prompt":[[1],[2]]}`, AnySlot},
		"a prompt of tokens":  {"POST", "/completion", `{"prompt":[1,2]}`, `{"id_slot":0,"prompt":[1,2]}`, 0},
		"no object":           {"POST", "/completion", `["` + long + `"]`, `["` + long + `"]`, AnySlot},
		"no slot to be named": {"POST", "/v1/messages", `{"n":1}`, `{"n":1}`, AnySlot},
		"embedding":           {"POST", "/v1/embeddings", `{"input":"p"}`, `{"input":"p"}`, AnySlot},
		"unknown":             {"POST", "/new", "text", "text", AnySlot},
		"no slot":             {"POST", "/tokenize", `{"content":"p"}`, `{"content":"p"}`, 99},
		"health":              {"GET", "/health", "", "", 99},
		"unknown, read":       {"GET", "/new", "", "", 99},
	} {
		t.Run(name, func(t *testing.T) {
			s := share(t, 2)
			s.send(test.method, test.path, test.body)
			if want := (passedOn{test.method, test.path, test.want, test.slot}); len(s.got) != 1 || s.got[0] != want {
				t.Errorf("the engine got %+v, want %+v", s.got, want)
			}
		})
	}
}

func TestShareWithoutSlotsLeavesRequestsAlone(t *testing.T) {
	s := share(t, -1)
	s.send("POST", "/completion", `{"prompt":"p"}`)
	if s.got[0].body != `{"prompt":"p"}` || s.got[0].slot != AnySlot {
		t.Errorf("%+v", s.got)
	}
}

func chat(turns ...string) string {
	var m []map[string]string
	for _, text := range turns {
		m = append(m, map[string]string{"role": "user", "content": strings.Repeat(text, 100)})
	}
	b, _ := json.Marshal(map[string]any{"messages": m})
	return string(b)
}

// A conversation goes on in the slot that has it, whatever came in between; a new one takes the slot that was idle longest.
func TestShareFindsTheConversation(t *testing.T) {
	s := share(t, 3)
	for i, test := range []struct {
		body string
		slot int
	}{{chat("a"), 0}, {chat("b"), 1}, {chat("a", "x"), 0}, {chat("c"), 2}, {chat("b", "y"), 1}, {chat("a", "x", "z"), 0}, {chat("d"), 2}} {
		s.send("POST", "/v1/chat/completions", test.body)
		if got := s.got[len(s.got)-1]; got.slot != test.slot {
			t.Errorf("request %d is in slot %d, want %d", i, got.slot, test.slot)
		}
	}
}

func TestShareGivesABusySlotToNobody(t *testing.T) {
	s := share(t, 2)
	s.hold = make(chan struct{})
	var wg sync.WaitGroup
	send := func(body string) { wg.Go(func() { s.send("POST", "/completion", body) }) }
	send(`{"prompt":"a"}`)
	<-s.in
	send(`{"id_slot":0,"prompt":"b"}`) // waits for slot 0
	send(`{"prompt":"c"}`)             // and holds nobody up
	<-s.in
	s.mu.Lock()
	if len(s.got) != 2 || s.got[0].slot == s.got[1].slot {
		t.Errorf("%+v", s.got)
	}
	s.mu.Unlock()
	close(s.hold)
	wg.Wait()
	if len(s.got) != 3 || s.got[2].slot != 0 {
		t.Errorf("%+v", s.got)
	}
}

// Nothing of a text is kept, and texts that begin alike are told by how far.
func TestPrint(t *testing.T) {
	a := bytes.Repeat([]byte("0123456789abcdef"), 40)
	b := bytes.Clone(a)
	b[5*printStep+3] ^= 1
	if n := printOf(a).common(printOf(b)); n != 5 {
		t.Errorf("%d steps in common", n)
	}
	if n := printOf(a).common(printOf(a[:printStep*3+1])); n != 3 {
		t.Errorf("%d steps of the shorter one", n)
	}
	if strings.Contains(fmt.Sprint(printOf(a)), "0123456789abcdef") {
		t.Error("the text is in its print")
	}
}
