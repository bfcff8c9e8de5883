// What a call hands over: raw pointers and sizes, in the layout of gptkern.ops.SamplingParams and SamplerState.
#pragma once

#include <cstdint>

namespace gptkern {

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// Sums of 2^44-scaled weights must stay below 2^63.
constexpr int kMaxVocab = 1 << 19;

// Ids are sorted by so many bits. The best tokens of a row and their log-softmax may be asked of as many tokens.
constexpr int kIdBits = 24;

struct RowParams {
    double temperature, top_k, top_p, min_p, typical_p, epsilon_cutoff, eta_cutoff;
    double repetition_penalty, presence_penalty, frequency_penalty, min_new_tokens, n_logprobs;
};

struct RowCounter {
    int64_t seed, request, step;
};

// counts[row, token]: how often the row generated the token, and whether its prompt holds it.
constexpr int32_t kInPrompt = 1 << 30;

enum Status : int32_t {
    kOk = 0,
    kNaN,
    kInfinite,
    kNothingAllowed,
    kBadTemperature,
    kBadTopK,
    kBadTopP,
    kBadMinP,
    kBadTypicalP,
    kBadEpsilonCutoff,
    kBadEtaCutoff,
    kBadRepetitionPenalty,
    kBadPresencePenalty,
    kBadFrequencyPenalty,
    kBadMinNewTokens,
    kBadLogprobs,
    kNeedsCounts,
    kBadTokenId,
    kBadDraft,
};

// A matrix of token ids, one row per sequence, padded with -1.
struct IdLists {
    const int32_t* ids;
    int width;
};

// Whether a call advances counters and counts; kOnly does that alone, for tokens chosen before.
enum class Commit : int { kNo = 0, kYes = 1, kOnly = 2 };

struct SampleArguments {
    const void* logits;  // (batch, positions, vocab); positions is 1 but for speculation
    int64_t row_stride, position_stride;
    DType dtype;
    int batch, positions, vocab;

    const RowParams* params;      // (batch)
    RowCounter* counters;         // (batch)
    int32_t* counts;              // (batch, vocab) or null
    IdLists bias, banned, eos;    // null ids: none
    const float* bias_values;     // like bias.ids
    const int32_t* bitmask;       // (batch, bitmask_words), bit 1 = allowed, or null
    int64_t bitmask_words;

    int logprobs;                 // width of the top arrays; -1: no log-probabilities at all
    int64_t* tokens;              // (batch), or (batch, positions) when speculating
    float* token_logprobs;        // (batch)
    int64_t* top_tokens;          // (batch, logprobs)
    float* top_logprobs;          // (batch, logprobs)
    int32_t* status;              // (batch)
    float* probs;                 // (batch, vocab): write the distribution instead of drawing, or null

    int64_t* accepted;            // (batch): how many drafted tokens were accepted; null: no speculation
    const int64_t* draft_tokens;  // (batch, positions - 1), whose address may be null where that is empty
    const float* draft_probs;     // (batch, positions - 1, vocab) or null: the draft is certain
    Commit commit;
};

struct TopKArguments {
    const void* logits;  // (rows, vocab)
    int64_t row_stride;
    DType dtype;
    int rows, vocab, k;
    int64_t* tokens;     // (rows, k)
    float* logprobs;     // (rows, k)
    int32_t* status;     // (rows)
};

}  // namespace gptkern
