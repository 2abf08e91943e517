// Runs a kernel on the CPU: every thread of a block is a fiber, and what CUDA leaves open is made as unkind as it may be.
//
// Included before the source of a kernel file that is compiled as C++. The order of warps, and of lanes within a warp, is drawn anew
// for each block and after each barrier; shared memory starts as NaN; a barrier or a warp-wide operation that not all
// threads reach at the same line fails the launch, as does one that threads have ended before.
//
// Not emulated: timing, caches, instruction-level races inside one warp, and registers (see the compile check for those).

#pragma once
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <sys/mman.h>
#include <ucontext.h>
#include <utility>
#include <vector>

#define CAIRN_EMULATED 1
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace {
namespace emulated {

constexpr unsigned LANES = 32;
constexpr unsigned MOST_THREADS = 1024;
constexpr size_t STACK_BYTES = 128 << 10;
constexpr size_t SHARED_BYTES = 48 << 10;

struct Index {
    unsigned x, y, z;
};

enum class State { Ready, AtBarrier, AtExchange, Done };

struct Fiber {
    jmp_buf context;
    bool started = false;
    State state = State::Ready;
    int site = 0;
    unsigned exchanges = 0;
    Index thread{};
};

// What one lane shows the others of its warp; two of them, because a lane may arrive at the next exchange before another has read this one.
struct Shown {
    alignas(16) unsigned char bytes[2][64];
};

struct Machine {
    std::vector<Fiber> fibers{MOST_THREADS};
    std::vector<Shown> shown{MOST_THREADS};
    unsigned char* stacks = nullptr;
    unsigned char* shared = nullptr;
    std::map<int, size_t> shared_at;
    size_t shared_used = 0;
    unsigned current = 0;
    unsigned threads = 0;
    jmp_buf scheduler;
    ucontext_t start;
    void (*entry)(void**) = nullptr;
    void** arguments = nullptr;
    std::string failure;
    std::mt19937_64 random;
};

// One launch at a time: whoever calls sees to that.
static Machine machine;
static Index block_index, block_size, grid_size;

static Fiber& self() { return machine.fibers[machine.current]; }

[[gnu::noinline]] static void leave() {
    if (!_setjmp(self().context)) _longjmp(machine.scheduler, 1);
}

// A fiber goes from one block to the next, and from launch to launch: starting one asks the system to save signal masks.
static void fiber_main() {
    for (;;) {
        machine.entry(machine.arguments);
        self().state = State::Done;
        leave();
    }
}

[[gnu::noinline]] static void resume(unsigned thread) {
    machine.current = thread;
    Fiber& fiber = machine.fibers[thread];
    if (_setjmp(machine.scheduler)) return;
    if (fiber.started) _longjmp(fiber.context, 1);
    fiber.started = true;
    getcontext(&machine.start);
    machine.start.uc_stack.ss_sp = machine.stacks + thread * STACK_BYTES;
    machine.start.uc_stack.ss_size = STACK_BYTES;
    machine.start.uc_link = nullptr;
    makecontext(&machine.start, fiber_main, 0);
    setcontext(&machine.start);
}

static void barrier(int site) {
    self().state = State::AtBarrier;
    self().site = site;
    leave();
}

// Shows `value` to the warp, waits until all lanes have, and returns where lane `l`'s value is.
template <class T> static const T* exchange(int site, const T& value) {
    static_assert(sizeof(T) <= sizeof(Shown::bytes[0]));
    unsigned parity = self().exchanges++ % 2, first = machine.current / LANES * LANES;
    memcpy(machine.shown[machine.current].bytes[parity], &value, sizeof(T));
    self().state = State::AtExchange;
    self().site = site;
    leave();
    return (const T*)machine.shown[first].bytes[parity];
}

template <class T> static T of_lane(const T* base, unsigned lane) { return *(const T*)((const unsigned char*)base + lane * sizeof(Shown)); }

static void* shared_memory(int site, size_t bytes) {
    auto found = machine.shared_at.find(site);
    if (found != machine.shared_at.end()) return machine.shared + found->second;
    size_t at = (machine.shared_used + 15) / 16 * 16;
    if (at + bytes > SHARED_BYTES) {
        fprintf(stderr, "emulated kernel: %zu bytes of shared memory\n", at + bytes);
        abort();
    }
    machine.shared_at[site] = at;
    machine.shared_used = at + bytes;
    return machine.shared + at;
}

template <class V> static void shuffle_order(V& order) {
    for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[machine.random() % i]);
}

static void fail(const std::string& why) {
    if (machine.failure.empty()) machine.failure = why;
}

// Lets a warp run until all of its lanes wait for the block or have ended.
static bool run_warp(unsigned warp) {
    std::vector<unsigned> lanes(LANES);
    for (unsigned i = 0; i < LANES; i++) lanes[i] = warp * LANES + i;
    for (bool progress = false;; progress = true) {
        shuffle_order(lanes);
        bool ran = false;
        for (unsigned lane : lanes) {
            if (machine.fibers[lane].state != State::Ready) continue;
            resume(lane);
            ran = true;
        }
        unsigned exchanging = 0;
        for (unsigned lane : lanes) exchanging += machine.fibers[lane].state == State::AtExchange;
        if (exchanging == LANES) {
            for (unsigned lane : lanes) {
                if (machine.fibers[lane].site != machine.fibers[lanes[0]].site) fail("lanes of a warp exchange at different lines");
                machine.fibers[lane].state = State::Ready;
            }
            if (!machine.failure.empty()) return progress;
            continue;
        }
        if (exchanging && !ran) fail("a warp-wide operation that not all lanes reach, line " + std::to_string(machine.fibers[lanes[0]].site));
        if (!ran || !machine.failure.empty()) return progress;
    }
}

static void run_block() {
    for (unsigned i = 0; i < machine.threads; i++) {
        Fiber& fiber = machine.fibers[i];
        fiber.state = State::Ready;
        fiber.exchanges = 0;
        fiber.thread = Index{i % block_size.x, i / block_size.x % block_size.y, i / block_size.x / block_size.y};
    }
    memset(machine.shared, 0xff, SHARED_BYTES);
    std::vector<unsigned> warps(machine.threads / LANES);
    for (unsigned i = 0; i < warps.size(); i++) warps[i] = i;
    for (;;) {
        shuffle_order(warps);
        for (unsigned warp : warps) {
            run_warp(warp);
            if (!machine.failure.empty()) return;
        }
        unsigned waiting = 0, done = 0;
        int site = 0;
        for (unsigned i = 0; i < machine.threads; i++) {
            Fiber& fiber = machine.fibers[i];
            done += fiber.state == State::Done;
            if (fiber.state != State::AtBarrier) continue;
            if (waiting++ && fiber.site != site) return fail("threads of a block wait at different barriers");
            site = fiber.site;
        }
        if (done == machine.threads) return;
        if (waiting != machine.threads) return fail("a barrier that not all threads of the block reach, line " + std::to_string(site));
        for (unsigned i = 0; i < machine.threads; i++) machine.fibers[i].state = State::Ready;
    }
}

struct Kernel {
    void (*entry)(void**);
    size_t bytes;
};

static std::map<std::string, Kernel>& kernels() {
    static std::map<std::string, Kernel> all;
    return all;
}

struct Registrar {
    Registrar(const char* name, void (*entry)(void**), size_t bytes) { kernels()[name] = Kernel{entry, bytes}; }
};

}  // namespace emulated
}  // namespace

// Bytes of the one parameter of a kernel; 0 where there is no such kernel.
extern "C" __attribute__((visibility("default"))) size_t cairn_emulated_kernel(const char* name) {
    auto found = emulated::kernels().find(name);
    return found == emulated::kernels().end() ? 0 : found->second.bytes;
}

// Runs a kernel to its end; returns null, or why it failed.
extern "C" __attribute__((visibility("default"))) const char* cairn_emulated_launch(const char* name, const unsigned* grid, const unsigned* block,
                                                                                  void** arguments, uint64_t seed) {
    using namespace emulated;
    machine.threads = block[0] * block[1] * block[2];
    if (machine.threads == 0 || machine.threads % LANES || machine.threads > MOST_THREADS) return "the block is not whole warps, or too large";
    if (!machine.stacks) {
        machine.stacks = (unsigned char*)mmap(nullptr, STACK_BYTES * MOST_THREADS, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        machine.shared = (unsigned char*)aligned_alloc(256, SHARED_BYTES);
    }
    machine.entry = kernels()[name].entry;
    machine.arguments = arguments;
    machine.failure.clear();
    machine.random.seed(seed);
    machine.shared_at.clear();
    machine.shared_used = 0;
    block_size = Index{block[0], block[1], block[2]};
    grid_size = Index{grid[0], grid[1], grid[2]};
    std::vector<uint64_t> order((uint64_t)grid[0] * grid[1] * grid[2]);
    for (uint64_t i = 0; i < order.size(); i++) order[i] = i;
    shuffle_order(order);
    for (uint64_t i : order) {
        block_index = Index{(unsigned)(i % grid[0]), (unsigned)(i / grid[0] % grid[1]), (unsigned)(i / grid[0] / grid[1])};
        run_block();
        if (!machine.failure.empty()) {
            // They are in the middle of the kernel.
            for (Fiber& fiber : machine.fibers) fiber.started = false;
            return machine.failure.c_str();
        }
    }
    return nullptr;
}

#define threadIdx (emulated::self().thread)
#define blockIdx (emulated::block_index)
#define blockDim (emulated::block_size)
#define gridDim (emulated::grid_size)

#define EXPORT(name, params) \
    static emulated::Registrar registrar_##name(#name, [](void** arguments) { name(*(const params*)arguments[0]); }, sizeof(params));
#define SHARED(type, name, count) type* name = (type*)emulated::shared_memory(__LINE__, sizeof(type) * (count))
#define BLOCK_BARRIER() emulated::barrier(__LINE__)
#define SHUFFLE_XOR(value, mask) emulated::shuffle_xor(__LINE__, value, mask)
#define SHUFFLE(value, lane) emulated::shuffle(__LINE__, value, lane)
#define SHUFFLE_UP(value, by) emulated::shuffle_up(__LINE__, value, by)

struct uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

static inline float __uint_as_float(unsigned x) {
    float y;
    memcpy(&y, &x, 4);
    return y;
}
static inline unsigned __float_as_uint(float x) {
    unsigned y;
    memcpy(&y, &x, 4);
    return y;
}
static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline int __float2int_rn(float x) { return (int)nearbyintf(x); }
static inline float power_of_two(float x) { return exp2f(x); }

static inline unsigned short bf16_of(float x) {
    unsigned bits = __float_as_uint(x);
    if (x != x) return 0x7fff;
    return (unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
static inline unsigned pack_bf16(float low, float high) { return bf16_of(low) | (unsigned)bf16_of(high) << 16; }
static inline unsigned short float_to_f16(float x) {
    if (x != x) return 0x7fff;
    _Float16 y = (_Float16)x;
    unsigned short bits;
    memcpy(&bits, &y, 2);
    return bits;
}
static inline float f16_to_float(unsigned short bits) {
    _Float16 y;
    memcpy(&y, &bits, 2);
    if (y != y) return __uint_as_float(0x7fffffffu);
    return (float)y;
}
static inline float bf16_widened(unsigned short bits) { return __uint_as_float((unsigned)bits << 16); }

namespace {
namespace emulated {

template <class T> static T shuffle_xor(int site, T value, unsigned mask) {
    unsigned lane = machine.current % LANES;
    return of_lane(exchange(site, value), lane ^ mask);
}
template <class T> static T shuffle(int site, T value, unsigned lane) { return of_lane(exchange(site, value), lane % LANES); }
template <class T> static T shuffle_up(int site, T value, unsigned by) {
    unsigned lane = machine.current % LANES;
    const T* all = exchange(site, value);
    return lane >= by ? of_lane(all, lane - by) : value;
}

// Fragments of mma.sync.m16n8k16 as the PTX manual lays them out over lanes and registers.
struct Fragments {
    unsigned a[4], b[2];
};

template <class Widen> static void product(int site, float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, Widen widen) {
    unsigned lane = machine.current % LANES;
    const Fragments* all = exchange(site, Fragments{{a[0], a[1], a[2], a[3]}, {b0, b1}});
    auto of = [&](unsigned lane) { return (const Fragments*)((const unsigned char*)all + lane * sizeof(Shown)); };
    // Each lane has the products of two rows, eight apart, and two columns beside each other.
    double rows[2][16], columns[2][16];
    for (unsigned i = 0; i < 2; i++) {
        for (unsigned k = 0; k < 16; k += 2) {
            unsigned left = of(lane / 4 * 4 + k % 8 / 2)->a[k / 8 * 2 + i], right = of((lane % 4 * 2 + i) * 4 + k % 8 / 2)->b[k / 8];
            rows[i][k] = widen((unsigned short)left), rows[i][k + 1] = widen((unsigned short)(left >> 16));
            columns[i][k] = widen((unsigned short)right), columns[i][k + 1] = widen((unsigned short)(right >> 16));
        }
    }
    double sums[4] = {d[0], d[1], d[2], d[3]};
    for (unsigned k = 0; k < 16; k++)
        for (unsigned i = 0; i < 4; i++) sums[i] += rows[i / 2][k] * columns[i % 2][k];
    for (unsigned i = 0; i < 4; i++) d[i] = (float)sums[i];
}

}  // namespace emulated
}  // namespace

static inline void mma_bf16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    emulated::product(__LINE__, d, a, b0, b1, [](unsigned short bits) { return bf16_widened(bits); });
}
static inline void mma_f16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    emulated::product(__LINE__, d, a, b0, b1, [](unsigned short bits) { return f16_to_float(bits); });
}
