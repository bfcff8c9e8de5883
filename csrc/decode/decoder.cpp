#include "decode/decoder.h"

#include <algorithm>
#include <limits>
#include <new>
#include <stdexcept>
#include <utility>

#include "common/threads.h"

namespace gptkern {
namespace {

// The paths that this processor can run, the best first, then null.
const CpuDecodePath* const* paths() {
    static const CpuDecodePath* usable[3] = {};
#ifdef GPTKERN_X86
    const CpuDecodePath** next = usable;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        *next++ = &avx512::decode_path();
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) *next++ = &avx2::decode_path();
#endif
    return usable;
}

const CpuDecodePath* chosen = paths()[0];

// Three times a width, and a vocabulary rounded up, must fit an int.
constexpr int kMostOuts = 1 << 29;
constexpr int kMostThreads = 1024;

[[noreturn]] void refuse(const std::string& why) { throw std::invalid_argument("GPT: " + why); }

void check_row(const CpuModel& model, const CpuCache& cache, int64_t token, int32_t length, int row) {
    if (token < 0 || token >= model.vocab) {
        refuse("tokens[" + std::to_string(row) + "] is " + std::to_string(token) + "; 0 <= token < " +
               std::to_string(model.vocab) + " is needed");
    }
    if (length < 0 || length >= model.n_positions) {
        refuse("a sequence has " + std::to_string(length) + " tokens, the model's whole context of " +
               std::to_string(model.n_positions));
    }
    if (length / cache.page_size >= cache.table_width) {
        refuse("a sequence has " + std::to_string(length) + " tokens, and its " + std::to_string(cache.table_width) +
               " pages of " + std::to_string(cache.page_size) + " hold no more");
    }
}

}  // namespace

const CpuDecodePath* cpu_decode_path() { return chosen; }

void use_cpu_decode_path(const std::string& name) {
    for (const CpuDecodePath* const* path = paths(); *path != nullptr; ++path) {
        if (name == (*path)->name) {
            chosen = *path;
            return;
        }
    }
    throw std::invalid_argument("use_decode_path: " + name + " is not available here");
}

bool decoder_supported() { return cpu_decode_path() != nullptr; }

Decoder::Decoder(const CpuModel& model, std::vector<CpuBlock> blocks) : blocks_(std::move(blocks)), model_(model) {
    if (!decoder_supported()) refuse("this processor has no decode step");
    if (blocks_.empty() || model.heads < 1 || model.width < 1 || model.inner < 1 || model.vocab < 1 ||
        model.n_positions < 1) {
        refuse("every size of a decoder must be at least 1");
    }
    if (model.width % model.heads != 0) {
        refuse("a width of " + std::to_string(model.width) + " is no multiple of " + std::to_string(model.heads) +
               " heads");
    }
    if (model.width > kMostOuts || model.inner > kMostOuts || model.vocab > kMostOuts) {
        refuse("no size of a decoder may pass " + std::to_string(kMostOuts));
    }
    model_.blocks = static_cast<int>(blocks_.size());
    model_.head_dim = model.width / model.heads;
    model_.block = blocks_.data();
}

CpuCache Decoder::copied(const CpuCache& cache, const int64_t* tokens, int rows) {
    tokens_.assign(tokens, tokens + rows);
    lengths_.assign(cache.lengths, cache.lengths + rows);
    for (int row = 0; row < rows; ++row) check_row(model_, cache, tokens_[row], lengths_[row], row);
    const int32_t longest = *std::max_element(lengths_.begin(), lengths_.end());
    CpuCache copy = cache;
    copy.table_width = copy.table_stride = longest / cache.page_size + 1;
    table_.resize(static_cast<size_t>(rows * copy.table_width));
    for (int row = 0; row < rows; ++row) {
        const int32_t* const pages = cache.table + row * cache.table_stride;
        const int64_t used = lengths_[row] / cache.page_size + 1;
        int32_t* const own = std::copy(pages, pages + used, table_.data() + row * copy.table_width) - used;
        const auto missing = [&](int32_t page) { return page < 0 || page >= cache.pages; };
        if (std::any_of(own, own + used, missing)) {
            refuse("row " + std::to_string(row) + " of the page table names a page that the cache lacks; it has " +
                   std::to_string(cache.pages));
        }
    }
    copy.table = table_.data();
    copy.lengths = lengths_.data();
    return copy;
}

void Decoder::step(const CpuCache& cache, const int64_t* tokens, int rows, void* logits, int threads) {
    if (rows == 0) return;
    const PoolLock lock;  // from here on this object's buffers are this call's alone
    const CpuCache own = copied(cache, tokens, rows);
    const int longest = *std::max_element(lengths_.begin(), lengths_.end()) + 1;
    if (static_cast<int64_t>(model_.heads) * longest > std::numeric_limits<int>::max()) {
        refuse("a sequence has too many tokens for " + std::to_string(model_.heads) + " heads");
    }
    const CpuDecodePath& path = *cpu_decode_path();
    const int members = std::min(std::max(threads, 1), kMostThreads);
    const size_t needed = path.floats(model_, rows, longest, members);
    if (floats_ < needed) {
        // Room for longer sequences too. Aligned, so that no vector crosses a cache line.
        const size_t wanted = (needed + needed / 4 + 15) / 16 * 16;
        memory_.reset();
        floats_ = 0;
        memory_.reset(static_cast<float*>(std::aligned_alloc(64, wanted * sizeof(float))));
        if (memory_ == nullptr) throw std::bad_alloc();
        floats_ = wanted;
    }
    path.run({&model_, own, tokens_.data(), rows, longest, logits, memory_.get()}, members);
}

}  // namespace gptkern
