// From logits to tokens: one block a row.

struct SampleParams {
    u64 logits;    // f32 [rows][width]
    u64 settings;  // f32 [rows][temperature, top_p, uniform in [0, 1)]; a temperature of 0 takes the largest
    u64 out;       // u32 [rows]
    u32 width;
    u32 padding;
};

#define SAMPLE_THREADS 512
#define SAMPLE_WARPS (SAMPLE_THREADS / WARP)

// The largest logit's id; the lower id where there are several.
__device__ __forceinline__ u32 largest_of(const float* logits, u32 width, float* values, u32* ids) {
    float best = MINUS_INFINITY;
    u32 id = 0xffffffffu;
    for (u32 i = threadIdx.x; i < width; i += blockDim.x) {
        if (logits[i] > best || id == 0xffffffffu) best = logits[i], id = i;
    }
#pragma unroll
    for (int mask = WARP / 2; mask > 0; mask /= 2) {
        float other = SHUFFLE_XOR(best, mask);
        u32 other_id = SHUFFLE_XOR(id, mask);
        if (other > best || (other == best && other_id < id)) best = other, id = other_id;
    }
    BLOCK_BARRIER();
    if (threadIdx.x % WARP == 0) values[threadIdx.x / WARP] = best, ids[threadIdx.x / WARP] = id;
    BLOCK_BARRIER();
    for (u32 i = 0; i < SAMPLE_WARPS; i++) {
        if (values[i] > best || (values[i] == best && ids[i] < id)) best = values[i], id = ids[i];
    }
    // Where nothing is a number nothing is larger: then some id that exists.
    return id < width ? id : 0;
}

__device__ __forceinline__ float weight_of(float logit, float max, float slope) { return power_of_two((logit - max) * slope); }

// The sum of the weights that are at least `least`.
__device__ __forceinline__ float mass(const float* logits, u32 width, float max, float slope, float least, float* partial) {
    float sum = 0.0f;
    for (u32 i = threadIdx.x; i < width; i += blockDim.x) {
        float weight = weight_of(logits[i], max, slope);
        if (weight >= least) sum += weight;
    }
    return block_sum(sum, partial);
}

// Nucleus sampling (Holtzman et al. 2020): the most likely tokens that together have probability top_p are in play, found by halving the
// interval of the least weight that counts (weights are positive floats, whose order is that of their bits); then the token at
// which the weights in play, summed in the order of ids, pass the drawn share.
extern "C" __global__ void __launch_bounds__(SAMPLE_THREADS) sample(const SampleParams p) {
    SHARED(float, partial, SAMPLE_WARPS);
    SHARED(u32, ids, SAMPLE_WARPS);
    const float* logits = (const float*)p.logits + (u64)blockIdx.x * p.width;
    const float* settings = (const float*)p.settings + blockIdx.x * 3;
    u32* out = (u32*)p.out + blockIdx.x;
    u32 best = largest_of(logits, p.width, partial, ids);
    if (!(settings[0] > 0.0f)) {
        if (threadIdx.x == 0) *out = best;
        return;
    }
    float max = logits[best], slope = 1.44269504f / settings[0];
    bool all = settings[1] >= 1.0f;
    float wanted = all ? 0.0f : mass(logits, p.width, max, slope, 0.0f, partial) * fmaxf(settings[1], 0.0f);
    // 0 and 1: the largest weight is 1. Where all are in play that is every normal number.
    u32 low = all ? 0x00800000u : 0u, high = all ? low + 1 : 0x3f800000u;
    while (high - low > 1) {
        u32 middle = low + (high - low) / 2;
        if (mass(logits, p.width, max, slope, __uint_as_float(middle), partial) >= wanted) low = middle;
        else high = middle;
    }
    // `high` may be enough on its own only where it is 1.
    float least = __uint_as_float(low);
    if (high == 0x3f800000u && mass(logits, p.width, max, slope, 1.0f, partial) >= wanted) least = 1.0f;
    float target = mass(logits, p.width, max, slope, least, partial) * settings[2], before = 0.0f;
    u32 last = best;
    for (u32 begin = 0; begin < p.width; begin += blockDim.x) {
        u32 id = begin + threadIdx.x, lane = threadIdx.x % WARP;
        float weight = id < p.width ? weight_of(logits[id], max, slope) : 0.0f;
        bool counts = id < p.width && weight >= least;
        float sum = counts ? weight : 0.0f;
#pragma unroll
        for (u32 by = 1; by < WARP; by *= 2) {
            float left = SHUFFLE_UP(sum, by);
            if (lane >= by) sum += left;
        }
        BLOCK_BARRIER();
        if (lane == WARP - 1) partial[threadIdx.x / WARP] = sum;
        if (threadIdx.x < SAMPLE_WARPS) ids[threadIdx.x] = 0xffffffffu;
        BLOCK_BARRIER();
        float total = before;
        for (u32 i = 0; i < SAMPLE_WARPS; i++) {
            if (i == threadIdx.x / WARP) sum += total;
            total += partial[i];
        }
        // The first id in each warp that passes the target, then the first warp.
        u32 passed = counts && sum > target ? id : 0xffffffffu, highest = counts ? id : 0u;
#pragma unroll
        for (int mask = WARP / 2; mask > 0; mask /= 2) {
            u32 other = SHUFFLE_XOR(passed, mask);
            passed = other < passed ? other : passed;
            other = SHUFFLE_XOR(highest, mask);
            highest = other > highest ? other : highest;
        }
        if (lane == 0) ids[threadIdx.x / WARP] = passed;
        BLOCK_BARRIER();
        u32 found = 0xffffffffu;
        for (u32 i = 0; i < SAMPLE_WARPS; i++) found = ids[i] < found ? ids[i] : found;
        if (found != 0xffffffffu) {
            if (threadIdx.x == 0) *out = found;
            return;
        }
        // Rounding may leave the target just beyond the last weight: then the last one that counts.
        BLOCK_BARRIER();
        if (lane == 0) ids[threadIdx.x / WARP] = highest;
        BLOCK_BARRIER();
        for (u32 i = 0; i < SAMPLE_WARPS; i++) last = ids[i] > last ? ids[i] : last;
        before = total;
    }
    if (threadIdx.x == 0) *out = last;
}
EXPORT(sample, SampleParams)
