// The CPU path: rows in parallel, and within a row its vocabulary where there are threads to spare.
//
// Compiled once for every instruction set that is worth it; bindings.cpp picks one at run time. Of the
// standard library it uses only what leaves no shared inline code behind.
#include <cstdlib>
#include <new>

#include "cpu_team.h"
#include "isa.h"
#include "sampling.h"
#include "speculation.h"
#include "threads.h"

namespace gptkern {
inline namespace GPTKERN_ISA {
namespace {

// Below this many tokens a second thread on a row costs more than it saves.
constexpr int kVocabPerThread = 16384;

struct Memory {
    TeamMemory* teams = nullptr;
    int team_count = 0, threads_per_team = 0, vocab = 0;
};

Memory memory;

void* allocate(size_t bytes) {
    void* p = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (p == nullptr) throw std::bad_alloc();
    return p;
}

// Grows the working memory where a call needs more than any before.
void reserve(int teams, int threads, int vocab) {
    if (teams > memory.team_count || threads > memory.threads_per_team || vocab > memory.vocab) {
        for (int i = 0; i < memory.team_count; ++i) {
            std::free(memory.teams[i].bin_weights);
            std::free(memory.teams[i].values);
            std::free(memory.teams[i].widened);
            std::free(memory.teams[i].list);
        }
        std::free(memory.teams);
        const int count = teams > memory.team_count ? teams : memory.team_count;
        memory.team_count = 0;
        const int wide = threads > memory.threads_per_team ? threads : memory.threads_per_team;
        const int long_row = vocab > memory.vocab ? vocab : memory.vocab;
        memory.teams = static_cast<TeamMemory*>(allocate(sizeof(TeamMemory) * count));
        for (int i = 0; i < count; ++i) {
            TeamMemory& team = *new (&memory.teams[i]) TeamMemory{};
            team.bin_weights = static_cast<uint64_t*>(allocate(sizeof(uint64_t) * kCoarseBins * wide));
            team.values = static_cast<float*>(allocate(sizeof(float) * long_row));
            team.widened = static_cast<float*>(allocate(sizeof(float) * long_row));
            team.list = static_cast<uint32_t*>(allocate(sizeof(uint32_t) * long_row));
        }
        memory.team_count = count;
        memory.threads_per_team = wide;
        memory.vocab = long_row;
    }
    for (int i = 0; i < teams; ++i) memory.teams[i].threads = threads;
}

// Runs row_work(team, row, buffers) for every row.
template <class RowWork>
void over_rows(int rows, int vocab, int threads, RowWork row_work) {
    const int usable = threads < kMaxTeam ? threads : kMaxTeam;
    const int teams = rows < usable ? rows : usable;
    int wide = usable / teams;
    const int worth = vocab / kVocabPerThread > 1 ? vocab / kVocabPerThread : 1;
    wide = wide < worth ? wide : worth;
    reserve(teams, wide, vocab);
    struct Context {
        RowWork& work;
        int rows, teams, wide;
    } context{row_work, rows, teams, wide};
    const auto one_thread = [](void* opaque, int thread) {
        const Context& c = *static_cast<Context*>(opaque);
        const int index = thread / c.wide;
        CpuTeam team(memory.teams[index], thread % c.wide);
        for (int row = index; row < c.rows; row += c.teams) {
            c.work(team, row, {memory.teams[index].values, memory.teams[index].widened});
            team.sync();
        }
    };
    run_together(teams * wide, one_thread, &context);
}

// Commits only where every row could be sampled, so that a refused call changes nothing.
void sample(const SampleArguments& asked, int threads) {
    const Call call;
    SampleArguments a = asked;
    a.commit = Commit::kNo;
    over_rows(a.batch, a.vocab, threads, [&](CpuTeam& team, int row, const Buffers& buffers) {
        if (a.draft_tokens != nullptr) {
            speculate_row(team, a, row, buffers);
        } else {
            sample_row(team, a, row, buffers);
        }
    });
    if (asked.commit == Commit::kNo) return;
    for (int row = 0; row < a.batch; ++row) {
        if (a.status[row] != kOk) return;
    }
    for (int row = 0; row < a.batch; ++row) commit_row(a, row);
}

void top_k(const TopKArguments& a, int threads) {
    const Call call;
    over_rows(a.rows, a.vocab, threads,
              [&](CpuTeam& team, int row, const Buffers& buffers) { top_k_row(team, a, row, buffers); });
}

uint64_t weight(double halvings) { return weight_of(halvings); }

void both_uniforms(int64_t seed, int64_t request, int64_t step, uint64_t* token, uint64_t* accept) {
    const Uniforms u = uniforms(seed, request, step);
    *token = u.token;
    *accept = u.accept;
}

#define GPTKERN_NAME_OF(isa) #isa
#define GPTKERN_NAME(isa) GPTKERN_NAME_OF(isa)
const CpuPath path = {GPTKERN_NAME(GPTKERN_ISA), sample, top_k, weight, both_uniforms};

}  // namespace

const CpuPath& cpu_path() { return path; }

}  // namespace GPTKERN_ISA
}  // namespace gptkern
