// Causal attention of query rows over the paged pool, with grouped KV heads.
//
// Keys and values go from the pool straight into the registers of the tensor cores: one warp holds sixteen (query row, head)
// pairs of one KV head. A key's elements are loaded sixteen bytes a lane; that permutes the dot product's terms the same way on both
// sides. A value's elements likewise; that permutes which lane holds which element of the output, nothing else.
//
// The context is cut into splits of SPLIT keys at fixed places. `attend_split` gives each split's partial softmax (online over
// tiles of TILE keys; Dao et al. 2022), and partial results are merged one after the other, from the first key on. `prefill` merges in
// registers; `decode` spreads splits over warps and `merge` puts them together (as Flash-Decoding does). Both run the same
// operations in the same order for a row, so a token's result does not depend on which of them computed it, on the rows beside it, or
// on where a prompt was cut. Keys beyond a row's own position have weight exactly zero.
//
// Definitions: KV (F32 selects products without tensor cores, as does PLAIN), ACT, HEAD_DIM, KV_HEADS, GROUP, BLOCK_TOKENS.

// Keys of a tile: with large heads fewer, so that a warp's share fits its registers.
#define TILE (HEAD_DIM > 64 ? 32 : 64)
#define SPLIT 256
#define TILE_GROUPS (TILE / 8)
#define TOKENS (16 / GROUP)
#define CHUNKS (HEAD_DIM / 32)
#define HALVES (HEAD_DIM / 64)
#define OUTPUTS (HEAD_DIM / 8)

// Consecutive rows of one sequence, at most TOKENS of them.
struct Tile {
    u32 first_row;
    u32 rows;
    u32 start;           // where in `tables` its sequence begins
    u32 first_position;  // of the first row
};

struct AttentionParams {
    u64 queries;   // KV [rows][KV_HEADS * GROUP][HEAD_DIM]
    u64 out;       // ACT [rows][KV_HEADS * GROUP * HEAD_DIM]
    u64 pool;
    u64 tables;    // u32
    u64 tiles;     // Tile [count]
    u64 partial;     // f32 [count][KV_HEADS][splits][GROUP][HEAD_DIM], decode only
    u64 partial_ml;  // f32 [count][KV_HEADS][splits][GROUP][max, sum], decode only
    u32 count;
    u32 splits;    // room for so many splits of each tile
    u32 layer;
    u32 slots;
    float scale;   // of scores, times log2(e)
    u32 padding;
};

// What lane `l` holds: rows l / 4 and l / 4 + 8; of scores, keys 8 n + 2 (l % 4) and the next; of outputs, the elements
// 64 h + 16 (l % 4) + 8 e + j, in out[(8 h + j)][e] and, for the second row, [2 + e].
struct Partial {
    float max[2];
    float sum[2];
    float out[OUTPUTS][4];
};

struct View {
    const KV::Storage* keys;  // of the layer and KV head, in slot 0
    const u32* table;
    u64 slot_stride;
    u32 values;  // from a head's keys to its values
    u32 context; // keys that the tile's last row sees
};

__device__ __forceinline__ const KV::Storage* key_at(const View& v, u32 key) {
    u32 slot = v.table[key / BLOCK_TOKENS];
    return v.keys + slot * v.slot_stride + key % BLOCK_TOKENS * HEAD_DIM;
}

#if defined(PLAIN)
// The same ownership of scores and outputs, with fused multiply-adds of single precision.
struct Queries {
    const KV::Storage* row[2];
};

__device__ __forceinline__ Queries load_queries(const KV::Storage* a, const KV::Storage* b, u32) { return Queries{{a, b}}; }

__device__ __forceinline__ void scores_of(const View& v, const Queries& q, u32 first, u32 lane, float (&s)[TILE_GROUPS][4]) {
#pragma unroll 1
    for (u32 n = 0; n < TILE_GROUPS; n++) {
#pragma unroll 1
        for (u32 i = 0; i < 4; i++) {
            u32 key = first + 8 * n + 2 * (lane % 4) + i % 2;
            const KV::Storage *k = key_at(v, key < v.context ? key : 0), *query = q.row[i / 2];
            float sum = 0.0f;
            for (u32 e = 0; query && e < HEAD_DIM; e++) sum = __fmaf_rn(KV::widen(query[e]), KV::widen(k[e]), sum);
            s[n][i] = sum;
        }
    }
}

__device__ __forceinline__ void add_values(const View& v, const float (&p)[TILE_GROUPS][4], u32 first, u32 lane, Partial& o) {
#pragma unroll 1
    for (u32 n = 0; n < TILE_GROUPS; n++) {
#pragma unroll 1
        for (u32 i = 0; i < 8; i++) {
            u32 key = first + 8 * n + i;
            float weight[2];
            for (u32 r = 0; r < 2; r++) {
                float even = SHUFFLE(p[n][2 * r], lane / 4 * 4 + i / 2), odd = SHUFFLE(p[n][2 * r + 1], lane / 4 * 4 + i / 2);
                weight[r] = i % 2 ? odd : even;
            }
            if (key >= v.context) continue;
            const KV::Storage* value = key_at(v, key) + v.values;
#pragma unroll
            for (u32 j = 0; j < OUTPUTS; j++) {
#pragma unroll
                for (u32 e = 0; e < 4; e++) {
                    float x = KV::widen(value[j / 8 * 64 + 16 * (lane % 4) + 8 * (e % 2) + j % 8]);
                    o.out[j][e] = __fmaf_rn(weight[e / 2], x, o.out[j][e]);
                }
            }
        }
    }
}
#else
// Two steps of sixteen elements for each chunk of 32: lane l % 4 holds elements 8 (l % 4) .. + 8 of the chunk.
struct Queries {
    u32 a[2 * CHUNKS][4];
};

__device__ __forceinline__ Queries load_queries(const KV::Storage* first, const KV::Storage* second, u32 lane) {
    Queries q;
    const uint4 none = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (u32 c = 0; c < CHUNKS; c++) {
        u32 at = 32 * c + 8 * (lane % 4);
        uint4 x = first ? *(const uint4*)(first + at) : none, y = second ? *(const uint4*)(second + at) : none;
        q.a[2 * c][0] = x.x, q.a[2 * c][1] = y.x, q.a[2 * c][2] = x.y, q.a[2 * c][3] = y.y;
        q.a[2 * c + 1][0] = x.z, q.a[2 * c + 1][1] = y.z, q.a[2 * c + 1][2] = x.w, q.a[2 * c + 1][3] = y.w;
    }
    return q;
}

__device__ __forceinline__ void scores_of(const View& v, const Queries& q, u32 first, u32 lane, float (&s)[TILE_GROUPS][4]) {
#pragma unroll
    for (u32 n = 0; n < TILE_GROUPS; n++) {
        u32 key = first + 8 * n + lane / 4;
        // Beyond the context any key will do: its score is masked.
        const KV::Storage* at = key_at(v, key < v.context ? key : 0) + 8 * (lane % 4);
        uint4 k[CHUNKS];
#pragma unroll
        for (u32 c = 0; c < CHUNKS; c++) k[c] = *(const uint4*)(at + 32 * c);
        s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.0f;
#pragma unroll
        for (u32 c = 0; c < CHUNKS; c++) {
            KV::product(s[n], q.a[2 * c], k[c].x, k[c].y);
            KV::product(s[n], q.a[2 * c + 1], k[c].z, k[c].w);
        }
    }
}

__device__ __forceinline__ u32 low_halves(u32 a, u32 b) { return (a & 0xffffu) | b << 16; }
__device__ __forceinline__ u32 high_halves(u32 a, u32 b) { return a >> 16 | (b & 0xffff0000u); }

__device__ __forceinline__ void add_values(const View& v, const float (&p)[TILE_GROUPS][4], u32 first, u32 lane, Partial& o) {
#pragma unroll
    for (u32 step = 0; step < TILE / 16; step++) {
        const float(&left)[4] = p[2 * step], (&right)[4] = p[2 * step + 1];
        u32 a[4] = {KV::pack(left[0], left[1]), KV::pack(left[2], left[3]), KV::pack(right[0], right[1]),
                    KV::pack(right[2], right[3])};
        // Keys 2 (l % 4), the next, and the same plus eight.
        u32 key = first + 16 * step + 2 * (lane % 4);
#pragma unroll
        for (u32 h = 0; h < HALVES; h++) {
            uint4 w[4];
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                u32 k = key + i % 2 + i / 2 * 8;
                // A weight of zero must not meet what is not a number.
                w[i] = k < v.context ? *(const uint4*)(key_at(v, k) + v.values + 64 * h + 8 * (lane / 4)) : make_uint4(0, 0, 0, 0);
            }
            const u32 words[4][4] = {{w[0].x, w[0].y, w[0].z, w[0].w},
                                     {w[1].x, w[1].y, w[1].z, w[1].w},
                                     {w[2].x, w[2].y, w[2].z, w[2].w},
                                     {w[3].x, w[3].y, w[3].z, w[3].w}};
#pragma unroll
            for (u32 j = 0; j < 4; j++) {
                KV::product(o.out[8 * h + 2 * j], a, low_halves(words[0][j], words[1][j]), low_halves(words[2][j], words[3][j]));
                KV::product(o.out[8 * h + 2 * j + 1], a, high_halves(words[0][j], words[1][j]),
                            high_halves(words[2][j], words[3][j]));
            }
        }
    }
}
#endif

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, SHUFFLE_XOR(x, 1));
    return fmaxf(x, SHUFFLE_XOR(x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
    x += SHUFFLE_XOR(x, 1);
    return x + SHUFFLE_XOR(x, 2);
}

// The partial softmax of keys `first .. first + SPLIT`. `sees[r]`: keys that each of the lane's rows sees.
__device__ __forceinline__ Partial attend_split(const View& v, const Queries& q, const u32 (&sees)[2], float scale, u32 first, u32 lane) {
    Partial o;
#pragma unroll
    for (u32 r = 0; r < 2; r++) o.max[r] = MINUS_INFINITY, o.sum[r] = 0.0f;
#pragma unroll
    for (u32 j = 0; j < OUTPUTS; j++) o.out[j][0] = o.out[j][1] = o.out[j][2] = o.out[j][3] = 0.0f;
    u32 end = first + SPLIT < v.context ? first + SPLIT : v.context;
#pragma unroll 1
    for (u32 tile = first; tile < end; tile += TILE) {
        float s[TILE_GROUPS][4];
        scores_of(v, q, tile, lane, s);
        float largest[2] = {MINUS_INFINITY, MINUS_INFINITY};
#pragma unroll
        for (u32 n = 0; n < TILE_GROUPS; n++) {
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                u32 key = tile + 8 * n + 2 * (lane % 4) + i % 2;
                s[n][i] = key < sees[i / 2] ? __fmul_rn(s[n][i], scale) : MINUS_INFINITY;
                largest[i / 2] = fmaxf(largest[i / 2], s[n][i]);
            }
        }
        float base[2];
#pragma unroll
        for (u32 r = 0; r < 2; r++) {
            float max = fmaxf(o.max[r], quad_max(largest[r]));
            // A row that has seen no key yet.
            base[r] = max == MINUS_INFINITY ? 0.0f : max;
            float fade = power_of_two(o.max[r] - base[r]);
            o.max[r] = max;
            o.sum[r] = __fmul_rn(o.sum[r], fade);
#pragma unroll
            for (u32 j = 0; j < OUTPUTS; j++) {
                o.out[j][2 * r] = __fmul_rn(o.out[j][2 * r], fade);
                o.out[j][2 * r + 1] = __fmul_rn(o.out[j][2 * r + 1], fade);
            }
        }
#pragma unroll
        for (u32 n = 0; n < TILE_GROUPS; n++) {
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                s[n][i] = power_of_two(s[n][i] - base[i / 2]);
                o.sum[i / 2] = __fadd_rn(o.sum[i / 2], s[n][i]);
            }
        }
        add_values(v, s, tile, lane, o);
    }
    // Lanes of a row have summed different keys.
#pragma unroll
    for (u32 r = 0; r < 2; r++) o.sum[r] = quad_sum(o.sum[r]);
    return o;
}

// The factors by which what was merged so far, and the next split, count. A split without keys changes nothing, to the bit.
__device__ __forceinline__ void merge_factors(float& max, float next, float& fade, float& weight) {
    float largest = fmaxf(max, next);
    fade = power_of_two(max - largest);
    weight = power_of_two(next - largest);
    max = largest;
}

__device__ __forceinline__ float merged(float sum, float fade, float next, float weight) {
    return __fmaf_rn(sum, fade, __fmul_rn(next, weight));
}

struct Rows {
    const KV::Storage* query[2];
    u32 sees[2];  // 0: the lane has no such row
};

// Row m of a tile's sixteen is head m % GROUP of query row m / GROUP.
__device__ __forceinline__ Rows rows_of(const AttentionParams& p, const Tile& tile, u32 kv_head, u32 lane) {
    Rows rows;
#pragma unroll
    for (u32 r = 0; r < 2; r++) {
        u32 m = lane / 4 + 8 * r, token = m / GROUP;
        bool there = m < TOKENS * GROUP && token < tile.rows;
        u64 head = (u64)(tile.first_row + token) * (KV_HEADS * GROUP) + kv_head * GROUP + m % GROUP;
        rows.query[r] = there ? (const KV::Storage*)p.queries + head * HEAD_DIM : 0;
        rows.sees[r] = there ? tile.first_position + token + 1 : 0;
    }
    return rows;
}

__device__ __forceinline__ View view_of(const AttentionParams& p, const Tile& tile, u32 kv_head) {
    const u64 head = BLOCK_TOKENS * HEAD_DIM, plane = KV_HEADS * head;
    const KV::Storage* keys = (const KV::Storage*)p.pool + (u64)p.layer * p.slots * 2 * plane + kv_head * head;
    return View{keys, (const u32*)p.tables + tile.start, 2 * plane, (u32)plane, tile.first_position + tile.rows};
}

// Four tiles a block; blockIdx.y is the KV head.
extern "C" __global__ void __launch_bounds__(128, 2) prefill(const AttentionParams p) {
    u32 lane = threadIdx.x % WARP, index = blockIdx.x * 4 + threadIdx.x / WARP, kv_head = blockIdx.y;
    if (index >= p.count) return;
    // The last ones of a prompt see most: they begin first.
    Tile tile = ((const Tile*)p.tiles)[p.count - 1 - index];
    Rows rows = rows_of(p, tile, kv_head, lane);
    View view = view_of(p, tile, kv_head);
    Queries queries = load_queries(rows.query[0], rows.query[1], lane);
    // What is merged so far: too much for registers beside a split of large heads. Each thread uses its own column only.
    SHARED(float, merged_out, OUTPUTS * 4 * 128);
    float max[2], sum[2];
#pragma unroll 1
    for (u32 first = 0; first < view.context; first += SPLIT) {
        Partial next = attend_split(view, queries, rows.sees, p.scale, first, lane);
        float fade[2], weight[2];
#pragma unroll
        for (u32 r = 0; r < 2; r++) {
            if (first == 0) {
                max[r] = next.max[r], sum[r] = next.sum[r];
            } else {
                merge_factors(max[r], next.max[r], fade[r], weight[r]);
                sum[r] = merged(sum[r], fade[r], next.sum[r], weight[r]);
            }
        }
#pragma unroll
        for (u32 i = 0; i < OUTPUTS * 4; i++) {
            float &so_far = merged_out[i * 128 + threadIdx.x], x = next.out[i / 4][i % 4];
            u32 r = i % 4 / 2;
            so_far = first == 0 ? x : merged(so_far, fade[r], x, weight[r]);
        }
    }
#pragma unroll
    for (u32 r = 0; r < 2; r++) {
        if (!rows.sees[r]) continue;
        ACT::Storage* out = (ACT::Storage*)p.out + (rows.query[r] - (const KV::Storage*)p.queries);
#pragma unroll
        for (u32 h = 0; h < HALVES; h++) {
#pragma unroll
            for (u32 e = 0; e < 2; e++) {
                Eight x;
#pragma unroll
                for (u32 j = 0; j < 8; j++) x.x[j] = merged_out[((8 * h + j) * 4 + 2 * r + e) * 128 + threadIdx.x] / sum[r];
                ACT::store(out + 64 * h + 16 * (lane % 4) + 8 * e, x);
            }
        }
    }
}
EXPORT(prefill, AttentionParams)

// Tiles of one row. Four splits a block; blockIdx.y is the KV head, blockIdx.z the tile.
extern "C" __global__ void __launch_bounds__(128, 2) decode(const AttentionParams p) {
    u32 lane = threadIdx.x % WARP, split = blockIdx.x * 4 + threadIdx.x / WARP, kv_head = blockIdx.y;
    Tile tile = ((const Tile*)p.tiles)[blockIdx.z];
    View view = view_of(p, tile, kv_head);
    if (split * SPLIT >= view.context) return;
    Rows rows = rows_of(p, tile, kv_head, lane);
    Queries queries = load_queries(rows.query[0], rows.query[1], lane);
    Partial o = attend_split(view, queries, rows.sees, p.scale, split * SPLIT, lane);
    u64 base = (((u64)blockIdx.z * KV_HEADS + kv_head) * p.splits + split) * GROUP;
#pragma unroll
    for (u32 r = 0; r < 2; r++) {
        if (!rows.sees[r]) continue;
        u64 row = base + lane / 4 + 8 * r;
        float* out = (float*)p.partial + row * HEAD_DIM;
        if (lane % 4 == 0) *(float2*)((float*)p.partial_ml + row * 2) = make_float2(o.max[r], o.sum[r]);
#pragma unroll
        for (u32 h = 0; h < HALVES; h++) {
#pragma unroll
            for (u32 e = 0; e < 2; e++) {
                Eight x;
#pragma unroll
                for (u32 j = 0; j < 8; j++) x.x[j] = o.out[8 * h + j][2 * r + e];
                F32::store(out + 64 * h + 16 * (lane % 4) + 8 * e, x);
            }
        }
    }
}
EXPORT(decode, AttentionParams)

// Tiles of one row. One warp for each head; blockIdx.x counts warps by four, blockIdx.y is the tile.
extern "C" __global__ void __launch_bounds__(128) merge(const AttentionParams p) {
    u32 lane = threadIdx.x % WARP, unit = blockIdx.x * 4 + threadIdx.x / WARP;
    Tile tile = ((const Tile*)p.tiles)[blockIdx.y];
    u32 kv_head = unit / GROUP, m = unit % GROUP;
    if (kv_head >= KV_HEADS) return;
    u32 context = tile.first_position + tile.rows;
    u64 row = ((u64)blockIdx.y * KV_HEADS + kv_head) * p.splits * GROUP + m;
    float max = 0.0f, sum = 0.0f, out[HEAD_DIM / WARP];
    for (u32 split = 0; split * SPLIT < context; split++, row += GROUP) {
        const float *ml = (const float*)p.partial_ml + row * 2, *next = (const float*)p.partial + row * HEAD_DIM;
        if (split == 0) {
            max = ml[0], sum = ml[1];
            for (u32 i = 0; i < HEAD_DIM / WARP; i++) out[i] = next[i * WARP + lane];
            continue;
        }
        float fade, weight;
        merge_factors(max, ml[0], fade, weight);
        sum = merged(sum, fade, ml[1], weight);
        for (u32 i = 0; i < HEAD_DIM / WARP; i++) out[i] = merged(out[i], fade, next[i * WARP + lane], weight);
    }
    u64 at = ((u64)tile.first_row * (KV_HEADS * GROUP) + unit) * HEAD_DIM;
    for (u32 i = 0; i < HEAD_DIM / WARP; i++) ((ACT::Storage*)p.out)[at + i * WARP + lane] = ACT::narrow(out[i] / sum);
}
EXPORT(merge, AttentionParams)
