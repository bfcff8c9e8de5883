// Random models through the CPU's decode step, with one thread and with several: the same bits, and nothing
// for the sanitizers to find. usage: fuzz_decode MODELS THREADS
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "decode/decoder.h"

namespace gptkern {
namespace {

std::mt19937 draw(0);

int between(int low, int high) { return std::uniform_int_distribution<int>(low, high)(draw); }

// Numbers of either dtype, exactly as many as are asked for, so that a read beyond them is found.
class Numbers {
public:
    Numbers(DType dtype, size_t count) : bytes_(count * (dtype == DType::kFloat32 ? 4 : 2)), at_(new char[bytes_]) {
        std::uniform_real_distribution<float> value(-0.5f, 0.5f);
        for (size_t i = 0; i < count; ++i) {
            const float number = value(draw);
            if (dtype == DType::kFloat32) {
                std::memcpy(at_.get() + 4 * i, &number, 4);
            } else {
                std::memcpy(at_.get() + 2 * i, reinterpret_cast<const char*>(&number) + 2, 2);
            }
        }
    }

    void* get() const { return at_.get(); }
    bool same(const Numbers& other) const { return std::memcmp(at_.get(), other.at_.get(), bytes_) == 0; }
    void take(const Numbers& other) { std::memcpy(at_.get(), other.at_.get(), bytes_); }

private:
    size_t bytes_;
    std::unique_ptr<char[]> at_;
};

// A multiple of an int4 group, or any.
int odd_or_not() { return between(0, 1) ? kLeastGroup * between(1, 5) : between(1, 200); }

// Now and then so many that their sums are made in parts.
int inner_or_more() {
    if (between(0, 5)) return odd_or_not();
    return between(0, 1) ? 1024 + kLeastGroup * between(1, 4) : between(1025, 1100);
}

struct Shape {
    DType dtype = between(0, 1) ? DType::kBFloat16 : DType::kFloat32;
    int kv_heads = between(1, 3), heads = kv_heads * between(1, 3), head_dim = between(1, 70), width = odd_or_not();
    int inner = inner_or_more(), vocab = between(1, 300);
    int layers = between(1, 2), rows = between(0, 5) ? between(1, 9) : between(10, 80);
    int page_size = between(1, 9), pages = between(0, 4) ? between(1, 4) : between(8, 25);
    int capacity = page_size * pages;
};

class Random {
public:
    explicit Random(const Shape& s) : s_(s) {}

    CpuLinear linear(int outs, int in) {
        CpuLinear layer{};
        layer.outs = outs;
        layer.in = in;
        layer.format = static_cast<Format>(std::max(between(-2, 3), 0));
        if (layer.format == Format::kInt4 && in % kLeastGroup != 0) layer.format = Format::kFp8;
        const bool packed = layer.format != Format::kModel, halved = layer.format == Format::kInt4;
        layer.transposed = !packed && between(0, 1);
        const int columns = layer.transposed ? outs : halved ? in / 2 : in;
        layer.stride = columns + between(0, 3);
        const size_t count = static_cast<size_t>(layer.stride) * ((layer.transposed ? in : outs) - 1) + columns;
        int groups = in / kLeastGroup;
        while (halved && groups % 2 == 0 && between(0, 1)) groups /= 2;
        if (halved) layer.group = in / groups;
        if (packed) {
            layer.weight = bytes(count);
            if (layer.format == Format::kFp8) drop_nans(bytes_.back().get(), count);
            if (halved) {
                layer.group_scales = halves(outs * groups);
                if (between(0, 1)) layer.minimums = halves(outs * groups);
            } else {
                layer.scales = scales(outs);
            }
        } else {
            layer.weight = numbers(count);
        }
        if (between(0, 1)) layer.bias = numbers(outs);
        return layer;
    }

    CpuNorm norm() {
        const void* const weight = numbers(s_.width);
        return {weight, between(0, 1) ? numbers(s_.width) : nullptr};
    }

    CpuLayer layer(bool normed, bool whole) {
        CpuLayer layer{};
        layer.scale = 0.1f;
        layer.window = between(0, 1) ? between(1, s_.capacity + 2) : 0;
        layer.rotary = between(0, s_.head_dim / 2) * 2;
        layer.interleaved = between(0, 1);
        layer.cos = rotations(layer.rotary / 2);
        layer.sin = rotations(layer.rotary / 2);
        if (normed) {
            layer.q_norm = numbers(whole ? s_.heads * s_.head_dim : s_.head_dim);
            layer.k_norm = numbers(whole ? s_.kv_heads * s_.head_dim : s_.head_dim);
        }
        return layer;
    }

    const void* numbers(size_t count) {
        kept_.push_back(std::make_unique<Numbers>(s_.dtype, count));
        return kept_.back()->get();
    }

private:
    const void* bytes(size_t count, int low = -127, int high = 127) {
        bytes_.emplace_back(new int8_t[count]);
        for (size_t i = 0; i < count; ++i) bytes_.back()[i] = static_cast<int8_t>(between(low, high));
        return bytes_.back().get();
    }

    // NaNs of fp8 would leave nothing of a model but NaNs, whose bits may differ.
    static void drop_nans(int8_t* codes, size_t count) {
        for (size_t i = 0; i < count; ++i) codes[i] = (codes[i] & 0x7f) == 0x7f ? 0 : codes[i];
    }

    const float* rotations(int pairs) {
        const int count = s_.capacity * pairs;
        scales_.emplace_back(new float[count]);
        for (int i = 0; i < count; ++i) scales_.back()[i] = 0.1f * static_cast<float>(between(-10, 10));
        return scales_.back().get();
    }

    // Small numbers in fp16, of either sign.
    const uint16_t* halves(int count) {
        halves_.emplace_back(new uint16_t[count]);
        for (int i = 0; i < count; ++i) {
            halves_.back()[i] = static_cast<uint16_t>(between(0, 0x2000) | between(0, 1) << 15);
        }
        return halves_.back().get();
    }

    const float* scales(int outs) {
        scales_.emplace_back(new float[outs]);
        for (int i = 0; i < outs; ++i) scales_.back()[i] = 0.001f * static_cast<float>(between(1, 9));
        return scales_.back().get();
    }

    Shape s_;
    std::vector<std::unique_ptr<Numbers>> kept_;
    std::vector<std::unique_ptr<int8_t[]>> bytes_;
    std::vector<std::unique_ptr<float[]>> scales_;
    std::vector<std::unique_ptr<uint16_t[]>> halves_;
};

CpuStage stage(StageKind kind, int layer, Buffer read, Buffer write, CpuLinear linear = {}, CpuNorm norm = {},
               Buffer residual = Buffer::kNone, Buffer save = Buffer::kNone) {
    return {kind, layer, read, write, save, residual, norm, linear, false};
}

// A layer with norms before its branches, after their sums, or on the branches themselves.
void add_layer(Random& random, const CpuModel& m, int layer, int place, std::vector<CpuStage>& stages) {
    const auto linear = [&](Buffer read, Buffer write, CpuNorm norm, Buffer residual, Buffer save) {
        const bool activated = write == Buffer::kInner;
        const auto outs = static_cast<int>(outs_of(m, StageKind::kLinear, write, activated));
        const auto in = static_cast<int>(width_of(m, read));
        stages.push_back(
            stage(StageKind::kLinear, layer, read, write, random.linear(outs, in), norm, residual, save));
        stages.back().activated = activated;
    };
    const bool after = place == 1, branch = place == 2, parallel = between(0, 1);
    const CpuNorm first = after && layer == 0 ? CpuNorm{} : random.norm();
    const Buffer none = Buffer::kNone, x = Buffer::kX, middle = Buffer::kMiddle;
    stages.push_back(stage(StageKind::kQkv, layer, x, Buffer::kQ, random.linear(m.qkv_width(), m.width), first, none,
                           after ? Buffer::kNormedX : none));
    stages.push_back(stage(StageKind::kAttention, layer, Buffer::kQ, Buffer::kAttended));
    const auto end = [&](Buffer read, Buffer write, Buffer residual) {
        linear(read, branch ? Buffer::kBranch : write, {}, branch ? none : residual, none);
        if (!branch) return;
        stages.push_back(stage(StageKind::kAddNorm, layer, Buffer::kBranch, write, {}, random.norm(), residual));
    };
    end(Buffer::kAttended, middle, after ? Buffer::kNormedX : x);
    linear(!after && parallel ? x : middle, Buffer::kInner, random.norm(), none, after ? Buffer::kNormedMiddle : none);
    end(Buffer::kInner, x, after ? Buffer::kNormedMiddle : middle);
}

bool check(int threads) {
    const Shape s;
    Random random(s);
    const int capacity = s.capacity;
    CpuModel model{};
    model.dtype = s.dtype;
    model.width = s.width;
    model.heads = s.heads;
    model.kv_heads = s.kv_heads;
    model.head_dim = s.head_dim;
    model.inner = s.inner;
    model.vocab = s.vocab;
    // Of a context of which the pass needs a part, attention's runs are longer.
    model.n_positions = between(0, 2) ? capacity : capacity + 64 * 64 * between(1, 2);
    model.activation = static_cast<Activation>(between(0, 3));
    model.gated = between(0, 1);
    model.rms = between(0, 1);
    model.unit_offset = between(0, 1);
    model.whole_qk_norm = between(0, 1);
    model.eps = 1e-5f;
    model.embedding_scale = model.residual_scale = model.logits_scale = 0.8f;
    model.attention_softcap = static_cast<float>(between(0, 2));
    model.logits_softcap = static_cast<float>(between(0, 2));
    model.tokens = random.numbers(static_cast<size_t>(s.vocab) * s.width);
    if (between(0, 1)) model.positions = random.numbers(static_cast<size_t>(capacity) * s.width);
    model.token_stride = model.position_stride = s.width;
    const bool normed = between(0, 1);
    const int place = between(0, 2);
    std::vector<CpuLayer> layers;
    std::vector<CpuStage> stages{stage(StageKind::kEmbed, 0, Buffer::kNone, Buffer::kX)};
    for (int i = 0; i < s.layers; ++i) {
        layers.push_back(random.layer(normed, model.whole_qk_norm));
        add_layer(random, model, i, place, stages);
    }
    stages.push_back(stage(StageKind::kLinear, s.layers, Buffer::kX, Buffer::kLogits,
                           random.linear(s.vocab, s.width), random.norm()));
    Decoder decoder(model, layers, stages);
    const int kv_width = model.kv_width();
    const size_t slots = static_cast<size_t>(s.rows) * capacity;
    const size_t cached = s.layers * slots * kv_width;
    const Numbers k(s.dtype, cached), v(s.dtype, cached);
    std::vector<int32_t> table(s.rows * s.pages), lengths(s.rows);
    std::vector<int64_t> tokens(s.rows);
    // Each row a sequence of its own, or all of them consecutive tokens of one.
    const bool one = s.rows <= capacity && between(0, 1);
    for (int i = 0; i < s.rows * s.pages; ++i) table[i] = one ? i % s.pages : i;
    const int first = one ? between(0, capacity - s.rows) : 0;
    for (int r = 0; r < s.rows; ++r) {
        lengths[r] = one ? first + r : between(0, capacity - 1);
        tokens[r] = between(0, s.vocab - 1);
    }
    std::vector<int32_t> wanted;
    for (int r = 0; r < s.rows; ++r) {
        if (between(0, 2)) wanted.push_back(r);
    }
    const auto outs = static_cast<int>(wanted.size());
    // One thread, then some; with weights packed on the way, then read from copies.
    std::unique_ptr<Numbers> results[4], keys[4];
    for (int which = 0; which < 4; ++which) {
        decoder.read_packed(which >= 2);
        keys[which] = std::make_unique<Numbers>(s.dtype, cached);
        keys[which]->take(k);
        Numbers values(s.dtype, cached);
        values.take(v);
        results[which] = std::make_unique<Numbers>(s.dtype, static_cast<size_t>(outs) * s.vocab);
        const int64_t slot = kv_width, page = slot * s.page_size;
        const CpuCache cache{keys[which]->get(), values.get(), static_cast<int64_t>(slots) * kv_width, page, slot,
                             s.rows * s.pages, s.page_size, table.data(), s.pages, s.pages, lengths.data()};
        decoder.step(cache, tokens.data(), s.rows, wanted.data(), outs, results[which]->get(), which % 2 ? threads : 1);
    }
    const auto same = [&](int which) { return results[0]->same(*results[which]) && keys[0]->same(*keys[which]); };
    return same(1) && same(2) && same(3);
}

}  // namespace
}  // namespace gptkern

int main(int, char** arguments) {
    const int models = std::atoi(arguments[1]), threads = std::atoi(arguments[2]);
    for (const char* path : {"avx2", "avx2_vnni", "avx512", "avx512_vnni", "avx512_bf16"}) {
        try {
            gptkern::use_cpu_decode_path(path);
        } catch (const std::exception&) {
            continue;
        }
        for (int i = 0; i < models; ++i) {
            if (!gptkern::check(threads)) {
                std::printf("%s: model %d differs with %d threads or packed\n", path, i, threads);
                return 1;
            }
        }
        std::printf("%s: %d models\n", path, models);
    }
    return 0;
}
