package telemetry

import "net/http"

// operations of the paths that make a model work, by OpenTelemetry's names. Other requests have no span.
var operations = map[string]string{
	"/chat/completions": "chat", "/v1/chat/completions": "chat", "/api/chat": "chat",
	"/messages": "chat", "/v1/messages": "chat", "/responses": "chat", "/v1/responses": "chat",
	"/completion": "text_completion", "/completions": "text_completion", "/v1/completions": "text_completion", "/infill": "text_completion", "/api/generate": "text_completion",
	"/embedding": "embeddings", "/embeddings": "embeddings", "/v1/embeddings": "embeddings", "/api/embed": "embeddings", "/api/embeddings": "embeddings",
	"/rerank": "rerank", "/reranking": "rerank", "/v1/rerank": "rerank", "/v1/reranking": "rerank",
}

func operationOf(r *http.Request) string {
	if r.Method != http.MethodPost {
		return ""
	}
	return operations[r.URL.Path]
}
