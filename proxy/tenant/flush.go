package tenant

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"
)

const (
	flushTimeout = 30 * time.Second
	flushAnswer  = 1 << 20
)

var errNotFlushed = errors.New("the engine did not clear a slot")

// flush has the engine replace what is in a slot by one token that is nobody's: a prompt that may use nothing that is cached. The
// engine's answer says that it did, in this slot. A client that leaves does not stop it.
func flush(ctx context.Context, engine http.RoundTripper, slot int) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), flushTimeout)
	defer cancel()
	text := fmt.Sprintf(`{"id_slot":%d,"prompt":[0],"n_predict":0,"cache_prompt":false,"stream":false}`, slot)
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://localhost/completion", strings.NewReader(text))
	if err != nil {
		return err
	}
	r.Header.Set("Content-Type", "application/json")
	resp, err := engine.RoundTrip(r)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	var said struct {
		Slot      *int `json:"id_slot"`
		Evaluated int  `json:"tokens_evaluated"`
		Cached    int  `json:"tokens_cached"`
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, flushAnswer)).Decode(&said); err != nil {
		return errNotFlushed
	}
	if resp.StatusCode != http.StatusOK || said.Slot == nil || *said.Slot != slot || said.Evaluated != 1 || said.Cached > 2 {
		return errNotFlushed
	}
	return nil
}
