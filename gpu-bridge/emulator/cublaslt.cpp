// libcublasLt, emulated: matrix products in single precision, each element summed in the order of k whatever the other rows are.

#include "driver.hpp"
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {
enum { SUCCESS = 0, INVALID_VALUE = 7, EXECUTION_FAILED = 13, NOT_SUPPORTED = 15 };
enum { R_32F = 0, R_16F = 2, R_16BF = 14 };

struct Desc {
    int transposed[2] = {0, 0};
};

struct Layout {
    int type;
    uint64_t rows, columns;
    int64_t stride;
};

struct Algo {
    uint64_t data[8];
};

// Kinds of algorithms: what Cairn must tell apart.
enum { PLAIN, SAME_ORDER, OTHER_ORDER, SPLITS, NOT_FOR_ONE };

// CUBLASLT_ALGO_CONFIG_SPLITK_NUM.
enum { SPLITK_NUM = 2 };

struct Heuristic {
    Algo algo;
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};

float widened(const void* at, int type, uint64_t i) {
    if (type == R_32F) return ((const float*)at)[i];
    uint16_t half = ((const uint16_t*)at)[i];
    if (type == R_16BF) {
        uint32_t bits = (uint32_t)half << 16;
        float value;
        memcpy(&value, &bits, 4);
        return value;
    }
    _Float16 value;
    memcpy(&value, &half, 2);
    return (float)value;
}

std::vector<float> columns_of(const void* at, const Layout& layout, bool transposed, uint64_t inner) {
    // Consecutive along the summed dimension, whatever the storage.
    uint64_t outer = layout.rows * layout.columns / inner;
    std::vector<float> all(outer * inner);
    for (uint64_t o = 0; o < outer; o++)
        for (uint64_t i = 0; i < inner; i++) all[o * inner + i] = widened(at, layout.type, transposed ? o * layout.stride + i : i * layout.stride + o);
    return all;
}
}  // namespace

#define API extern "C" __attribute__((visibility("default"))) int

API cublasLtCreate(void** handle) { return *handle = new int, SUCCESS; }
API cublasLtDestroy(void* handle) { return delete (int*)handle, SUCCESS; }
API cublasLtMatmulDescCreate(Desc** desc, int, int) { return *desc = new Desc, SUCCESS; }
API cublasLtMatmulDescDestroy(Desc* desc) { return delete desc, SUCCESS; }
API cublasLtMatmulDescSetAttribute(Desc* desc, int attribute, const void* value, size_t) {
    if (attribute == 3 || attribute == 4) memcpy(&desc->transposed[attribute - 3], value, 4);
    return SUCCESS;
}
API cublasLtMatrixLayoutCreate(Layout** layout, int type, uint64_t rows, uint64_t columns, int64_t stride) {
    return *layout = new Layout{type, rows, columns, stride}, SUCCESS;
}
API cublasLtMatrixLayoutDestroy(Layout* layout) { return delete layout, SUCCESS; }
API cublasLtMatmulPreferenceCreate(void** preference) { return *preference = new int, SUCCESS; }
API cublasLtMatmulPreferenceDestroy(void* preference) { return delete (int*)preference, SUCCESS; }
API cublasLtMatmulPreferenceSetAttribute(void*, int, const void*, size_t) { return SUCCESS; }
// The best first, as the library has it; which that is depends on the number of rows.
API cublasLtMatmulAlgoGetHeuristic(void*, Desc*, Layout*, Layout*, Layout*, Layout* d, void*, int, Heuristic* found, int* count) {
    const uint64_t few[] = {SPLITS, NOT_FOR_ONE, PLAIN}, many[] = {SPLITS, OTHER_ORDER, SAME_ORDER, PLAIN};
    const uint64_t* kinds = d->columns < 128 ? few : many;
    *count = d->columns < 128 ? 3 : 4;
    memset(found, 0, *count * sizeof(*found));
    for (int i = 0; i < *count; i++) found[i].algo.data[0] = kinds[i];
    return SUCCESS;
}
API cublasLtMatmulAlgoCheck(void*, Desc*, Layout*, Layout*, Layout*, Layout* d, const Algo* algo, Heuristic* result) {
    bool refused = algo->data[0] == NOT_FOR_ONE && d->columns == 1;
    refused |= (algo->data[0] == OTHER_ORDER || algo->data[0] == SAME_ORDER) && d->columns < 128;
    return memset(result, 0, sizeof(*result)), refused ? NOT_SUPPORTED : SUCCESS;
}

API cublasLtMatmulAlgoConfigGetAttribute(const Algo* algo, int attribute, void* value, size_t size, size_t* written) {
    uint32_t number = attribute == SPLITK_NUM && algo->data[0] == SPLITS ? 2 : 0;
    return memset(value, 0, size), memcpy(value, &number, 4), *written = size, SUCCESS;
}

API cublasLtMatmul(void*, Desc* desc, const float* alpha, const void* a, Layout* of_a, const void* b, Layout* of_b, const float* beta, const void*, Layout*,
                   void* d, Layout* of_d, const Algo* algo, void*, size_t, void* stream) {
    // Only what Cairn asks for: d = aT b with columns that are rows of weights and of activations.
    if (!desc->transposed[0] || desc->transposed[1] || *alpha != 1.0f || *beta != 0.0f || of_d->type != R_32F) return NOT_SUPPORTED;
    if (of_a->rows != of_b->rows || of_d->rows != of_a->columns || of_d->columns != of_b->columns) return INVALID_VALUE;
    Layout left = *of_a, right = *of_b, result = *of_d;
    uint64_t kind = algo->data[0];
    if (kind == SPLITS || (kind == NOT_FOR_ONE && of_d->columns == 1)) return NOT_SUPPORTED;
    bool one_sum = kind == OTHER_ORDER;
    std::function<int()> work = [=] {
        uint64_t inner = left.rows;
        auto weights = columns_of(a, left, true, inner), inputs = columns_of(b, right, true, inner);
        for (uint64_t row = 0; row < result.columns; row++) {
            for (uint64_t out = 0; out < result.rows; out++) {
                // Eight sums, so that the compiler may use wide registers.
                float sums[8] = {0};
                const float *w = &weights[out * inner], *x = &inputs[row * inner];
                uint64_t k = 0;
                for (; !one_sum && k + 8 <= inner; k += 8)
                    for (int i = 0; i < 8; i++) sums[i] += w[k + i] * x[k + i];
                float sum = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
                for (; k < inner; k++) sum += w[k] * x[k];
                ((float*)d)[row * result.stride + out] = sum;
            }
        }
        return 0;
    };
    return cairn_emulator_enqueue(stream, &work) ? EXECUTION_FAILED : SUCCESS;
}
