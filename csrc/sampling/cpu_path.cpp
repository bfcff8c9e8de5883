// The CPU path: threads take rows in parallel, and with threads to spare they share a row's vocabulary.
//
// It is compiled once for each instruction set, and bindings.cpp picks one at run time. From the standard library
// it uses only what leaves no shared inline code behind.
#include <cstdlib>
#include <new>

#include "common/threads.h"
#include "sampling/cpu_path.h"
#include "sampling/cpu_team.h"
#include "sampling/speculation.h"

namespace gptkern {
inline namespace GPTKERN_ISA {
namespace {

// Below this many tokens a second thread on a row costs more than it saves.
constexpr int kVocabPerThread = 16384;

struct Memory {
    TeamMemory* teams = nullptr;  // one allocation: the teams, then their buffers
    int team_count = 0, threads_per_team = 0, vocab = 0;
};

Memory memory;

size_t padded(size_t bytes) { return (bytes + 63) / 64 * 64; }

// Takes ``count`` elements of type T from the free memory at ``next``.
template <class T>
T* take(char*& next, size_t count) {
    T* const taken = reinterpret_cast<T*>(next);
    next += padded(count * sizeof(T));
    return taken;
}

int larger(int a, int b) { return a > b ? a : b; }

// Grows the working memory if a call needs more than any before. It throws if there is none, and the next call
// starts from an empty one.
void reserve(int teams, int threads, int vocab) {
    if (teams > memory.team_count || threads > memory.threads_per_team || vocab > memory.vocab) {
        Memory size;
        size.team_count = larger(teams, memory.team_count);
        size.threads_per_team = larger(threads, memory.threads_per_team);
        size.vocab = larger(vocab, memory.vocab);
        std::free(memory.teams);
        memory = Memory{};
        const size_t bins = static_cast<size_t>(kCoarseBins) * size.threads_per_team, row = size.vocab;
        const size_t buffers = padded(bins * sizeof(uint64_t)) + 4 * padded(row * sizeof(float));
        const size_t bytes = padded(sizeof(TeamMemory) * size.team_count) + buffers * size.team_count;
        char* next = static_cast<char*>(std::aligned_alloc(64, bytes));
        if (next == nullptr) throw std::bad_alloc();
        size.teams = take<TeamMemory>(next, size.team_count);
        for (int i = 0; i < size.team_count; ++i) {
            TeamMemory& team = *new (&size.teams[i]) TeamMemory{};
            team.bin_weights = take<uint64_t>(next, bins);
            team.values = take<float>(next, row);
            team.widened = take<float>(next, row);
            team.list = take<uint32_t>(next, row);
            team.tops = take<uint32_t>(next, row);
        }
        memory = size;
    }
    for (int i = 0; i < teams; ++i) memory.teams[i].barrier.threads = threads;
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
    const auto one_thread = [](void* opaque, int thread) noexcept {
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

// Commits only if every row could be sampled, so that a refused call changes nothing.
void sample(const SampleArguments& arguments, int threads) {
    const PoolLock lock;
    SampleArguments a = arguments;
    a.commit = Commit::kNo;
    over_rows(a.batch, a.vocab, threads, [&](CpuTeam& team, int row, const Buffers& buffers) {
        if (a.accepted != nullptr) {
            speculate_row(team, a, row, buffers);
        } else {
            sample_row(team, a, row, buffers);
        }
    });
    if (arguments.commit == Commit::kNo) return;
    for (int row = 0; row < a.batch; ++row) {
        if (a.status[row] != kOk) return;
    }
    for (int row = 0; row < a.batch; ++row) commit_row(a, row);
}

void top_k(const TopKArguments& a, int threads) {
    const PoolLock lock;
    over_rows(a.rows, a.vocab, threads,
              [&](CpuTeam& team, int row, const Buffers& buffers) { top_k_row(team, a, row, buffers); });
}

uint64_t weight(double halvings) { return weight_of(halvings); }

void both_uniforms(int64_t seed, int64_t request, int64_t step, uint64_t* token, uint64_t* accept) {
    const Uniforms u = uniforms(seed, request, step);
    *token = u.token;
    *accept = u.accept;
}

const CpuPath path = {GPTKERN_ISA_NAME, sample, top_k, weight, both_uniforms};

}  // namespace

const CpuPath& cpu_path() { return path; }

}  // namespace GPTKERN_ISA
}  // namespace gptkern
