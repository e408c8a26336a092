// The C kernels' interface to Go. Every structure here has a twin in Go (job.go), of the same layout.
#ifndef KVS_ATTENTION_H
#define KVS_ATTENTION_H

#include <stdint.h>

enum {
	KVS_PANEL = 32, // cells whose keys lie interleaved
	KVS_PAGE_PANELS = 8,
	KVS_BLOCK = 4,	 // panels between two looks at the running maximum
	KVS_DIRECT = 16, // up to so many rows, F16 is converted in registers instead of in a scratch area
	KVS_MAX_DIM = 1024,
};
enum { KVS_F16, KVS_F32, KVS_Q8_0 };
enum { KVS_NO_MASK, KVS_MASK_F16, KVS_MASK_F32 };

struct kvs_job {
	int64_t dim_k, dim_v, dim_vp;	       // floats; dim_vp is dim_v rounded up to 16
	int64_t group, head, query_heads;      // head is the KV head
	int64_t first, tokens, rows_max;       // rows are tokens × group
	int64_t panel_lo, panel_hi;
	int64_t vis_stride;		       // words between two tokens' visibility, 0: all tokens share one row
	int64_t mask_type, mask_cells;
	int64_t storage;
	int64_t k_at, v_at, k_panel, v_panel;  // of this KV head: bytes from the page's start, bytes a panel
	float scale, softcap;
};

struct kvs_cell {
	int64_t dim_k, dim_v, dim_vp, kv_heads, storage, cell; // cell counts from the page's start
	int64_t k_at, v_at, k_head, v_head, k_panel, v_panel;  // bytes
};

#define KVS_DECLARE(level)                                                                                           \
	int kvs_item_##level(const struct kvs_job *j, const float *q, const uint8_t *mask, const uint32_t *vis,      \
			     const uintptr_t *pages, const float *slopes, float *scratch, float *part);              \
	int kvs_finish_##level(const struct kvs_job *j, const float *parts, int64_t splits, int64_t stride,          \
			       const float *sinks, float *out);                                                      \
	int kvs_put_##level(const struct kvs_cell *c, const float *k, const float *v, uintptr_t page);

KVS_DECLARE(avx512)
KVS_DECLARE(avx2)
KVS_DECLARE(neon)

#endif
