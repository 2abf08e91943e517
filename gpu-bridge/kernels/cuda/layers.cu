// Everything of a layer but its matrix products and its attention. Definitions: ACT (format of what goes into a matrix product),
// KV, HEAD_DIM, BLOCK_TOKENS.

struct EmbedParams {
    u64 table;   // ACT [vocabulary][width]
    u64 tokens;  // u32 [rows]
    u64 out;     // f32 [rows][width]
    u32 rows;
    u32 width;   // a multiple of 8
};

extern "C" __global__ void __launch_bounds__(128) embed(const EmbedParams p) {
    u32 token = ((const u32*)p.tokens)[blockIdx.x];
    const ACT::Storage* from = (const ACT::Storage*)p.table + (u64)token * p.width;
    float* to = (float*)p.out + (u64)blockIdx.x * p.width;
    for (u32 i = threadIdx.x * 8; i < p.width; i += blockDim.x * 8) F32::store(to + i, ACT::load(from + i));
}
EXPORT(embed, EmbedParams)

// x += delta (where there is one); out = x / rms(x) * weight, with rms(x) = sqrt(mean(x^2) + epsilon). Row r of the output is
// row `chosen[r]` of x, or r where nothing is chosen. Zhang and Sennrich 2019.
struct NormParams {
    u64 x;       // f32 [..][width]
    u64 delta;   // f32, like x, or 0
    u64 weight;  // f32 [width]
    u64 chosen;  // u32 [rows], or 0
    u64 out;     // ACT [rows][width]
    u32 width;   // a multiple of 8
    float epsilon;
};

extern "C" __global__ void __launch_bounds__(256) rms_norm(const NormParams p) {
    SHARED(float, partial, 8);
    u32 row = p.chosen ? ((const u32*)p.chosen)[blockIdx.x] : blockIdx.x;
    float* x = (float*)p.x + (u64)row * p.width;
    const float* delta = (const float*)p.delta + (u64)row * p.width;
    float sum = 0.0f;
    for (u32 i = threadIdx.x * 8; i < p.width; i += blockDim.x * 8) {
        Eight v = F32::load(x + i);
        if (p.delta) {
            Eight more = F32::load(delta + i);
#pragma unroll
            for (int j = 0; j < 8; j++) v.x[j] += more.x[j];
            F32::store(x + i, v);
        }
#pragma unroll
        for (int j = 0; j < 8; j++) sum = __fmaf_rn(v.x[j], v.x[j], sum);
    }
    float scale = 1.0f / sqrtf(block_sum(sum, partial) / (float)p.width + p.epsilon);
    ACT::Storage* out = (ACT::Storage*)p.out + (u64)blockIdx.x * p.width;
    for (u32 i = threadIdx.x * 8; i < p.width; i += blockDim.x * 8) {
        Eight v = F32::load(x + i), weight = F32::load((const float*)p.weight + i);
#pragma unroll
        for (int j = 0; j < 8; j++) v.x[j] = v.x[j] * scale * weight.x[j];
        ACT::store(out + i, v);
    }
}
EXPORT(rms_norm, NormParams)

// Biases, norms of heads (Qwen3) and rotary positions (Su et al. 2021, halves paired) of the rows of one product; queries go to
// a buffer, keys and values into the pool. One warp a head.
struct RotateParams {
    u64 qkv;        // f32 [rows][heads + 2 * kv_heads][HEAD_DIM]
    u64 bias;       // f32 [heads + 2 * kv_heads][HEAD_DIM], or 0
    u64 query_norm; // f32 [HEAD_DIM], or 0
    u64 key_norm;   // f32 [HEAD_DIM], or 0
    u64 rope;       // f32 [positions][cosines HEAD_DIM / 2, sines HEAD_DIM / 2]
    u64 positions;  // u32 [rows]
    u64 tables;     // u32: slots of sequences
    u64 starts;     // u32 [rows]: where in `tables` the row's sequence begins
    u64 queries;    // KV [rows][heads][HEAD_DIM]
    u64 pool;
    u32 rows;
    u32 heads;
    u32 kv_heads;
    u32 layer;
    u32 slots;
    float epsilon;
};

extern "C" __global__ void __launch_bounds__(256) rotate(const RotateParams p) {
    const u32 half = HEAD_DIM / 2, lane = threadIdx.x % WARP;
    u32 all = p.heads + 2 * p.kv_heads, task = (blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    if (task >= p.rows * all) return;
    u32 row = task / all, head = task % all;
    bool query = head < p.heads, value = head >= p.heads + p.kv_heads;
    const float* from = (const float*)p.qkv + (u64)task * HEAD_DIM;
    const float* bias = (const float*)p.bias + head * HEAD_DIM;
    const float* weight = (const float*)(query ? p.query_norm : p.key_norm);
    u32 position = ((const u32*)p.positions)[row];

    KV::Storage* to = (KV::Storage*)p.queries + ((u64)row * p.heads + head) * HEAD_DIM;
    if (!query) {
        u32 start = ((const u32*)p.starts)[row];
        u32 slot = ((const u32*)p.tables)[start + position / BLOCK_TOKENS];
        u32 kv_head = value ? head - p.heads - p.kv_heads : head - p.heads;
        u64 plane = (u64)p.kv_heads * BLOCK_TOKENS * HEAD_DIM;
        to = (KV::Storage*)p.pool + (((u64)p.layer * p.slots + slot) * 2 + (value ? 1 : 0)) * plane +
             (kv_head * BLOCK_TOKENS + position % BLOCK_TOKENS) * HEAD_DIM;
    }
    float scale = 1.0f;
    bool normed = weight && !value;
    if (normed) {
        float sum = 0.0f;
        for (u32 i = lane; i < HEAD_DIM; i += WARP) {
            float x = from[i] + (p.bias ? bias[i] : 0.0f);
            sum = __fmaf_rn(x, x, sum);
        }
        scale = 1.0f / sqrtf(warp_sum(sum) / (float)HEAD_DIM + p.epsilon);
    }
    const float* turn = (const float*)p.rope + (u64)position * HEAD_DIM;
    for (u32 i = lane; i < half; i += WARP) {
        float a = from[i], b = from[i + half];
        if (p.bias) {
            a += bias[i];
            b += bias[i + half];
        }
        if (normed) {
            a = a * scale * weight[i];
            b = b * scale * weight[i + half];
        }
        if (!value) {
            float cosine = turn[i], sine = turn[i + half];
            float left = __fmaf_rn(a, cosine, -__fmul_rn(b, sine)), right = __fmaf_rn(b, cosine, __fmul_rn(a, sine));
            a = left;
            b = right;
        }
        to[i] = KV::narrow_finite(a);
        to[i + half] = KV::narrow_finite(b);
    }
}
EXPORT(rotate, RotateParams)

// out = silu(gate) * up for rows that hold the gates and then the ups; silu(x) = x / (1 + e^-x). Shazeer 2020.
struct GateParams {
    u64 gate_up;  // f32 [rows][2 * width]
    u64 out;      // ACT [rows][width]
    u32 rows;
    u32 width;    // a multiple of 8
};

extern "C" __global__ void __launch_bounds__(256) gate(const GateParams p) {
    u64 units = (u64)p.rows * (p.width / 8), step = (u64)gridDim.x * blockDim.x;
    for (u64 u = (u64)blockIdx.x * blockDim.x + threadIdx.x; u < units; u += step) {
        u64 row = u / (p.width / 8), at = u % (p.width / 8) * 8;
        const float* from = (const float*)p.gate_up + row * 2 * p.width + at;
        Eight x = F32::load(from), up = F32::load(from + p.width);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            // Below -87 the result is 0 in single precision anyway; e^x stays finite.
            float e = power_of_two(fminf(-x.x[j], 87.0f) * 1.44269504f);
            x.x[j] = x.x[j] / (1.0f + e) * up.x[j];
        }
        ACT::store((ACT::Storage*)p.out + row * p.width + at, x);
    }
}
EXPORT(gate, GateParams)
