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
constexpr int kTurnedRows = 6;  // rows of turned weights that one pass over the outputs takes
constexpr int kPanel = 96;      // rows that are summed before they are added to the rest: smaller errors
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
    // Turned weights: (rows, padded outs), in that order too; of one panel of weight rows, and of all.
    std::vector<float> panel, sums;
    int padded_outs;
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

// Adds the share of S weight rows from i on to the sums of the units of kStep outputs from first to last.
template <class Kind, int S>
void add_turned(Job& job, int i, int first, int last) {
    using Storage = typename Kind::Storage;
    const FewRows& a = *job.a;
    for (int unit = first; unit < last; ++unit) {
        const int out = unit * kStep;
        __m256 low[S], high[S];
        for (int s = 0; s < S; ++s) {
            const Storage* w = static_cast<const Storage*>(a.weight) + (i + s) * a.weight_stride + out;
            Storage rest[kStep] = {};
            if (out + kStep > a.outs) {
                std::memcpy(rest, w, (a.outs - out) * sizeof(rest[0]));
                w = rest;
            } else {
                // The rows after these, while these are at work; past the end it is asked for in vain.
                _mm_prefetch(reinterpret_cast<const char*>(w + S * a.weight_stride), _MM_HINT_T0);
            }
            Kind::weights(w, low[s], high[s]);
        }
        for (int r = 0; r < a.rows; ++r) {
            float* const sums = job.panel.data() + static_cast<int64_t>(r) * job.padded_outs + out;
            // Summed apart first: fewer additions to the long sum, and smaller errors.
            __m256 first_half = _mm256_setzero_ps(), second_half = _mm256_setzero_ps();
            for (int s = 0; s < S; ++s) {
                const __m256 x = _mm256_set1_ps(job.x[static_cast<int64_t>(r) * job.padded + Kind::place(i + s)]);
                first_half = _mm256_fmadd_ps(x, low[s], first_half);
                second_half = _mm256_fmadd_ps(x, high[s], second_half);
            }
            _mm256_storeu_ps(sums, _mm256_add_ps(_mm256_loadu_ps(sums), first_half));
            _mm256_storeu_ps(sums + kLanes, _mm256_add_ps(_mm256_loadu_ps(sums + kLanes), second_half));
        }
    }
}

// A thread's share of the outputs of turned weights: weight rows are added in their order, some at a time.
template <class Kind>
void turned_part(void* context, int index) {
    using Storage = typename Kind::Storage;
    Job& job = *static_cast<Job*>(context);
    const FewRows& a = *job.a;
    const int units = job.padded_outs / kStep;
    const int first = static_cast<int>(static_cast<int64_t>(units) * index / job.threads);
    const int last = static_cast<int>(static_cast<int64_t>(units) * (index + 1) / job.threads);
    for (int i = 0; i < a.in;) {
        const int panel_end = i + kPanel < a.in ? i + kPanel : a.in;
        for (; i + kTurnedRows <= panel_end; i += kTurnedRows) add_turned<Kind, kTurnedRows>(job, i, first, last);
        for (; i < panel_end; ++i) add_turned<Kind, 1>(job, i, first, last);
        for (int r = 0; r < a.rows; ++r) {
            const int64_t row = static_cast<int64_t>(r) * job.padded_outs;
            for (int64_t out = row + first * kStep; out < row + last * kStep; ++out) {
                job.sums[out] += job.panel[out];
                job.panel[out] = 0.0f;
            }
        }
    }
    const int end = last * kStep < a.outs ? last * kStep : a.outs;
    for (int r = 0; r < a.rows; ++r) {
        for (int out = first * kStep; out < end; ++out) {
            const float bias = a.bias == nullptr ? 0.0f : Kind::load(static_cast<const Storage*>(a.bias)[out]);
            static_cast<Storage*>(a.out)[static_cast<int64_t>(r) * a.outs + out] =
                Kind::store(job.sums[static_cast<int64_t>(r) * job.padded_outs + Kind::place(out)] + bias);
        }
    }
}

int whole_steps(int n) { return (n + kStep - 1) / kStep * kStep; }

template <class Kind>
void run(const FewRows& a, int threads) {
    using Storage = typename Kind::Storage;
    const int padded = whole_steps(a.in);
    Job job{&a, std::vector<float>(static_cast<size_t>(a.rows) * padded, 0.0f), padded, threads, {}, {}, 0};
    for (int r = 0; r < a.rows; ++r) {
        const Storage* const row = static_cast<const Storage*>(a.x) + static_cast<int64_t>(r) * a.in;
        float* const to = job.x.data() + static_cast<int64_t>(r) * padded;
        for (int i = 0; i < a.in; ++i) to[Kind::place(i)] = Kind::load(row[i]);
    }
    if (static_cast<int64_t>(a.outs) * a.in < kLeastWork) job.threads = 1;
    if (!a.turned) return run_together(job.threads, part<Kind>, &job);
    job.padded_outs = whole_steps(a.outs);
    job.sums.assign(static_cast<size_t>(a.rows) * job.padded_outs, 0.0f);
    job.panel = job.sums;
    run_together(job.threads, turned_part<Kind>, &job);
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
