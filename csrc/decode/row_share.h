// How the threads of a pass share the attention of rows, each of which is alone in its sequence. A row's tokens are
// taken in runs, and its units are (run, head) pairs in that order, as a token's keys of all heads lie together. Each
// thread has one stretch of all rows' units, of nearly as many tokens as the others.
#pragma once

#include <cstdint>

#include "common/platform.h"

namespace gptkern {
inline namespace GPTKERN_ISA {

struct RowShare {
    int row, from, end;  // the tokens that it sees: [from, end)
    int run, heads;      // tokens of a run, heads of a row
    int threads;
    int64_t whole, before;  // the work of all rows, and of those before this one: tokens times heads

    struct Units {
        int first, last;
    };

    int first_run() const { return from / run; }
    int64_t work() const { return static_cast<int64_t>(end - from) * heads; }
    int runs() const { return (end - 1) / run - first_run() + 1; }

    // The units that a thread has.
    Units units(int rank) const { return {unit(edge(rank) - before), unit(edge(rank + 1) - before)}; }

    // A run's place among those of which a thread has units.
    int place(int run, const Units& units) const { return run - first_run() - units.first / heads; }

    // The threads that may have some of it: [first, last].
    int first_rank() const { return rank_of(before); }
    int last_rank() const { return rank_of(before + work() - 1); }

    // Whether several threads have its runs. A thread's part may be less than a unit: then it is the next thread's.
    bool split() const {
        if (runs() == 1) return false;
        int rank = first_rank();
        while (units(rank).last == 0) ++rank;
        return units(rank).last < runs() * heads;
    }

    // use(run, head, heads) for units: runs of the sequence in order, and some of the heads of each.
    template <class Use>
    void for_runs(const Units& units, const Use& use) const {
        for (int unit = units.first; unit < units.last;) {
            const int head = unit % heads, left = units.last - unit;
            const int some = left < heads - head ? left : heads - head;
            use(first_run() + unit / heads, head, some);
            unit += some;
        }
    }

private:
    // Where a thread's work begins.
    int64_t edge(int rank) const { return whole * rank / threads; }

    int rank_of(int64_t at) const {
        int rank = static_cast<int>(at * threads / whole);
        while (edge(rank + 1) <= at) ++rank;
        return rank;
    }

    // The unit that is done where so much work is.
    int unit(int64_t at) const {
        if (at <= 0) return 0;
        if (at >= work()) return runs() * heads;
        const int now = (from + static_cast<int>(at / heads)) / run;
        const int first = now * run > from ? now * run : from, last = now * run + run < end ? now * run + run : end;
        const int64_t done = at - static_cast<int64_t>(first - from) * heads;
        return (now - first_run()) * heads + static_cast<int>(done / (last - first));
    }
};

}  // namespace GPTKERN_ISA
}  // namespace gptkern
