// Random models through the CPU's decode step, with one thread and with several: the same bits, and nothing
// for the sanitizers to find. usage: fuzz_decode MODELS THREADS
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

struct Shape {
    DType dtype = between(0, 1) ? DType::kBFloat16 : DType::kFloat32;
    int heads = between(1, 5), width = heads * between(1, 70), inner = between(1, 200), vocab = between(1, 300);
    int blocks = between(1, 2), rows = between(1, 9), page_size = between(1, 9), pages = between(1, 4);
};

class Random {
public:
    explicit Random(const Shape& s) : s_(s) {}

    CpuLinear linear(int outs, int in) {
        CpuLinear layer{};
        layer.outs = outs;
        layer.in = in;
        const bool packed = between(0, 2) == 0;
        layer.transposed = !packed && between(0, 1);
        layer.stride = (layer.transposed ? outs : in) + between(0, 3);
        const size_t count = static_cast<size_t>(layer.stride) * ((layer.transposed ? in : outs) - 1) + (layer.transposed ? outs : in);
        if (packed) {
            layer.weight = bytes(count);
            layer.scales = scales(outs);
        } else {
            layer.weight = numbers(count);
        }
        if (between(0, 1)) layer.bias = numbers(outs);
        return layer;
    }

    CpuNorm norm() {
        const void* const weight = numbers(s_.width);
        return {weight, between(0, 1) ? numbers(s_.width) : nullptr, 1e-5f};
    }

    const void* numbers(size_t count) {
        kept_.push_back(std::make_unique<Numbers>(s_.dtype, count));
        return kept_.back()->get();
    }

private:
    const void* bytes(size_t count) {
        bytes_.emplace_back(new int8_t[count]);
        for (size_t i = 0; i < count; ++i) bytes_.back()[i] = static_cast<int8_t>(between(-127, 127));
        return bytes_.back().get();
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
};

bool check(int threads) {
    const Shape s;
    Random random(s);
    const bool post_norm = between(0, 1);
    std::vector<CpuBlock> blocks;
    for (int i = 0; i < s.blocks; ++i) {
        blocks.push_back({random.norm(), random.norm(), random.linear(3 * s.width, s.width),
                          random.linear(s.width, s.width), random.linear(s.inner, s.width),
                          random.linear(s.width, s.inner), 0.1f});
    }
    const int capacity = s.page_size * s.pages;
    CpuModel model{};
    model.dtype = s.dtype;
    model.width = s.width;
    model.heads = s.heads;
    model.inner = s.inner;
    model.vocab = s.vocab;
    model.n_positions = capacity;
    model.activation = static_cast<Activation>(between(0, 3));
    model.post_norm = post_norm;
    model.tokens = random.numbers(static_cast<size_t>(s.vocab) * s.width);
    model.positions = random.numbers(static_cast<size_t>(capacity) * s.width);
    model.token_stride = model.position_stride = s.width;
    if (!post_norm) model.final_norm = random.norm();
    model.head = random.linear(s.vocab, s.width);
    Decoder decoder(model, blocks);
    const size_t slots = static_cast<size_t>(s.rows) * capacity;
    const size_t cached = s.blocks * slots * s.width;
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
    std::unique_ptr<Numbers> results[2], keys[2];
    for (int which = 0; which < 2; ++which) {
        keys[which] = std::make_unique<Numbers>(s.dtype, cached);
        keys[which]->take(k);
        Numbers values(s.dtype, cached);
        values.take(v);
        results[which] = std::make_unique<Numbers>(s.dtype, static_cast<size_t>(s.rows) * s.vocab);
        const int64_t slot = s.width, page = slot * s.page_size;
        const CpuCache cache{keys[which]->get(), values.get(), static_cast<int64_t>(slots) * s.width, page, slot,
                             s.rows * s.pages, s.page_size, table.data(), s.pages, s.pages, lengths.data()};
        decoder.step(cache, tokens.data(), s.rows, results[which]->get(), which ? threads : 1);
    }
    return results[0]->same(*results[1]) && keys[0]->same(*keys[1]);
}

}  // namespace
}  // namespace gptkern

int main(int, char** arguments) {
    const int models = std::atoi(arguments[1]), threads = std::atoi(arguments[2]);
    for (const char* path : {"avx2", "avx512"}) {
        try {
            gptkern::use_cpu_decode_path(path);
        } catch (const std::exception&) {
            continue;
        }
        for (int i = 0; i < models; ++i) {
            if (!gptkern::check(threads)) {
                std::printf("%s: model %d differs with %d threads\n", path, i, threads);
                return 1;
            }
        }
        std::printf("%s: %d models\n", path, models);
    }
    return 0;
}
