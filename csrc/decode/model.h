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
};

// How the weights of a linear layer are stored: in the model's dtype, or packed, with scales.
enum class Format : int { kModel = 0, kInt8, kFp8, kInt4 };

// A linear layer. The weight is (outs, in), or (in, outs) if it is transposed, its rows ``stride`` elements apart.
// Packed weights are not transposed. int8 and fp8 (e4m3) have a scale for each output. int4 is two to a byte, byte j of
// a group holding its inputs j and j + group / 2, the first in the low half; scales and minimums are (outs, in / group).
struct CpuLinear {
    const void* weight;
    const void* bias;  // null: none
    int outs, in;
    int section;  // outputs that are packed together: all, or gates and ups apart
    int64_t stride;
    bool transposed;
    float* packed;  // a copy in the order of packed_product.h; null: none
    Format format;
    const float* scales;           // of int8 and fp8; null: none
    const uint16_t* group_scales;  // of int4, in fp16
    const uint16_t* minimums;      // of int4, in fp16: what code 0 stands for; null: -8 scales
    int group;                     // inputs that share an int4 scale: a multiple of kLeastGroup
};
constexpr int kLeastGroup = 32;

enum class StageKind : int { kEmbed = 0, kQkv, kAttention, kLinear, kAddNorm };

// What a stage reads and writes (gptkern/model/program.py): rows of the model's width, but for q, attended, inner and
// logits. The normed ones are what the norm of an earlier stage gave, which that stage saves under this name.
enum class Buffer : int { kNone = 0, kX, kQ, kAttended, kBranch, kMiddle, kInner, kNormedX, kNormedMiddle, kLogits };
constexpr int kBuffers = 10;

// One row of the decoder's program: norm or not, product or attention, residual or not.
struct CpuStage {
    StageKind kind;
    int layer;
    Buffer read, write, save, residual;
    CpuNorm norm;
    CpuLinear linear;
    bool activated;  // the MLP's activation follows the product
};

// The attention of one layer.
struct CpuLayer {
    float scale;               // the factor of the scores
    int window;                // tokens that a token sees, itself included; 0: all
    int rotary;                // leading elements of each head that turn; 0: none
    bool interleaved;          // pairs are neighbours, not halves
    const float *cos, *sin;    // (n_positions, rotary / 2)
    const void *q_norm, *k_norm;  // weights of RMS norms of queries and keys; null: none
};

struct CpuModel {
    DType dtype;  // fp32 or bf16: the cache, and all weights that are not quantised
    int width, heads, kv_heads, head_dim, inner, vocab, n_positions;
    int layers, stages;
    const CpuLayer* layer;
    const CpuStage* stage;
    Activation activation;
    bool gated;          // act(gate) * up; the first product's outputs are all gates, then all ups
    bool rms;            // norms divide by the root mean square, else by the deviation from the mean
    bool unit_offset;    // a norm's factor is 1 + weight
    bool whole_qk_norm;  // norms of queries and keys are of all heads together, else of each
    float eps;
    float embedding_scale, residual_scale, logits_scale;
    float attention_softcap, logits_softcap;  // 0: none
    const void* tokens;     // (vocab, width)
    const void* positions;  // (n_positions, width); null: none
    int64_t token_stride, position_stride;

    int q_width() const { return heads * head_dim; }
    int kv_width() const { return kv_heads * head_dim; }
    int qkv_width() const { return q_width() + 2 * kv_width(); }
};

// The paged cache: keys and values are (layers, pages, page_size, kv_heads, head_dim), the last two dimensions
// contiguous. Strides are in elements, the same for both.
struct CpuCache {
    void *k, *v;
    int64_t layer_stride, page_stride, slot_stride, pages;
    int page_size;
    const int32_t* table;  // (rows, table_width): page numbers
    int64_t table_width, table_stride;
    const int32_t* lengths;  // (rows,): number of tokens in the cache before this pass
};

// One decode pass. Sums and activations are fp32; keys, values and logits are rounded once. A row's logits depend
// neither on the other rows nor on the number of threads. Keys and values are written of all rows; what follows them in
// the last layer is computed of the wanted rows alone.
struct CpuDecode {
    const CpuModel* model;
    CpuCache cache;
    const int64_t* tokens;  // (rows,)
    int rows;
    const int32_t* wanted;  // (wanted_rows,): the rows whose logits are wanted
    int wanted_rows;
    void* logits;           // (wanted_rows, vocab)
    float* memory;          // CpuDecodePath::floats of them
};

struct CpuDecodePath {
    const char* name;
    size_t (*floats)(const CpuModel&, int rows, int threads);
    void (*run)(const CpuDecode&, int threads);  // the caller must hold a PoolLock
    size_t (*packed_floats)(const CpuModel&, const CpuLinear&);  // of a packed copy; 0: the path reads none
    void (*pack)(const CpuModel&, int threads);  // writes all packed copies; the caller must hold a PoolLock
};

#ifdef GPTKERN_X86
namespace avx2 {
const CpuDecodePath& decode_path();
}
namespace avx2_vnni {
const CpuDecodePath& decode_path();
}
namespace avx512 {
const CpuDecodePath& decode_path();
}
namespace avx512_vnni {
const CpuDecodePath& decode_path();
}
namespace avx512_bf16 {
const CpuDecodePath& decode_path();
}
#endif

}  // namespace gptkern
