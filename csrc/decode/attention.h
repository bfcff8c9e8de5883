// Attention over the paged cache, and what is written to it. A row's result depends on no other row.
//
// A sequence's tokens are taken in runs, and a run block by block. Each block gives the queries that see some of it
// weights relative to the largest score so far in its run; where that grew, the sums of before are scaled. The sums of
// runs are merged in the runs' order, whether one thread took them all or several did.
#pragma once

#include "decode/attention_block.h"
#include "decode/pass.h"
#include "decode/row_share.h"

namespace gptkern {
inline namespace GPTKERN_ISA {

template <class Kind>
class Attention {
    using Storage = typename Kind::Storage;

public:
    explicit Attention(const Pass& pass)
        : p_(pass),
          m_(pass.m),
          cache_(pass.call.cache),
          group_(m_.heads / m_.kv_heads),
          run_(run_tokens(m_)),
          width_(padded(m_.head_dim)),
          scores_{p_.own + p_.layout.scores, kTokens},
          keys_{p_.own + p_.layout.keys, width_},
          values_{p_.own + p_.layout.values, kTokens} {}

    // Writes a row's keys and values of some heads to the cache.
    void store_kv(int at, int row, int head, int heads) const {
        const CpuLayer& layer = m_.layer[at];
        const int dim = m_.head_dim, position = length(row);
        const int64_t newest = tokens(row, position, position + 1).at[0];
        const float *const keys = p_.row(Buffer::kQ, row) + m_.q_width(), *const values = keys + m_.kv_width();
        const float rstd = whole_rstd(layer.k_norm, keys, m_.kv_width());
        float* const turned = p_.own + p_.layout.turned;
        for (int h = head; h < head + heads; ++h) {
            Storage* const key = cached(cache_.k, at, h) + newest;
            Storage* const value = cached(cache_.v, at, h) + newest;
            turn(layer, layer.k_norm, rstd, h, position, keys + h * dim, turned);
            for (int i = 0; i < dim; i += kLanes) {
                store_some(key + i, dim - i, load_some(turned + i, dim - i));
                store_some(value + i, dim - i, load_some(values + h * dim + i, dim - i));
            }
        }
    }

    // The attention of some heads of ``rows`` rows, which are consecutive tokens of one sequence: a row's is the same
    // in any company. Heads of several rows read the same keys, and their queries are at most kQueries.
    void attend(int at, int row, int rows, int head, int heads) const {
        const Queries queries{m_.layer[at], at, row, rows, head, heads, vectors(0)};
        const Sums all = sums(p_.rank, 0), next = part(0);
        begin(queries);
        clear(all, queries.count());
        const int end = length(row + rows - 1) + 1;
        for (int run = seen_from(queries.layer, row) / run_; run * run_ < end; ++run) {
            take_run(queries, run, end, next);
            merge(next, all, queries.count());
        }
        finish(queries, all);
    }

    // The attention of the rows that are no neighbours of others in a sequence.
    void attend_alone(int at) const {
        int64_t whole = 0;
        for_alone(at, 0, [&](const RowShare& row) { whole += row.work(); });
        bool split = false;
        for_alone(at, whole, [&](const RowShare& row) {
            take_share(at, row);
            split = split || row.split();
        });
        if (!split) return;
        p_.barrier.wait();
        const int head = p_.share(m_.heads, 1, p_.rank), end = p_.share(m_.heads, 1, p_.rank + 1);
        for_alone(at, whole, [&](const RowShare& row) {
            if (row.split() && head < end) merge_shares(at, row, head, end - head);
        });
    }

    // How many rows from ``row`` on are consecutive tokens of one sequence, ``most`` or fewer.
    int consecutive(int row, int most) const {
        int rows = 1;
        while (rows < most && row + rows < p_.count && follows(row + rows)) ++rows;
        return rows;
    }

private:
    const Pass& p_;
    const CpuModel& m_;
    const CpuCache& cache_;
    const int group_;      // heads that read the same keys and values
    const int run_;        // tokens
    const int64_t width_;  // of a head's row in memory
    const Lines scores_;
    const Strips keys_, values_;

    // Some heads of some rows: a query each, row by row.
    struct Queries {
        const CpuLayer& layer;
        int at, row, rows, head, heads;
        Lines vectors;

        int count() const { return rows * heads; }
    };

    // What some tokens gave queries.
    struct Sums {
        Lines values, totals;  // sums of weighted values, and of weights, over lanes
        float* tops;           // largest scores; before any, -FLT_MAX

        Sums from(int64_t q) const { return {values.from(q), totals.from(q), tops + q}; }
    };

    // Where some tokens lie in the cache.
    struct Tokens {
        int count;
        int64_t at[kTokens];
    };

    // Keys or values of ``count`` tokens or fewer, from one of them on.
    struct Piece {
        void* cache;
        const Tokens& tokens;
        int first, count;
    };

    // Tokens in the cache before a row's own.
    int length(int row) const { return cache_.lengths[p_.place(row)]; }

    const int32_t* pages(int row) const { return cache_.table + p_.place(row) * cache_.table_stride; }

    // Whether a row is the token after that of the row before it.
    bool follows(int row) const {
        if (length(row) != length(row - 1) + 1) return false;
        for (int i = 0; i <= length(row - 1) / cache_.page_size; ++i) {
            if (pages(row)[i] != pages(row - 1)[i]) return false;
        }
        return true;
    }

    // The first token that a row attends to.
    int seen_from(const CpuLayer& layer, int row) const {
        return layer.window > 0 && layer.window <= length(row) ? length(row) + 1 - layer.window : 0;
    }

    // Those that it attends to of a block that begins with the token ``t``.
    Seen seen(const CpuLayer& layer, int row, int t) const {
        return Seen{seen_from(layer, row) - t, length(row) + 1 - t}.within(0, kTokens);
    }

    // Memory of this thread for queries.
    Lines vectors(int first) const { return Lines{p_.own + p_.layout.queries, width_}.from(first); }
    // Memory of any thread for sums: of several runs, of the run at hand, and of those that it leaves to be merged.
    Sums sums(int rank, int64_t first) const {
        float* const own = p_.memory_of(rank);
        const Layout& layout = p_.layout;
        return Sums{{own + layout.means, width_}, {own + layout.totals, kLanes}, own + layout.tops}.from(first);
    }
    Sums part(int first) const { return sums(p_.rank, most_queries(m_) + first); }
    Sums left(int rank, int place, int head) const {
        return sums(rank, 2 * most_queries(m_) + place * m_.heads + head);
    }

    // use(query, row, head) for each of some queries.
    template <class Use>
    void for_queries(const Queries& queries, const Use& use) const {
        for (int q = 0; q < queries.count(); ++q) {
            use(q, queries.row + q / queries.heads, queries.head + q % queries.heads);
        }
    }

    void begin(const Queries& queries) const {
        const CpuLayer& layer = queries.layer;
        const int dim = m_.head_dim;
        float* const turned = p_.own + p_.layout.turned;
        float rstd = 0.0f;
        for (int i = dim; i < width_; ++i) turned[i] = 0.0f;
        for_queries(queries, [&](int q, int row, int head) {
            const float* const from = p_.row(Buffer::kQ, row);
            if (head == queries.head) rstd = whole_rstd(layer.q_norm, from, m_.q_width());
            turn(layer, layer.q_norm, rstd, head, length(row), from + head * dim, turned);
            float* const vector = queries.vectors.row(q);
            for (int i = 0; i < width_; i += kLanes) {
                Units<Kind>::store(vector, i, mul(load(turned + i), all(layer.scale)));
            }
        });
    }

    // Sums of nothing.
    void clear(const Sums& sums, int count) const {
        for (int q = 0; q < count; ++q) {
            for (int i = 0; i < m_.head_dim; i += kLanes) store(sums.values.row(q) + i, zeros());
            store(sums.totals.row(q), zeros());
            sums.tops[q] = -FLT_MAX;
        }
    }

    // Takes what queries see of a run, of which this thread goes on to the token ``until``.
    void take_run(const Queries& queries, int run, int until, const Sums& to) const {
        const int last = queries.row + queries.rows - 1, begin = run * run_;
        const int end = smaller(length(last) + 1, begin + run_);
        int t = larger(seen_from(queries.layer, queries.row) / kTokens * kTokens, begin);
        clear(to, queries.count());
        for (Tokens now = tokens(last, t, end), next; t < end; t += kTokens, now = next) {
            next = tokens(last, t + kTokens, until);
            if (queries.rows > 1) {
                take_block(queries, t, now, next, to);
            } else {
                take_pieces(queries, seen(queries.layer, queries.row, t), now, next, to);
            }
        }
    }

    // Adds the sums of the tokens that come next to those of all before.
    void merge(const Sums& next, const Sums& all, int count) const {
        float less[kLanes], more[kLanes];
        for (int first = 0; first < count; first += kLanes) {
            const int some = smaller(count - first, kLanes);
            const Vec before = load_some(all.tops + first, some), here = load_some(next.tops + first, some);
            const Vec top = larger(before, here);
            store(less, exponential(sub(before, top)));
            store(more, exponential(sub(here, top)));
            for (int i = 0; i < some; ++i) merge_query(next.from(first + i), all.from(first + i), less[i], more[i]);
            store_some(all.tops + first, some, top);
        }
    }

    // The same for one query, with the factors of its two sums. Where one of them has seen nothing, the other is the
    // result as it is: to add 0 may change a sign.
    void merge_query(const Sums& next, const Sums& all, float less, float more) const {
        if (*next.tops == -FLT_MAX) return;
        const bool none = *all.tops == -FLT_MAX;
        const Vec before = gptkern::all(less), here = gptkern::all(more);
        const auto take = [&](float* to, const float* from) {
            store(to, none ? load(from) : fma(load(from), here, mul(load(to), before)));
        };
        take(all.totals.at, next.totals.at);
        for (int i = 0; i < m_.head_dim; i += kLanes) take(all.values.at + i, next.values.at + i);
    }

    // use(row) for each row that is alone.
    template <class Use>
    void for_alone(int at, int64_t whole, const Use& use) const {
        int64_t before = 0;
        for (int row = 0; row < p_.count;) {
            const int rows = consecutive(row, p_.count);
            if (rows == 1) {
                const int from = seen_from(m_.layer[at], row), end = length(row) + 1;
                const RowShare share{row, from, end, run_, m_.heads, p_.threads, whole, before};
                use(share);
                before += share.work();
            }
            row += rows;
        }
    }

    // This thread's units of a row that is alone. If they are the row's first, their runs are merged as they come; else
    // each is left for merge_shares.
    void take_share(int at, const RowShare& row) const {
        const RowShare::Units units = row.units(p_.rank);
        if (units.first == units.last) return;
        const bool merges = units.first == 0 || row.runs() == 1;
        const bool several = units.first / m_.heads < (units.last - 1) / m_.heads;
        const int first = several ? 0 : units.first % m_.heads, count = several ? m_.heads : units.last - units.first;
        const Queries all{m_.layer[at], at, row.row, 1, first, count, vectors(first)};
        begin(all);
        if (merges) clear(sums(p_.rank, first), count);
        const int until = smaller(row.end, (row.first_run() + (units.last - 1) / m_.heads + 1) * run_);
        row.for_runs(units, [&](int run, int head, int heads) {
            const Sums to = merges ? part(head) : left(p_.rank, row.place(run, units), head);
            take_run({all.layer, at, row.row, 1, head, heads, vectors(head)}, run, until, to);
            if (merges) merge(to, sums(p_.rank, head), heads);
        });
        if (merges && !row.split()) finish(all, sums(p_.rank, first));
    }

    // Merges what all threads have of some heads of a row.
    void merge_shares(int at, const RowShare& row, int first, int count) const {
        const Sums to = part(first);
        clear(to, count);
        const auto add = [&](const Sums& of_head, int head, int heads) {
            const int begin = larger(head, first), end = smaller(head + heads, first + count);
            if (begin < end) merge(of_head.from(begin - head), to.from(begin - first), end - begin);
        };
        for (int rank = row.first_rank(); rank <= row.last_rank(); ++rank) {
            const RowShare::Units units = row.units(rank);
            if (units.first == units.last) continue;
            if (units.first == 0) {
                add(sums(rank, 0), 0, smaller(units.last, m_.heads));
                continue;
            }
            row.for_runs(units, [&](int run, int head, int heads) {
                add(left(rank, row.place(run, units), head), head, heads);
            });
        }
        finish({m_.layer[at], at, row.row, 1, first, count, vectors(first)}, to);
    }

    // Takes a block, which begins with the token ``t``, for the queries of several rows.
    void take_block(const Queries& queries, int t, const Tokens& now, const Tokens& next, const Sums& to) const {
        const int dim = m_.head_dim, kv_head = queries.head / group_;
        take_keys<Kind>(cached(cache_.k, queries.at, kv_head), now.at, now.count, dim, keys_);
        take_values<Kind>(cached(cache_.v, queries.at, kv_head), now.at, now.count, dim, values_);
        row_groups<kDown>(queries.count(), [&](int q, auto size) {
            constexpr int R = decltype(size)::value;
            fetch(queries, {cache_.k, next, 0, kTokens}, q, R);
            fetch(queries, {cache_.v, next, 0, kTokens}, q, R);
            Seen own[R];
            int columns = 0;
            for (int i = 0; i < R; ++i) {
                own[i] = seen(queries.layer, queries.row + (q + i) / queries.heads, t);
                columns = larger(columns, own[i].last);
            }
            if (columns == 0) return;
            score<Kind, R>(queries.vectors.from(q), keys_, dim, columns, scores_);
            weigh_tile<R>(scores_, own, to.from(q));
            add_values<Kind, R>(scores_, values_, own, dim, to.from(q).values);
        });
    }

    // The same for one row, which sees ``seen`` of the block. A token's keys of all heads lie together, and so do its
    // values: the heads take turns with a piece of the block after the other.
    void take_pieces(const Queries& queries, Seen seen, const Tokens& now, const Tokens& next, const Sums& to) const {
        const int dim = m_.head_dim, first = seen.first / kPiece * kPiece;
        const auto row_of = [&](int q, int piece) { return Lines{scores_.row(q) + piece, kTokens}; };
        for_pieces(queries, {cache_.k, now, first, seen.last}, {cache_.v, now, first, kPiece}, [&](const Part& part) {
            if (part.queries == 1) {
                float* const scores = row_of(part.query, part.first).at;
                return score_alone<Kind>(queries.vectors.row(part.query), part.from, part.at, part.count, dim, scores);
            }
            take_keys<Kind>(part.from, part.at, part.count, dim, keys_);
            row_groups<kDown>(part.queries, [&](int i, auto size) {
                const int q = part.query + i;
                const Lines scores = row_of(q, part.first);
                score<Kind, decltype(size)::value>(queries.vectors.from(q), keys_, dim, part.count, scores);
            });
        });
        row_groups<kDown>(queries.heads, [&](int q, auto size) {
            const SeenAlike<decltype(size)::value> own(seen);
            weigh_tile<decltype(size)::value>(scores_.from(q), own.at, to.from(q));
        });
        for_pieces(queries, {cache_.v, now, first, seen.last}, {cache_.k, next, 0, kPiece}, [&](const Part& part) {
            const Seen here = seen.within(part.first, part.count);
            const Lines weights = row_of(part.query, part.first / Units<Kind>::kNumbers);
            if (part.queries == 1) {
                float* const sums = to.values.row(part.query);
                return add_values_alone<Kind>(weights.at, part.from, part.at, part.count, here, dim, sums);
            }
            take_values<Kind>(part.from, part.at, part.count, dim, values_);
            row_groups<kDown>(part.queries, [&](int i, auto size) {
                const SeenAlike<decltype(size)::value> own(here);
                const Lines sums = to.values.from(part.query + i);
                add_values<Kind, decltype(size)::value>(weights.from(i), values_, own.at, dim, sums);
            });
        });
    }

    // A kv head's keys or values of a piece, and the queries that meet them.
    struct Part {
        const Storage* from;
        const int64_t* at;  // tokens' offsets
        int first, count;   // of tokens
        int query, queries;
    };

    // use(part) for the kv heads of each piece of kPiece tokens in ``all``, while the next piece comes from memory:
    // ``after`` after the last.
    template <class Use>
    void for_pieces(const Queries& queries, const Piece& all, const Piece& after, const Use& use) const {
        for (int first = all.first; first < all.count; first += kPiece) {
            const int count = smaller(all.tokens.count - first, kPiece);
            const bool last = first + kPiece >= all.count;
            const Piece next = last ? after : Piece{all.cache, all.tokens, first + kPiece, kPiece};
            for (int q = 0; q < queries.heads;) {
                const int head = queries.head + q, some = smaller(group_ - head % group_, queries.heads - q);
                fetch(queries, next, q, some);
                use({cached(all.cache, queries.at, head / group_), all.tokens.at + first, first, count, q, some});
                q += some;
            }
        }
    }

    // Asks memory for a piece that queries will read, while ``count`` of its queries from ``q`` on are computed: for as
    // large a share of it, in the order in which it lies there. Always inline: GCC drops calls of what only prefetches.
    GPTKERN_HD void fetch(const Queries& queries, const Piece& piece, int q, int count) const {
        constexpr int kLine = 64 / sizeof(Storage);
        const int first = queries.head / group_, heads = (queries.head + queries.heads - 1) / group_ + 1 - first;
        const int end = piece.first + piece.count * (q + count) / queries.count();
        for (int t = piece.first + piece.count * q / queries.count(); t < end && t < piece.tokens.count; ++t) {
            const Storage* const at = cached(piece.cache, queries.at, first) + piece.tokens.at[t];
            for (int i = 0; i < heads * m_.head_dim; i += kLine) {
                _mm_prefetch(reinterpret_cast<const char*>(at + i), _MM_HINT_T0);
            }
        }
    }

    // The weights of R queries, in place of their scores.
    template <int R>
    void weigh_tile(const Lines& scores, const Seen* seen, const Sums& to) const {
        float top[kLanes], less[kLanes];
        const Vec before = load(to.tops);
        store(top, before);
        for (int r = 0; r < R; ++r) {
            if (m_.attention_softcap > 0.0f) cap(scores.row(r), seen[r].last);
            top[r] = top_score(scores.row(r), seen[r], top[r]);
        }
        store(less, exponential(sub(before, load(top))));
        for (int r = 0; r < R; ++r) {
            float *const total = to.totals.row(r), *const sums = to.values.row(r);
            to.tops[r] = top[r];
            if (less[r] != 1.0f) {
                store(total, mul(load(total), all(less[r])));
                for (int i = 0; i < m_.head_dim; i += kLanes) store(sums + i, mul(load(sums + i), all(less[r])));
            }
            store(total, add(load(total), weigh<Kind>(scores.row(r), seen[r], top[r])));
        }
    }

    void cap(float* scores, int count) const {
        for (int i = 0; i < count; i += kLanes) store(scores + i, capped(load(scores + i), m_.attention_softcap));
    }

    // The weighted means.
    void finish(const Queries& queries, const Sums& sums) const {
        const int dim = m_.head_dim;
        for_queries(queries, [&](int q, int row, int head) {
            float *const attended = p_.row(Buffer::kAttended, row) + head * dim, *const values = sums.values.row(q);
            const Vec inverse = all(1.0f / sum(load(sums.totals.row(q))));
            for (int i = 0; i < dim; i += kLanes) {
                store_some(attended + i, dim - i, mul(load(values + i), inverse));
            }
        });
    }

    // The reciprocal root mean square of all heads of queries or keys, where their norm is of all together; else 0.
    float whole_rstd(const void* norm, const float* heads, int width) const {
        float mean, rstd = 0.0f;
        if (norm != nullptr && m_.whole_qk_norm) moments(heads, width, true, m_.eps, mean, rstd);
        return rstd;
    }

    // What a norm multiplies element i by.
    float factor(const void* weight, int i) const {
        const float value = Kind::load(static_cast<const Storage*>(weight)[i]);
        return m_.unit_offset ? 1.0f + value : value;
    }

    // One head of queries or keys, normed and rotated where the layer does. ``rstd`` is ``whole_rstd``.
    void turn(const CpuLayer& layer, const void* norm, float rstd, int head, int position, const float* from,
              float* to) const {
        const int dim = m_.head_dim, half = layer.rotary / 2, start = m_.whole_qk_norm ? head * dim : 0;
        float mean;
        if (norm != nullptr && !m_.whole_qk_norm) moments(from, dim, true, m_.eps, mean, rstd);
        for (int i = 0; i < dim; ++i) to[i] = norm == nullptr ? from[i] : from[i] * rstd * factor(norm, start + i);
        const int64_t place = static_cast<int64_t>(position) * half;
        const int step = layer.interleaved ? 2 : 1, apart = layer.interleaved ? 1 : half;
        for (int i = 0; i < half; ++i) {
            const float cos = layer.cos[place + i], sin = layer.sin[place + i];
            const float first = to[i * step], second = to[i * step + apart];
            to[i * step] = first * cos - second * sin;
            to[i * step + apart] = second * cos + first * sin;
        }
    }

    // Up to kTokens tokens of a row's sequence, from ``first`` on and before ``end``, by the page table.
    Tokens tokens(int row, int first, int end) const {
        Tokens found;
        found.count = larger(smaller(end - first, kTokens), 0);
        const int32_t* page = pages(row) + first / cache_.page_size;
        for (int i = 0, place = first % cache_.page_size; i < found.count; place = 0, ++page) {
            const int64_t at = *page * cache_.page_stride + place * cache_.slot_stride;
            const int some = smaller(cache_.page_size - place, found.count - i);
            for (int j = 0; j < some; ++j) found.at[i + j] = at + j * cache_.slot_stride;
            i += some;
        }
        return found;
    }

    Storage* cached(void* cache, int layer, int kv_head) const {
        return static_cast<Storage*>(cache) + layer * cache_.layer_stride + kv_head * m_.head_dim;
    }
};

}  // namespace GPTKERN_ISA
}  // namespace gptkern
