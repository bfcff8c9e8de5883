// Feeds the CPU path random rows, good and bad, under whatever sanitizers it is compiled with, and checks
// what must hold for every row: a token inside the vocabulary that the row allows, or a status.
//
//     fuzz_sampling ROWS THREADS
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

#include "sampling/cpu_path.h"

using namespace gptkern;

namespace {

std::mt19937_64 engine(1);

int below(int n) { return static_cast<int>(engine() % static_cast<uint64_t>(n)); }
bool chance(int in) { return below(in) == 0; }
double unit() { return static_cast<double>(engine() >> 11) * 0x1p-53; }

float random_logit(int kind) {
    switch (kind) {
        case 0: return static_cast<float>(unit() * 8 - 4);
        case 1: return static_cast<float>(below(3));
        case 2: return static_cast<float>((unit() - 0.5) * 1e38);
        case 3: return static_cast<float>(unit() * 1e-42);
        case 4: return chance(2) ? -INFINITY : 1.0f;
        default: {  // any bits at all: NaN and infinities too
            const uint32_t bits = static_cast<uint32_t>(engine());
            float f;
            __builtin_memcpy(&f, &bits, sizeof(f));
            return f;
        }
    }
}

RowParams random_params(int vocab) {
    RowParams p{1, 0, 1, 0, 1, 0, 0, 1, 0, 0, 0, 0};
    if (chance(2)) p.temperature = chance(4) ? 0 : std::exp(unit() * 40 - 20);
    if (chance(2)) p.top_k = below(vocab + 1);
    if (chance(2)) p.top_p = unit() + 1e-9;
    if (chance(4)) p.min_p = unit();
    if (chance(4)) p.typical_p = unit() + 1e-9;
    if (chance(4)) p.epsilon_cutoff = unit() * 0.99;
    if (chance(4)) p.eta_cutoff = unit() * 0.99;
    if (chance(4)) p.repetition_penalty = 0.1 + unit() * 2;
    if (chance(4)) p.presence_penalty = unit() * 4 - 2;
    if (chance(4)) p.frequency_penalty = unit() * 4 - 2;
    if (chance(4)) p.min_new_tokens = below(5);
    p.n_logprobs = below(vocab < 4 ? vocab + 1 : 4);
    if (chance(20)) reinterpret_cast<double*>(&p)[below(12)] = std::numeric_limits<double>::quiet_NaN();
    if (chance(20)) reinterpret_cast<double*>(&p)[below(12)] = unit() * 1e300 - 5e299;
    return p;
}

std::vector<int32_t> random_ids(int n, int vocab) {
    std::vector<int32_t> ids(static_cast<size_t>(n));
    for (auto& id : ids) id = chance(3) ? -1 : chance(500) ? vocab + below(100) : below(vocab);
    return ids;
}

[[noreturn]] void fail(const char* what, int row) {
    std::printf("row %d: %s\n", row, what);
    std::exit(1);
}

void one_batch(int threads) {
    const int batch = 1 + below(32), vocab = 1 + below(chance(8) ? 3000 : 40);
    const bool speculate = chance(3);
    const int positions = speculate ? 1 + below(4) : 1;
    const size_t rows = static_cast<size_t>(batch), tokens = static_cast<size_t>(vocab);
    std::vector<float> logits(rows * positions * tokens);
    for (size_t i = 0; i < logits.size();) {
        const int kind = chance(30) ? 5 : below(5);
        for (size_t j = 0; j < tokens; ++j) logits[i++] = random_logit(kind);
    }
    std::vector<RowParams> params;
    for (int i = 0; i < batch; ++i) params.push_back(random_params(vocab));
    std::vector<RowCounter> counters(rows, RowCounter{static_cast<int64_t>(engine()), below(9), below(9)});
    std::vector<int32_t> counts(rows * tokens);
    for (auto& c : counts) c = chance(3) ? below(4) + (chance(2) ? kInPrompt : 0) : 0;
    const auto bias = random_ids(batch * 3, vocab), banned = random_ids(batch * 2, vocab), eos = random_ids(batch, vocab);
    std::vector<float> bias_values(rows * 3, 1.5f);
    const int words = (vocab + 31) / 32;
    std::vector<int32_t> mask(rows * static_cast<size_t>(words));
    for (auto& word : mask) word = static_cast<int32_t>(engine() | engine());
    std::vector<int64_t> out(rows * positions), top_tokens(rows * 4), accepted(rows), drafts(rows * 3);
    std::vector<float> logprobs(rows), top_logprobs(rows * 4), draft_probs(rows * 3 * tokens, 1.0f / vocab);
    std::vector<int32_t> status(rows);
    for (auto& token : drafts) token = chance(500) ? vocab : below(vocab);
    std::vector<int64_t> lengths(rows);
    for (auto& length : lengths) length = chance(200) ? below(99) - 50 : below(positions);
    if (chance(10)) draft_probs[below(static_cast<int>(draft_probs.size()))] = NAN;

    SampleArguments a{};
    a.logits = logits.data();
    a.row_stride = static_cast<int64_t>(positions) * vocab;
    a.position_stride = vocab;
    a.batch = batch;
    a.positions = positions;
    a.vocab = vocab;
    a.params = params.data();
    a.counters = counters.data();
    a.counts = chance(4) ? nullptr : counts.data();
    if (chance(2)) a.bias = {bias.data(), 3}, a.bias_values = bias_values.data();
    if (chance(2)) a.banned = {banned.data(), 2};
    if (chance(2)) a.eos = {eos.data(), 1};
    if (chance(2)) a.bitmask = mask.data(), a.bitmask_words = words;
    a.logprobs = speculate || chance(2) ? -1 : 4;
    a.tokens = out.data();
    a.token_logprobs = logprobs.data();
    a.top_tokens = top_tokens.data();
    a.top_logprobs = top_logprobs.data();
    a.status = status.data();
    a.commit = Commit::kYes;
    if (speculate) {
        a.draft_tokens = drafts.data();
        a.draft_probs = chance(2) ? draft_probs.data() : nullptr;
        a.draft_lengths = chance(2) ? lengths.data() : nullptr;
        a.accepted = accepted.data();
    }
    portable::cpu_path().sample(a, threads);
    for (int row = 0; row < batch; ++row) {
        const int given = speculate ? static_cast<int>(accepted[row]) + 1 : 1;
        if (given < 1 || given > positions) fail("a wrong number of tokens", row);
        if (a.draft_lengths && status[row] == kOk && given > lengths[row] + 1) fail("more than were drafted", row);
        for (int i = 0; i < given; ++i) {
            const int64_t token = out[static_cast<size_t>(row * positions + i)];
            if (token < 0 || token >= vocab) fail("a token outside the vocabulary", row);
            if (status[row] != kOk) continue;
            if (a.bitmask && !(static_cast<uint32_t>(mask[row * words + token / 32]) >> (token % 32) & 1)) {
                fail("a token that the bitmask bans", row);
            }
        }
        if (status[row] < 0 || status[row] > kBadDraftLength) fail("an unknown status", row);
    }
}

}  // namespace

int main(int argc, char** argv) {
    const int rows = argc > 1 ? std::atoi(argv[1]) : 10000;
    const int threads = argc > 2 ? std::atoi(argv[2]) : 1;
    for (int done = 0; done < rows; done += 16) one_batch(threads);  // batches hold 16.5 rows on average
    std::printf("%d rows\n", rows);
}
