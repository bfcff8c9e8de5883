#include "constants.h"

#include <cstddef>

#include "decode/model.h"
#include "sampling/arguments.h"

namespace gptkern {
namespace {

namespace py = pybind11;

template <typename Number>
struct Named {
    const char* name;
    Number number;
};

// {name: number}, in the order of the numbers here.
template <typename Number, size_t n>
py::dict table(const Named<Number> (&entries)[n]) {
    py::dict numbers;
    for (const auto& [name, number] : entries) numbers[name] = static_cast<int>(number);
    return numbers;
}

constexpr Named<Activation> kActivations[] = {{"gelu_tanh", Activation::kGeluTanh},
                                              {"gelu", Activation::kGelu},
                                              {"relu", Activation::kRelu},
                                              {"silu", Activation::kSilu}};

constexpr Named<StageKind> kStages[] = {{"embed", StageKind::kEmbed},
                                        {"qkv", StageKind::kQkv},
                                        {"attention", StageKind::kAttention},
                                        {"linear", StageKind::kLinear},
                                        {"add_norm", StageKind::kAddNorm}};

constexpr Named<Buffer> kBufferNames[] = {{"none", Buffer::kNone},
                                          {"x", Buffer::kX},
                                          {"q", Buffer::kQ},
                                          {"attended", Buffer::kAttended},
                                          {"branch", Buffer::kBranch},
                                          {"middle", Buffer::kMiddle},
                                          {"inner", Buffer::kInner},
                                          {"normed_x", Buffer::kNormedX},
                                          {"normed_middle", Buffer::kNormedMiddle},
                                          {"logits", Buffer::kLogits}};

constexpr Named<Commit> kCommits[] = {{"no", Commit::kNo}, {"yes", Commit::kYes}, {"only", Commit::kOnly}};

constexpr Named<Status> kStatuses[] = {{"ok", kOk},
                                       {"nan", kNaN},
                                       {"infinite", kInfinite},
                                       {"nothing_allowed", kNothingAllowed},
                                       {"needs_counts", kNeedsCounts},
                                       {"bad_token_id", kBadTokenId},
                                       {"bad_draft", kBadDraft},
                                       {"bad_draft_probs", kBadDraftProbs},
                                       {"bad_draft_length", kBadDraftLength}};

// The columns of a row, by their position in its struct.
#define GPTKERN_COLUMN(row, name) Named<size_t>{#name, offsetof(row, name) / sizeof(row::name)}

constexpr Named<size_t> kParameters[] = {
    GPTKERN_COLUMN(RowParams, temperature),       GPTKERN_COLUMN(RowParams, top_k),
    GPTKERN_COLUMN(RowParams, top_p),             GPTKERN_COLUMN(RowParams, min_p),
    GPTKERN_COLUMN(RowParams, typical_p),         GPTKERN_COLUMN(RowParams, epsilon_cutoff),
    GPTKERN_COLUMN(RowParams, eta_cutoff),        GPTKERN_COLUMN(RowParams, repetition_penalty),
    GPTKERN_COLUMN(RowParams, presence_penalty),  GPTKERN_COLUMN(RowParams, frequency_penalty),
    GPTKERN_COLUMN(RowParams, min_new_tokens),    GPTKERN_COLUMN(RowParams, n_logprobs)};

constexpr Named<size_t> kCounters[] = {GPTKERN_COLUMN(RowCounter, seed), GPTKERN_COLUMN(RowCounter, request),
                                       GPTKERN_COLUMN(RowCounter, step)};

#undef GPTKERN_COLUMN

}  // namespace

void export_constants(py::module_& module) {
    module.attr("interface") = kInterface;
    module.attr("activations") = table(kActivations);
    module.attr("stages") = table(kStages);
    module.attr("buffers") = table(kBufferNames);
    module.attr("commits") = table(kCommits);
    module.attr("statuses") = table(kStatuses);
    module.attr("parameters") = table(kParameters);
    module.attr("counters") = table(kCounters);
    module.attr("in_prompt") = kInPrompt;
    module.attr("max_vocab") = kMaxVocab;
    module.attr("max_vocab_top_k") = kMaxVocabTopK;
}

}  // namespace gptkern
