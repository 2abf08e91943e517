// What every kernel file begins with: number formats, warp helpers, and the two tensor-core products.
//
// No header of CUDA is needed, so that NVRTC needs none on the host. The same text is compiled for the CPU by the
// emulator, which defines CAIRN_EMULATED and brings its own versions of what is under #else below. Constants that a model
// decides (HEAD_DIM, KV_HEADS, GROUP, BLOCK_TOKENS, KV, WIRE, ACT) come as definitions on the command line.
//
// Sums have one fixed order that does not depend on how many rows, blocks or splits are computed together. Where two kernels
// must agree to the bit (prefill and decode attention), they share the function, and fused products are written out.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define WARP 32
#define MINUS_INFINITY __uint_as_float(0xff800000u)

#ifndef CAIRN_EMULATED
// A kernel takes one struct; EXPORT tells the emulator of it.
#define EXPORT(name, params)
#define SHARED(type, name, count) __shared__ type name[count]
#define ALL_LANES 0xffffffffu
#define BLOCK_BARRIER() __syncthreads()
#define SHUFFLE_XOR(value, mask) __shfl_xor_sync(ALL_LANES, value, mask)
#define SHUFFLE(value, lane) __shfl_sync(ALL_LANES, value, lane)
#define SHUFFLE_UP(value, by) __shfl_up_sync(ALL_LANES, value, by)

// 2^x; -inf gives 0 and 0 gives 1 exactly.
__device__ __forceinline__ float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ u32 pack_bf16(float low, float high) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

__device__ __forceinline__ u16 float_to_f16(float x) {
    u16 r;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(x));
    return r;
}

__device__ __forceinline__ float f16_to_float(u16 x) {
    float r;
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(x));
    return r;
}

// d += a * b for a 16 x 16 (row major), b 16 x 8 (column major), in the register layout of mma.sync.m16n8k16.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_f16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

// Eight elements at a time, widened to single precision: the unit in which all memory is read and written.
struct Eight {
    float x[8];
};

struct F32 {
    typedef float Storage;
    static __device__ __forceinline__ float widen(float x) { return x; }
    static __device__ __forceinline__ float narrow(float x) { return x; }
    static __device__ __forceinline__ float narrow_finite(float x) { return x; }
    static __device__ __forceinline__ Eight load(const float* at) {
        float4 a = *(const float4*)at, b = *(const float4*)(at + 4);
        return Eight{{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
    }
    static __device__ __forceinline__ void store(float* at, const Eight& v) {
        *(float4*)at = make_float4(v.x[0], v.x[1], v.x[2], v.x[3]);
        *(float4*)(at + 4) = make_float4(v.x[4], v.x[5], v.x[6], v.x[7]);
    }
};

struct Bf16 {
    typedef u16 Storage;
    static __device__ __forceinline__ float widen(u16 x) { return __uint_as_float((u32)x << 16); }
    static __device__ __forceinline__ u16 narrow(float x) { return (u16)pack_bf16(x, 0.0f); }
    static __device__ __forceinline__ u16 narrow_finite(float x) { return narrow(x); }
    static __device__ __forceinline__ u32 pack(float low, float high) { return pack_bf16(low, high); }
    static __device__ __forceinline__ void product(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) { mma_bf16(d, a, b0, b1); }
    static __device__ __forceinline__ Eight load(const u16* at) {
        uint4 v = *(const uint4*)at;
        u32 words[4] = {v.x, v.y, v.z, v.w};
        Eight r;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            r.x[2 * i] = __uint_as_float(words[i] << 16);
            r.x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
        }
        return r;
    }
    static __device__ __forceinline__ void store(u16* at, const Eight& v) {
        *(uint4*)at = make_uint4(pack_bf16(v.x[0], v.x[1]), pack_bf16(v.x[2], v.x[3]), pack_bf16(v.x[4], v.x[5]),
                                 pack_bf16(v.x[6], v.x[7]));
    }
};

struct F16 {
    typedef u16 Storage;
    static __device__ __forceinline__ float widen(u16 x) { return f16_to_float(x); }
    static __device__ __forceinline__ u16 narrow(float x) { return float_to_f16(x); }
    // Without infinities: what a row stores must not spoil others, whose weights of it are zero.
    static __device__ __forceinline__ u16 narrow_finite(float x) { return float_to_f16(fminf(fmaxf(x, -65504.0f), 65504.0f)); }
    static __device__ __forceinline__ u32 pack(float low, float high) {
        return (u32)float_to_f16(low) | (u32)float_to_f16(high) << 16;
    }
    static __device__ __forceinline__ void product(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) { mma_f16(d, a, b0, b1); }
    static __device__ __forceinline__ Eight load(const u16* at) {
        uint4 v = *(const uint4*)at;
        u32 words[4] = {v.x, v.y, v.z, v.w};
        Eight r;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            r.x[2 * i] = f16_to_float((u16)words[i]);
            r.x[2 * i + 1] = f16_to_float((u16)(words[i] >> 16));
        }
        return r;
    }
    static __device__ __forceinline__ void store(u16* at, const Eight& v) {
        *(uint4*)at = make_uint4(pack(v.x[0], v.x[1]), pack(v.x[2], v.x[3]), pack(v.x[4], v.x[5]), pack(v.x[6], v.x[7]));
    }
};

// Eight bits: sign, four of exponent (bias 7), three of mantissa; no infinities, 448 is the largest (OCP FP8, "E4M3").
// In software, because the conversion instructions begin with sm_89 and bits must not depend on the card.
struct E4m3 {
    typedef u8 Storage;
    static __device__ __forceinline__ float widen(u8 x) {
        u32 exponent = x >> 3 & 15, mantissa = x & 7;
        float magnitude = exponent == 0 ? (float)mantissa * 0.001953125f  // 2^-9
                                        : __uint_as_float((exponent + 120) << 23 | mantissa << 20);
        if ((x & 127) == 127) magnitude = __uint_as_float(0x7fc00000u);
        return x & 128 ? -magnitude : magnitude;
    }
    // To the nearest, ties to even; what is larger than 448 becomes 448.
    static __device__ __forceinline__ u8 narrow(float x) {
        u32 bits = __float_as_uint(x), sign = bits >> 24 & 128;
        float magnitude = __uint_as_float(bits & 0x7fffffffu);
        if (!(magnitude <= 3.0e38f)) return (u8)(sign | (magnitude != magnitude ? 127 : 126));
        if (magnitude < 0.015625f) {  // 2^-6: below the normal numbers, steps of 2^-9
            return (u8)(sign | (u32)__float2int_rn(magnitude * 512.0f));
        }
        u32 rounded = (bits & 0x7fffffffu) + 0x7ffffu + (bits >> 20 & 1);
        u32 code = (rounded >> 20) - (120u << 3);
        return (u8)(sign | (code > 126 ? 126 : code));
    }
    static __device__ __forceinline__ Eight load(const u8* at) {
        uint2 v = *(const uint2*)at;
        Eight r;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            r.x[i] = widen((u8)(v.x >> 8 * i));
            r.x[4 + i] = widen((u8)(v.y >> 8 * i));
        }
        return r;
    }
    static __device__ __forceinline__ void store(u8* at, const Eight& v) {
        uint2 packed = make_uint2(0, 0);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            packed.x |= (u32)narrow(v.x[i]) << 8 * i;
            packed.y |= (u32)narrow(v.x[4 + i]) << 8 * i;
        }
        *(uint2*)at = packed;
    }
};

template <class A, class B> struct Same { static const bool value = false; };
template <class A> struct Same<A, A> { static const bool value = true; };

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int mask = WARP / 2; mask > 0; mask /= 2) x += SHUFFLE_XOR(x, mask);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int mask = WARP / 2; mask > 0; mask /= 2) x = fmaxf(x, SHUFFLE_XOR(x, mask));
    return x;
}

// The sum over a block, in every thread. `partial` holds one float for each warp; all threads must call.
__device__ __forceinline__ float block_sum(float x, float* partial) {
    x = warp_sum(x);
    BLOCK_BARRIER();
    if (threadIdx.x % WARP == 0) partial[threadIdx.x / WARP] = x;
    BLOCK_BARRIER();
    float sum = 0.0f;
    for (u32 i = 0; i < blockDim.x / WARP; i++) sum += partial[i];
    return sum;
}

__device__ __forceinline__ float block_max(float x, float* partial) {
    x = warp_max(x);
    BLOCK_BARRIER();
    if (threadIdx.x % WARP == 0) partial[threadIdx.x / WARP] = x;
    BLOCK_BARRIER();
    float largest = partial[0];
    for (u32 i = 1; i < blockDim.x / WARP; i++) largest = fmaxf(largest, partial[i]);
    return largest;
}
