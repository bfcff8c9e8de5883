#include "few_rows.h"

#include <cstring>
#include <vector>

#include "threads.h"

#ifdef GPTKERN_X86
#include <immintrin.h>
#endif

namespace gptkern {

#ifdef GPTKERN_X86
namespace {

constexpr int kLanes = 8;       // fp32 values of a vector register
constexpr int kStep = 2 * kLanes;
constexpr int kWeightRows = 4;  // weight rows that one pass over `in` takes: enough independent sums
constexpr int kRows = 2;        // rows of x that it takes: with their accumulators, half the registers
constexpr int64_t kLeastWork = 1 << 16;  // weights below which waking a thread costs more than it saves

float widened(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof(value));
    return value;
}

uint16_t rounded(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    if (value != value) return static_cast<uint16_t>(bits >> 16 | 0x40);  // a NaN stays one
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

struct Fp32 {
    using Storage = float;
    static float load(float value) { return value; }
    static float store(float value) { return value; }
    // Element i of x lies at i: the weights come in order.
    static int place(int i) { return i; }
    static void weights(const float* w, __m256& low, __m256& high) {
        low = _mm256_loadu_ps(w);
        high = _mm256_loadu_ps(w + kLanes);
    }
};

struct Bf16 {
    using Storage = uint16_t;
    static float load(uint16_t bits) { return widened(bits); }
    static uint16_t store(float value) { return rounded(value); }
    // Within 16 elements the even ones come first: a shift and a mask widen the weights in that order.
    static int place(int i) { return i / kStep * kStep + (i % 2) * kLanes + i % kStep / 2; }
    static void weights(const uint16_t* w, __m256& even, __m256& odd) {
        const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
        even = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
        odd = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
    }
};

float sum(__m256 lanes) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

struct Job {
    const FewRows* a;
    std::vector<float> x;  // (rows, padded): fp32, in the order of Kind::place, zeros at the end
    int padded;
    int threads;
};

template <class Kind>
struct Tile {
    const typename Kind::Storage* weight[kWeightRows];
    int out[kWeightRows];  // which output each weight row gives; -1: none
};

// kWeightRows outputs of R rows of x. The sum of each is over the same lanes in the same order whatever R.
template <class Kind, int R>
void multiply(const Job& job, const Tile<Kind>& tile, int row) {
    const FewRows& a = *job.a;
    const int whole = a.in / kStep * kStep;
    __m256 total[kWeightRows][R];
    for (int j = 0; j < kWeightRows; ++j) {
        for (int r = 0; r < R; ++r) total[j][r] = _mm256_setzero_ps();
    }
    const float* const x = job.x.data() + static_cast<int64_t>(row) * job.padded;
    const auto take = [&](int i, const typename Kind::Storage* const* from) {
        for (int j = 0; j < kWeightRows; ++j) {
            __m256 first, second;
            Kind::weights(from[j], first, second);
            for (int r = 0; r < R; ++r) {
                const float* const values = x + static_cast<int64_t>(r) * job.padded + i;
                total[j][r] = _mm256_fmadd_ps(first, _mm256_loadu_ps(values), total[j][r]);
                total[j][r] = _mm256_fmadd_ps(second, _mm256_loadu_ps(values + kLanes), total[j][r]);
            }
        }
    };
    for (int i = 0; i < whole; i += kStep) {
        const typename Kind::Storage* from[kWeightRows];
        for (int j = 0; j < kWeightRows; ++j) from[j] = tile.weight[j] + i;
        take(i, from);
    }
    if (whole < a.in) {
        typename Kind::Storage rest[kWeightRows][kStep] = {};
        const typename Kind::Storage* from[kWeightRows];
        for (int j = 0; j < kWeightRows; ++j) {
            std::memcpy(rest[j], tile.weight[j] + whole, (a.in - whole) * sizeof(rest[j][0]));
            from[j] = rest[j];
        }
        take(whole, from);
    }
    using Storage = typename Kind::Storage;
    for (int j = 0; j < kWeightRows; ++j) {
        const int out = tile.out[j];
        if (out < 0) continue;
        const float bias = a.bias == nullptr ? 0.0f : Kind::load(static_cast<const Storage*>(a.bias)[out]);
        for (int r = 0; r < R; ++r) {
            static_cast<Storage*>(a.out)[static_cast<int64_t>(row + r) * a.outs + out] =
                Kind::store(sum(total[j][r]) + bias);
        }
    }
}

// A thread's share of the outputs, as kWeightRows runs of neighbours that it goes through side by side: so
// many long streams are what the prefetchers of a core follow best.
template <class Kind>
void part(void* context, int index) {
    const Job& job = *static_cast<const Job*>(context);
    const FewRows& a = *job.a;
    const auto* const weight = static_cast<const typename Kind::Storage*>(a.weight);
    const int first = static_cast<int>(static_cast<int64_t>(a.outs) * index / job.threads);
    const int last = static_cast<int>(static_cast<int64_t>(a.outs) * (index + 1) / job.threads);
    const int run = (last - first + kWeightRows - 1) / kWeightRows;
    for (int t = 0; t < run; ++t) {
        Tile<Kind> tile;
        for (int j = 0; j < kWeightRows; ++j) {
            const int out = first + j * run + t;
            tile.out[j] = out < last ? out : -1;
            tile.weight[j] = weight + (out < last ? out : last - 1) * a.weight_stride;
        }
        int row = 0;
        for (; row + kRows <= a.rows; row += kRows) multiply<Kind, kRows>(job, tile, row);
        if (row < a.rows) multiply<Kind, 1>(job, tile, row);
    }
}

template <class Kind>
void run(const FewRows& a, int threads) {
    using Storage = typename Kind::Storage;
    const int padded = (a.in + kStep - 1) / kStep * kStep;
    Job job{&a, std::vector<float>(static_cast<size_t>(a.rows) * padded, 0.0f), padded, threads};
    for (int r = 0; r < a.rows; ++r) {
        const Storage* const row = static_cast<const Storage*>(a.x) + static_cast<int64_t>(r) * a.in;
        float* const to = job.x.data() + static_cast<int64_t>(r) * padded;
        for (int i = 0; i < a.in; ++i) to[Kind::place(i)] = Kind::load(row[i]);
    }
    if (static_cast<int64_t>(a.outs) * a.in < kLeastWork) job.threads = 1;
    run_together(job.threads, part<Kind>, &job);
}

}  // namespace

bool few_rows_supported() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

void few_rows_linear(const FewRows& a, int threads) {
    const Call call;
    if (a.dtype == DType::kFloat32) {
        run<Fp32>(a, threads);
    } else {
        run<Bf16>(a, threads);
    }
}

#else

bool few_rows_supported() { return false; }
void few_rows_linear(const FewRows&, int) {}

#endif

}  // namespace gptkern
