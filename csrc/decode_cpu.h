// A whole decode step on the CPU: one token of every sequence through all layers, in one parallel region.
#pragma once

#include <cstddef>
#include <cstdint>

#include "arguments.h"

namespace gptkern {

enum class Activation : int { kGeluTanh = 0, kGelu = 1, kRelu = 2, kSilu = 3 };

struct CpuNorm {
    const void* weight;  // null: no norm
    const void* bias;    // null: none
    float eps;
};

// Weights lie as (outs, in), or turned as (in, outs), their rows ``stride`` elements apart. With scales, one of
// each output, they are int8, and never turned.
struct CpuLinear {
    const void* weight;
    const void* bias;  // null: none
    int outs, in;
    int64_t stride;
    bool turned;
    const float* scales;  // null: weights are of the model's dtype
};

struct CpuBlock {
    CpuNorm norm1, norm2;
    CpuLinear qkv, projection, fc, out;
    float scale;  // of the attention scores
};

struct CpuModel {
    DType dtype;  // of the cache, and of all weights that are not int8: fp32 or bf16
    int blocks, width, heads, head_dim, inner, vocab, n_positions;
    Activation activation;
    bool post_norm;  // norms follow a branch (GPT-1) instead of preceding it
    const CpuBlock* block;
    CpuNorm final_norm;
    CpuLinear head;
    const void *tokens, *positions;  // embeddings, (vocab, width) and (n_positions, width)
    int64_t token_stride, position_stride;
};

// Keys and values are (blocks, pages, page_size, heads, head_dim), the last two dimensions dense; strides
// in elements, the same for both.
struct CpuCache {
    void *k, *v;
    int64_t block_stride, page_stride, slot_stride, pages;
    int page_size;
    const int32_t* table;  // (rows, table_width): pages
    int64_t table_width, table_stride;
    const int32_t* lengths;  // (rows,): tokens held before this one
};

// Sums are in fp32, and so is what goes from layer to layer; keys, values and logits are rounded once. A
// row's logits depend neither on the other rows nor on the number of threads.
struct CpuDecode {
    const CpuModel* model;
    CpuCache cache;
    const int64_t* tokens;  // (rows,)
    int rows, longest;      // ``longest``: tokens of the longest sequence, this one included
    void* logits;           // (rows, vocab)
    float* memory;          // cpu_decode_floats of them
};

struct CpuDecodePath {
    const char* name;
    size_t (*floats)(const CpuModel&, int rows, int longest, int threads);
    void (*run)(const CpuDecode&, int threads);  // a Call must be held
};

#ifdef GPTKERN_X86
namespace avx2 {
const CpuDecodePath& decode_path();
}
namespace avx512 {
const CpuDecodePath& decode_path();
}
#endif

}  // namespace gptkern
