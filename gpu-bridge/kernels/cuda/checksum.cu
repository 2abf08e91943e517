// Checksums of blocks where they are on the device: XXH3 with 128 bits and a seed for each block, as its specification has it for inputs
// of more than 240 bytes (Yann Collet, xxHash, doc/xxhash_spec.md). Between two scrambles of the state its sums do not depend on it, so all
// of them are made at once, as fast as memory is read; what is left is a short chain of scrambles for each block.

struct ChecksumBlock {
    u64 offset;  // of its first byte in the data: a multiple of 16
    u64 seed;
};

struct ChecksumParams {
    u64 data;    // the blocks' memory
    u64 blocks;  // ChecksumBlock [count]
    u64 sums;    // u64 [count][chunks][8], from the first kernel to the second
    u64 out;     // u64 [count][2], the lower half first
    u64 bytes;   // of each block: more than 240, and a multiple of 16
    u32 count;
    u32 chunks;  // (bytes - 1) / CHUNK_BYTES: the state is scrambled after each
};

#define CHUNK_BYTES 1024
#define STRIPE_BYTES 64
#define CHUNK_STRIPES 16
#define SECRET_WORDS 24
#define SUM_THREADS 256
#define CHUNKS_AT_ONCE (SUM_THREADS / WARP)

#define PRIME32_1 0x9e3779b1ull
#define PRIME32_2 0x85ebca77ull
#define PRIME32_3 0xc2b2ae3dull
#define PRIME64_1 0x9e3779b185ebca87ull
#define PRIME64_2 0xc2b2ae3d27d4eb4full
#define PRIME64_3 0x165667b19e3779f9ull
#define PRIME64_4 0x85ebca77c2b2ae63ull
#define PRIME64_5 0x27d4eb2f165667c5ull

// The default secret, as words; a seed is added to every first and taken from every second one.
__device__ __forceinline__ u64 secret_word(u32 word, u64 seed) {
    static const u64 secret[SECRET_WORDS] = {
        0xbe4ba423396cfeb8ull, 0x1cad21f72c81017cull, 0xdb979083e96dd4deull, 0x1f67b3b7a4a44072ull, 0x78e5c0cc4ee679cbull,
        0x2172ffcc7dd05a82ull, 0x8e2443f7744608b8ull, 0x4c263a81e69035e0ull, 0xcb00c391bb52283cull, 0xa32e531b8b65d088ull,
        0x4ef90da297486471ull, 0xd8acdea946ef1938ull, 0x3f349ce33f76faa8ull, 0x1d4f0bc7c7bbdcf9ull, 0x3159b4cd4be0518aull,
        0x647378d9c97e9fc8ull, 0xc3ebd33483acc5eaull, 0xeb6313faffa081c5ull, 0x49daf0b751dd0d17ull, 0x9e68d429265516d3ull,
        0xfca1477d58be162bull, 0xce31d07ad1b8f88full, 0x280416958f3acb45ull, 0x7e404bbbcafbd7afull,
    };
    return word % 2 == 0 ? secret[word] + seed : secret[word] - seed;
}

__device__ __forceinline__ u64 halves_product(u64 x) { return (x & 0xffffffffull) * (x >> 32); }

__device__ __forceinline__ u64 joined(u32 low, u32 high) { return (u64)high << 32 | low; }

// Eight bytes of the secret from any of its bytes on.
__device__ __forceinline__ u64 secret_from(const u64* secret, u32 byte) {
    u32 word = byte / 8, shift = byte % 8 * 8;
    return shift == 0 ? secret[word] : secret[word] >> shift | secret[word + 1] << (64 - shift);
}

// One warp for each chunk: four pairs of accumulators, and every eighth stripe for each of their threads.
extern "C" __global__ void __launch_bounds__(SUM_THREADS) checksum_sums(const ChecksumParams p) {
    SHARED(u64, secret, SECRET_WORDS);
    const ChecksumBlock block = ((const ChecksumBlock*)p.blocks)[blockIdx.y];
    if (threadIdx.x < SECRET_WORDS) secret[threadIdx.x] = secret_word(threadIdx.x, block.seed);
    BLOCK_BARRIER();
    u32 chunk = blockIdx.x * CHUNKS_AT_ONCE + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (chunk >= p.chunks) return;
    u32 pair = lane % 4, first = lane / 4;
    const uint4* data = (const uint4*)(p.data + block.offset + (u64)chunk * CHUNK_BYTES);
    u64 even = 0, odd = 0;
#pragma unroll
    for (u32 stripe = first; stripe < CHUNK_STRIPES; stripe += WARP / 4) {
        uint4 words = data[stripe * (STRIPE_BYTES / 16) + pair];
        u64 a = joined(words.x, words.y), b = joined(words.z, words.w);
        even += b + halves_product(a ^ secret[stripe + 2 * pair]);
        odd += a + halves_product(b ^ secret[stripe + 2 * pair + 1]);
    }
#pragma unroll
    for (int mask = 4; mask < WARP; mask *= 2) {
        even += SHUFFLE_XOR(even, mask);
        odd += SHUFFLE_XOR(odd, mask);
    }
    u64* sums = (u64*)p.sums + ((u64)blockIdx.y * p.chunks + chunk) * 8;
    if (first == 0) sums[2 * pair] = even, sums[2 * pair + 1] = odd;
}
EXPORT(checksum_sums, ChecksumParams)

__device__ __forceinline__ u64 first_state(u32 lane) {
    static const u64 state[8] = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1};
    return state[lane];
}

__device__ __forceinline__ u64 merged(const u64* state, const u64* secret, u32 from, u64 result) {
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        u64 a = state[2 * i] ^ secret_from(secret, from + 16 * i), b = state[2 * i + 1] ^ secret_from(secret, from + 16 * i + 8);
        result += a * b ^ __umul64hi(a, b);
    }
    result ^= result >> 37;
    result *= 0x165667919e3779f9ull;
    return result ^ result >> 32;
}

// One warp for each block; eight of its threads would do, the others repeat what they do.
extern "C" __global__ void __launch_bounds__(WARP) checksum_chain(const ChecksumParams p) {
    SHARED(u64, secret, SECRET_WORDS);
    SHARED(u64, state, 8);
    const ChecksumBlock block = ((const ChecksumBlock*)p.blocks)[blockIdx.x];
    if (threadIdx.x < SECRET_WORDS) secret[threadIdx.x] = secret_word(threadIdx.x, block.seed);
    BLOCK_BARRIER();
    u32 lane = threadIdx.x % 8;
    u64 sum = first_state(lane), key = secret[CHUNK_STRIPES + lane];
    const u64* sums = (const u64*)p.sums + (u64)blockIdx.x * p.chunks * 8 + lane;
    // The sums do not wait for the chain: many of them are read ahead.
#pragma unroll 16
    for (u32 chunk = 0; chunk < p.chunks; chunk++) {
        sum += sums[(u64)chunk * 8];
        sum = (sum ^ sum >> 47 ^ key) * PRIME32_1;
    }
    const u64* data = (const u64*)(p.data + block.offset);
    u64 done = (u64)p.chunks * CHUNK_BYTES;
    u32 stripes = (u32)((p.bytes - 1 - done) / STRIPE_BYTES);
    for (u32 stripe = 0; stripe < stripes; stripe++) {
        const u64* at = data + done / 8 + stripe * (STRIPE_BYTES / 8);
        sum += at[lane ^ 1] + halves_product(at[lane] ^ secret[stripe + lane]);
    }
    const u64* last = data + (p.bytes - STRIPE_BYTES) / 8;
    sum += last[lane ^ 1] + halves_product(last[lane] ^ secret_from(secret, SECRET_WORDS * 8 - STRIPE_BYTES - 7 + 8 * lane));
    if (threadIdx.x < 8) state[lane] = sum;
    BLOCK_BARRIER();
    u64* out = (u64*)p.out + (u64)blockIdx.x * 2;
    if (threadIdx.x == 0) out[0] = merged(state, secret, 11, p.bytes * PRIME64_1);
    if (threadIdx.x == 1) out[1] = merged(state, secret, SECRET_WORDS * 8 - STRIPE_BYTES - 11, ~(p.bytes * PRIME64_2));
}
EXPORT(checksum_chain, ChecksumParams)
