#include "decode/decoder.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <new>
#include <stdexcept>
#include <utility>

#include "common/threads.h"

namespace gptkern {
namespace {

// The paths that this processor can run, the best first, then null.
const CpuDecodePath* const* paths() {
    static const CpuDecodePath* usable[6] = {};
#ifdef GPTKERN_X86
    const CpuDecodePath** next = usable;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        const bool vnni = __builtin_cpu_supports("avx512vnni");
        if (vnni && __builtin_cpu_supports("avx512bf16")) *next++ = &avx512_bf16::decode_path();
        if (vnni) *next++ = &avx512_vnni::decode_path();
        *next++ = &avx512::decode_path();
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
        if (__builtin_cpu_supports("avxvnni")) *next++ = &avx2_vnni::decode_path();
        *next++ = &avx2::decode_path();
    }
#endif
    return usable;
}

const CpuDecodePath* chosen = paths()[0];

// Three times the heads' width, and a vocabulary rounded up, must fit an int.
constexpr int kMostOuts = 1 << 29;
constexpr size_t kHugePage = size_t{1} << 21;
constexpr int kSamples = 8;  // weights of a matrix that are looked at for writes that nobody reports

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

bool is_row(Buffer buffer) { return buffer == Buffer::kX || buffer == Buffer::kMiddle || buffer == Buffer::kBranch; }

bool is_normed(Buffer buffer) { return buffer == Buffer::kNormedX || buffer == Buffer::kNormedMiddle; }

// Follows a program: whether each stage reads what an earlier one wrote, and is one that a path can run.
class Follow {
public:
    Follow(const CpuModel& model, int layers) : model_(model), layers_(layers) {}

    bool fits(const CpuStage& s) {
        const bool linear = s.kind == StageKind::kQkv || s.kind == StageKind::kLinear;
        if (s.kind != StageKind::kEmbed && !has(s.read)) return false;
        if (s.read == s.write || s.save == s.write) return false;
        if (s.save != Buffer::kNone && !(linear && is_row(s.read) && is_normed(s.save))) return false;
        if (linear && (s.linear.in != width_of(model_, s.read) ||
                       s.linear.outs != outs_of(model_, s.kind, s.write, s.activated))) {
            return false;
        }
        if (!of_kind(s)) return false;
        if ((linear && is_row(s.read)) || s.kind == StageKind::kAddNorm) saved_ = s.save;
        written_[static_cast<int>(s.write)] = true;
        return true;
    }

    bool done() const { return written_[static_cast<int>(Buffer::kLogits)]; }

private:
    bool has(Buffer buffer) const { return written_[static_cast<int>(buffer)]; }

    bool of_kind(const CpuStage& s) {
        const bool alone = s.residual == Buffer::kNone, in_layer = s.layer >= 0 && s.layer < layers_;
        switch (s.kind) {
            case StageKind::kEmbed: return s.write == Buffer::kX && alone;
            case StageKind::kQkv:
                projected_ = s.layer;
                return is_row(s.read) && s.write == Buffer::kQ && in_layer && alone && !s.activated;
            case StageKind::kAttention:
                return s.read == Buffer::kQ && s.write == Buffer::kAttended && s.layer == projected_ && alone;
            case StageKind::kAddNorm:
                return is_row(s.read) && is_row(s.write) && is_row(s.residual) && has(s.residual) &&
                       s.norm.weight != nullptr;
            case StageKind::kLinear: return product(s);
        }
        return false;
    }

    bool product(const CpuStage& s) const {
        const bool alone = s.residual == Buffer::kNone;
        if (!is_row(s.read) && s.norm.weight != nullptr) return false;
        if (!is_row(s.read) && s.read != Buffer::kAttended && s.read != Buffer::kInner) return false;
        if (s.activated) return s.write == Buffer::kInner && alone;
        if (s.write == Buffer::kLogits) return alone;
        const bool normed = is_normed(s.residual) && s.residual == saved_ && !is_row(s.read);
        return is_row(s.write) && (alone || normed || (is_row(s.residual) && has(s.residual)));
    }

    const CpuModel& model_;
    const int layers_;
    int projected_ = -1;
    Buffer saved_ = Buffer::kNone;  // what the threads' own rows hold
    bool written_[kBuffers] = {};
};

void check_stages(const CpuModel& model, int layers, const std::vector<CpuStage>& stages) {
    Follow follow(model, layers);
    for (size_t i = 0; i < stages.size(); ++i) {
        if (follow.done() || !follow.fits(stages[i])) refuse("stage " + std::to_string(i) + " does not follow the others");
    }
    if (!follow.done()) refuse("the last stage of a decoder must write the logits");
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

int64_t width_of(const CpuModel& model, Buffer buffer) {
    switch (buffer) {
        case Buffer::kNone: return 0;
        case Buffer::kQ: return model.qkv_width();
        case Buffer::kAttended: return model.q_width();
        case Buffer::kInner: return model.inner;
        case Buffer::kLogits: return model.vocab;
        default: return model.width;
    }
}

int64_t outs_of(const CpuModel& model, StageKind kind, Buffer write, bool activated) {
    if (kind == StageKind::kEmbed || kind == StageKind::kAttention || kind == StageKind::kAddNorm) return 0;
    return activated && model.gated ? 2LL * width_of(model, write) : width_of(model, write);
}

Decoder::Decoder(const CpuModel& model, std::vector<CpuLayer> layers, std::vector<CpuStage> stages)
    : layers_(std::move(layers)), stages_(std::move(stages)), model_(model) {
    if (!decoder_supported()) refuse("this processor has no decode step");
    for (const int size : {model.width, model.heads, model.kv_heads, model.head_dim, model.inner, model.vocab,
                           model.n_positions}) {
        if (size < 1 || size > kMostOuts) {
            refuse("every size of a decoder must be from 1 to " + std::to_string(kMostOuts));
        }
    }
    if (model.heads % model.kv_heads != 0) {
        refuse(std::to_string(model.heads) + " heads are no multiple of " + std::to_string(model.kv_heads) +
               " key and value heads");
    }
    if (static_cast<int64_t>(model.heads) * model.head_dim > kMostOuts) {
        refuse("no size of a decoder may pass " + std::to_string(kMostOuts));
    }
    for (const CpuLayer& layer : layers_) {
        if (layer.window < 0) refuse("a window must be 1 or more, or 0 for none");
        if (layer.rotary < 0 || layer.rotary > model.head_dim || layer.rotary % 2 != 0) {
            refuse("an even number of a head's " + std::to_string(model.head_dim) + " elements can turn, not " +
                   std::to_string(layer.rotary));
        }
    }
    check_stages(model, static_cast<int>(layers_.size()), stages_);
    for (CpuStage& stage : stages_) {
        stage.linear.section = stage.activated && model.gated ? model.inner : stage.linear.outs;
        stage.linear.packed = nullptr;
    }
    model_.layers = static_cast<int>(layers_.size());
    model_.layer = layers_.data();
    model_.stages = static_cast<int>(stages_.size());
    model_.stage = stages_.data();
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

size_t Decoder::packed_bytes() const {
    size_t floats = 0;
    for (const CpuStage& stage : stages_) floats += cpu_decode_path()->packed_floats(model_, stage.linear);
    return floats * sizeof(float);
}

void Decoder::read_packed(bool packed) {
    const PoolLock lock;
    packs_ = packed;
    if (packed) return;
    for (CpuStage& stage : stages_) stage.linear.packed = nullptr;
    packed_for_ = nullptr;
    packed_.reset();
}

void Decoder::pack(const CpuDecodePath& path, int threads) {
    std::vector<uint32_t> now = samples();
    if (packed_for_ == &path && !stale_ && now == samples_) return;
    if (packed_for_ != &path) {
        for (CpuStage& stage : stages_) stage.linear.packed = nullptr;
        packed_for_ = nullptr;
        packed_.reset();
        const size_t bytes = (packed_bytes() + kHugePage - 1) / kHugePage * kHugePage;
        if (bytes == 0) return;
        packed_.reset(static_cast<float*>(std::aligned_alloc(kHugePage, bytes)));
        if (packed_ == nullptr) throw std::bad_alloc();
        madvise(packed_.get(), bytes, MADV_HUGEPAGE);  // a hint: a system without such pages has small ones
        float* next = packed_.get();
        for (CpuStage& stage : stages_) {
            const size_t floats = path.packed_floats(model_, stage.linear);
            if (floats > 0) stage.linear.packed = next;
            next += floats;
        }
    }
    path.pack(model_, threads);
    packed_for_ = &path;
    samples_ = std::move(now);
    stale_ = false;
}

std::vector<uint32_t> Decoder::samples() const {
    std::vector<uint32_t> values;
    for (const CpuStage& stage : stages_) {
        const CpuLinear& layer = stage.linear;
        if (layer.outs == 0 || layer.format != Format::kModel) continue;
        for (int i = 0; i < kSamples; ++i) {
            // Evenly apart along both dimensions.
            const int64_t out = static_cast<int64_t>(layer.outs) * i / kSamples, in = static_cast<int64_t>(layer.in) * i / kSamples;
            const int64_t at = layer.transposed ? in * layer.stride + out : out * layer.stride + in;
            const auto* const bytes = static_cast<const char*>(layer.weight);
            uint32_t value = 0;
            const size_t size = model_.dtype == DType::kFloat32 ? 4 : 2;
            std::memcpy(&value, bytes + at * static_cast<int64_t>(size), size);
            values.push_back(value);
        }
    }
    return values;
}

void Decoder::step(const CpuCache& cache, const int64_t* tokens, int rows, const int32_t* wanted, int wanted_rows,
                   void* logits, int threads) {
    if (rows == 0 && wanted_rows == 0) return;
    const PoolLock lock;  // from here on this object's buffers are this call's alone
    wanted_.assign(wanted, wanted + wanted_rows);
    for (const int32_t row : wanted_) {
        if (row < 0 || row >= rows) refuse("row " + std::to_string(row) + " is wanted of " + std::to_string(rows));
    }
    if (wanted_rows > rows) refuse(std::to_string(wanted_rows) + " rows are wanted of " + std::to_string(rows));
    const CpuCache own = copied(cache, tokens, rows);
    const CpuDecodePath& path = *cpu_decode_path();
    const int members = std::min(std::max(threads, 1), kMostThreads);
    if (packs_) pack(path, members);
    const size_t needed = path.floats(model_, rows, members);
    if (floats_ < needed) {
        // Room for more rows too. Aligned, so that no vector crosses a cache line.
        const size_t wanted = (needed + needed / 4 + 15) / 16 * 16;
        memory_.reset();
        floats_ = 0;
        memory_.reset(static_cast<float*>(std::aligned_alloc(64, wanted * sizeof(float))));
        if (memory_ == nullptr) throw std::bad_alloc();
        floats_ = wanted;
    }
    path.run({&model_, own, tokens_.data(), rows, wanted_.data(), wanted_rows, logits, memory_.get()}, members);
}

}  // namespace gptkern
