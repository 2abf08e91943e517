// Copies between canonical blocks and the paged pool, with a cast on the way where their number formats differ.
//
// Canonical block: [layer][key, value][token][KV head][element]; in E4M3 followed by one float scale for each layer, side (key
// or value) and head. Pool: [layer][slot][key, value][KV head][token][element]. One warp moves one (block, layer, side, head) at a
// time, eight elements a lane and step. Definitions: WIRE, KV, KV_HEADS, HEAD_DIM, BLOCK_TOKENS.

// One block: where it is in the staging memory (bytes), and its slot in the pool.
struct BlockMove {
    u64 staging_offset;
    u64 slot;
};

// Staging may be memory of the host that the device reaches.
struct MoveParams {
    u64 staging;
    u64 pool;
    u64 moves;
    u32 count;
    u32 slots;
    u32 first_layer;
    u32 layers;
    u32 all_layers;
    u32 padding;
};

#define UNITS (BLOCK_TOKENS * HEAD_DIM / 8)
#define STEPS ((UNITS + WARP - 1) / WARP)
#define PLANE (KV_HEADS * HEAD_DIM * BLOCK_TOKENS)

// Steps whose loads are all issued before the first store.
#define AHEAD (STEPS < 8 ? STEPS : 8)

struct Place {
    WIRE::Storage* canonical;  // of this head, first token
    KV::Storage* pooled;
    float* scale;  // E4M3 only
};

__device__ __forceinline__ Place place(const MoveParams& p, u32 task) {
    u32 head = task % KV_HEADS, rest = task / KV_HEADS;
    u32 side = rest % 2, layer = p.first_layer + rest / 2 % p.layers;
    BlockMove move = ((const BlockMove*)p.moves)[rest / 2 / p.layers];
    u64 plane = (u64)layer * 2 + side;
    WIRE::Storage* block = (WIRE::Storage*)(p.staging + move.staging_offset);
    float* scales = (float*)(block + (u64)p.all_layers * 2 * PLANE);
    KV::Storage* slot = (KV::Storage*)p.pool + ((u64)layer * p.slots + move.slot) * 2 * PLANE + side * PLANE;
    return Place{block + plane * PLANE + head * HEAD_DIM, slot + head * BLOCK_TOKENS * HEAD_DIM, scales + plane * KV_HEADS + head};
}

// Where unit `u` of a head is in a canonical plane, in elements from the head's first token.
__device__ __forceinline__ u32 canonical_at(u32 u) {
    return u / (HEAD_DIM / 8) * (KV_HEADS * HEAD_DIM) + u % (HEAD_DIM / 8) * 8;
}

__device__ __forceinline__ u32 tasks(const MoveParams& p) { return p.count * p.layers * 2 * KV_HEADS; }
__device__ __forceinline__ u32 first_task() { return (blockIdx.x * blockDim.x + threadIdx.x) / WARP; }
__device__ __forceinline__ u32 task_step() { return gridDim.x * blockDim.x / WARP; }

// Eight elements on their way from format A to format B; as they are where the formats are one, so that no bit changes, not even of what is not a
// number.
template <class A, class B> struct Passing {
    Eight values;
    __device__ __forceinline__ void load(const typename A::Storage* at) { values = A::load(at); }
    __device__ __forceinline__ void store(typename B::Storage* at, float factor) {
        if (Same<A, E4m3>::value || Same<B, E4m3>::value) {
#pragma unroll
            for (int j = 0; j < 8; j++) values.x[j] *= factor;
        }
        B::store(at, values);
    }
};

template <class A> struct Passing<A, A> {
    uint4 words[sizeof(typename A::Storage) / 2];
    __device__ __forceinline__ void load(const typename A::Storage* at) {
#pragma unroll
        for (u32 i = 0; i < sizeof(words) / 16; i++) words[i] = ((const uint4*)at)[i];
    }
    __device__ __forceinline__ void store(typename A::Storage* at, float) {
#pragma unroll
        for (u32 i = 0; i < sizeof(words) / 16; i++) ((uint4*)at)[i] = words[i];
    }
};

extern "C" __global__ void __launch_bounds__(256) scatter(const MoveParams p) {
    u32 lane = threadIdx.x % WARP;
    for (u32 task = first_task(); task < tasks(p); task += task_step()) {
        Place at = place(p, task);
        float scale = Same<WIRE, E4m3>::value ? *at.scale : 1.0f;
        for (u32 begin = 0; begin < STEPS; begin += AHEAD) {
            Passing<WIRE, KV> values[AHEAD];
#pragma unroll
            for (u32 i = 0; i < AHEAD; i++) {
                u32 u = (begin + i) * WARP + lane;
                if (u < UNITS) values[i].load(at.canonical + canonical_at(u));
            }
#pragma unroll
            for (u32 i = 0; i < AHEAD; i++) {
                u32 u = (begin + i) * WARP + lane;
                if (u < UNITS) values[i].store(at.pooled + u * 8, scale);
            }
        }
    }
}
EXPORT(scatter, MoveParams)

extern "C" __global__ void __launch_bounds__(256) gather(const MoveParams p) {
    u32 lane = threadIdx.x % WARP;
    for (u32 task = first_task(); task < tasks(p); task += task_step()) {
        Place at = place(p, task);
        float factor = 1.0f;
        if (Same<WIRE, E4m3>::value) {
            // The largest number of a head becomes the largest of the format.
            float largest = 0.0f;
            for (u32 u = lane; u < UNITS; u += WARP) {
                Eight value = KV::load(at.pooled + u * 8);
#pragma unroll
                for (int j = 0; j < 8; j++) largest = fmaxf(largest, fabsf(value.x[j]));
            }
            largest = warp_max(largest);
            float scale = largest > 0.0f ? largest / 448.0f : 1.0f;
            factor = 1.0f / scale;
            if (lane == 0) *at.scale = scale;
        }
        for (u32 begin = 0; begin < STEPS; begin += AHEAD) {
            Passing<KV, WIRE> values[AHEAD];
#pragma unroll
            for (u32 i = 0; i < AHEAD; i++) {
                u32 u = (begin + i) * WARP + lane;
                if (u < UNITS) values[i].load(at.pooled + u * 8);
            }
#pragma unroll
            for (u32 i = 0; i < AHEAD; i++) {
                u32 u = (begin + i) * WARP + lane;
                if (u < UNITS) values[i].store(at.canonical + canonical_at(u), factor);
            }
        }
    }
}
EXPORT(gather, MoveParams)
