package shield

import (
	"encoding/json"
	"errors"
	"net/http"
	"slices"
	"time"

	"github.com/ollama/ollama/llm"
)

// refusalWithin is how long a runner waits to be told to load the model that was refused to it. Ollama does so at once.
const refusalWithin = time.Minute

// refuse answers for a runner of Ollama's own engine whose model was refused. Ollama waits until a runner listens, for as long as a load
// may take, and takes an error only in the answer to its request to load.
func refuse(args []string, reason string) error {
	i := slices.Index(args, "--port")
	if i < 0 || i+1 == len(args) {
		return errors.New(reason)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /health", func(w http.ResponseWriter, _ *http.Request) {
		_ = json.NewEncoder(w).Encode(llm.ServerStatusResponse{Status: llm.ServerStatusLaunched})
	})
	mux.HandleFunc("POST /load", func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, reason, http.StatusInternalServerError)
	})
	s := &http.Server{Addr: "127.0.0.1:" + args[i+1], Handler: mux, ReadHeaderTimeout: refusalWithin}
	time.AfterFunc(refusalWithin, func() { _ = s.Close() })
	if err := s.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return errors.New(reason)
}
