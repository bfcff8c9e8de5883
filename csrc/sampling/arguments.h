// The arguments of a sampler call: pointers and sizes, in the layout of gptkern.ops.SamplingParams and SamplerState.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace gptkern {

// The vocabulary's limit when sampling: sums of weights, each at most 2^44, must stay below 2^63.
constexpr int kMaxVocab = 1 << 19;

// The bits of a token id in the sort. The top-k call, which sums in two halves, takes any id of so many bits.
constexpr int kIdBits = 24;
constexpr int kMaxVocabTopK = 1 << kIdBits;

struct RowParams {
    double temperature, top_k, top_p, min_p, typical_p, epsilon_cutoff, eta_cutoff;
    double repetition_penalty, presence_penalty, frequency_penalty, min_new_tokens, n_logprobs;
};

struct RowCounter {
    int64_t seed, request, step;
};

// counts[row, token] is the number of times the row generated the token, plus this bit if its prompt holds it.
constexpr int32_t kInPrompt = 1 << 30;

// A row's status: 0, or the reason why it could not be sampled.
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
    kBadDraftProbs,
    kBadDraftLength,
};

// A (batch, width) matrix of token ids, one row for each sequence, padded with -1.
struct IdLists {
    const int32_t* ids;
    int width;
};

// Whether a call advances counters and counts. kOnly advances them for the tokens of an earlier call.
enum class Commit : int { kNo = 0, kYes = 1, kOnly = 2 };

struct SampleArguments {
    const void* logits;  // (batch, positions, vocab); positions is 1 unless drafts are verified
    int64_t row_stride, position_stride;
    DType dtype;
    int batch, positions, vocab;

    const RowParams* params;      // (batch)
    RowCounter* counters;         // (batch)
    int32_t* counts;              // (batch, vocab) or null
    IdLists bias, banned, eos;    // null ids: no list
    const float* bias_values;     // like bias.ids
    const int32_t* bitmask;       // (batch, bitmask_words), bit 1 = allowed, or null
    int64_t bitmask_words;

    int logprobs;                 // width of the top arrays; -1: no log-probabilities at all
    int64_t* tokens;              // (batch), or (batch, positions) if drafts are verified
    float* token_logprobs;        // (batch)
    int64_t* top_tokens;          // (batch, logprobs)
    float* top_logprobs;          // (batch, logprobs)
    int32_t* status;              // (batch)
    float* probs;                 // (batch, vocab): the distribution, written instead of a draw, or null

    int64_t* accepted;            // (batch): number of accepted draft tokens; null: no drafts
    const int64_t* draft_tokens;  // (batch, positions - 1); may be null if that is empty
    const float* draft_probs;     // (batch, positions - 1, vocab) or null: the draft is certain
    const int64_t* draft_lengths; // (batch): drafted tokens of each row, 0 to positions - 1; null: all of them
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
