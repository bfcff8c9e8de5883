// A model, its cache and one decode pass on the CPU, as plain structs: one token of every sequence through all
// layers, in one parallel region.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/dtype.h"
#include "common/platform.h"  // makes this source's instruction set the inline namespace

namespace gptkern {

enum class Activation : int { kGeluTanh = 0, kGelu = 1, kRelu = 2, kSilu = 3 };

struct CpuNorm {
    const void* weight;  // null: no norm
    const void* bias;    // null: none
    float eps;
};

// A linear layer. The weight is (outs, in), or (in, outs) if it is transposed, its rows ``stride`` elements apart.
// With scales, one for each output, the weight is int8 and not transposed.
struct CpuLinear {
    const void* weight;
    const void* bias;  // null: none
    int outs, in;
    int64_t stride;
    bool transposed;
    const float* scales;  // null: the weight has the model's dtype
};

struct CpuBlock {
    CpuNorm norm1, norm2;
    CpuLinear qkv, projection, fc, out;
    float scale;  // the factor of the attention scores
};

struct CpuModel {
    DType dtype;  // fp32 or bf16: the cache, and all weights that are not int8
    int blocks, width, heads, head_dim, inner, vocab, n_positions;
    Activation activation;
    bool post_norm;  // norms follow a branch (GPT-1) instead of preceding it
    const CpuBlock* block;
    CpuNorm final_norm;
    CpuLinear head;
    const void *tokens, *positions;  // embeddings, (vocab, width) and (n_positions, width)
    int64_t token_stride, position_stride;
};

// The paged cache: keys and values are (blocks, pages, page_size, heads, head_dim), the last two dimensions
// contiguous. Strides are in elements, the same for both.
struct CpuCache {
    void *k, *v;
    int64_t block_stride, page_stride, slot_stride, pages;
    int page_size;
    const int32_t* table;  // (rows, table_width): page numbers
    int64_t table_width, table_stride;
    const int32_t* lengths;  // (rows,): number of tokens in the cache before this pass
};

// One decode pass. Sums and activations are fp32; keys, values and logits are rounded once. A row's logits depend
// neither on the other rows nor on the number of threads.
struct CpuDecode {
    const CpuModel* model;
    CpuCache cache;
    const int64_t* tokens;  // (rows,)
    int rows, longest;      // longest: the tokens of the longest sequence, this pass's included
    void* logits;           // (rows, vocab)
    float* memory;          // CpuDecodePath::floats of them
};

struct CpuDecodePath {
    const char* name;
    size_t (*floats)(const CpuModel&, int rows, int longest, int threads);
    void (*run)(const CpuDecode&, int threads);  // the caller must hold a PoolLock
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
