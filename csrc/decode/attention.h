// Attention over the paged cache, and what is written to it. A row's result depends on no other row.
//
// Blocks of a sequence's tokens are taken in order. Each gives the queries that see some of it weights relative to the
// largest score so far; where that grew, the sums of before are scaled.
#pragma once

#include "decode/attention_block.h"
#include "decode/pass.h"

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
        const Run run{m_.layer[at], at, row, rows, head, heads};
        begin(run);
        const int end = length(row + rows - 1) + 1;
        int t = seen_from(run.layer, row) / kTokens * kTokens;
        for (Tokens now = tokens(row + rows - 1, t, end), next; t < end; t += kTokens, now = next) {
            next = tokens(row + rows - 1, t + kTokens, end);
            if (rows > 1) {
                take_block(run, t, now, next);
            } else {
                take_pieces(run, seen(run.layer, row, t), now, next);
            }
        }
        finish(run);
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
    const int64_t width_;  // of a head's row in memory
    const Lines scores_;
    const Strips keys_, values_;

    // Some heads of some rows: a query each, row by row.
    struct Run {
        const CpuLayer& layer;
        int at, row, rows, head, heads;

        int queries() const { return rows * heads; }
    };

    // Queries, and what blocks gave them so far.
    struct Queries {
        Lines vectors, sums, totals;  // totals: sums of weights, over lanes
        float* tops;                  // largest scores
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

    Queries queries(int first) const {
        const Layout& layout = p_.layout;
        const auto lines = [&](int64_t at, int64_t stride) { return Lines{p_.own + at, stride}.from(first); };
        return {lines(layout.queries, width_), lines(layout.means, width_), lines(layout.totals, kLanes),
                p_.own + layout.tops + first};
    }

    // use(query, row, head) for each query of a run.
    template <class Use>
    void for_queries(const Run& run, const Use& use) const {
        for (int q = 0; q < run.queries(); ++q) use(q, run.row + q / run.heads, run.head + q % run.heads);
    }

    // The queries of a run, before their first block.
    void begin(const Run& run) const {
        const CpuLayer& layer = run.layer;
        const int dim = m_.head_dim;
        float* const turned = p_.own + p_.layout.turned;
        float rstd = 0.0f;
        for_queries(run, [&](int q, int row, int head) {
            const float* const from = p_.row(Buffer::kQ, row);
            if (head == run.head) rstd = whole_rstd(layer.q_norm, from, m_.q_width());
            turn(layer, layer.q_norm, rstd, head, length(row), from + head * dim, turned);
            const Queries own = queries(q);
            for (int i = 0; i < dim; i += kLanes) {
                Units<Kind>::store(own.vectors.at, i, mul(load_some(turned + i, dim - i), all(layer.scale)));
                store(own.sums.at + i, zeros());
            }
            store(own.totals.at, zeros());
            *own.tops = -FLT_MAX;
        });
    }

    // Takes a block, which begins with the token ``t``, for the queries of several rows.
    void take_block(const Run& run, int t, const Tokens& now, const Tokens& next) const {
        const int dim = m_.head_dim, kv_head = run.head / group_;
        take_keys<Kind>(cached(cache_.k, run.at, kv_head), now.at, now.count, dim, keys_);
        take_values<Kind>(cached(cache_.v, run.at, kv_head), now.at, now.count, dim, values_);
        row_groups<kDown>(run.queries(), [&](int q, auto size) {
            constexpr int R = decltype(size)::value;
            fetch(run, {cache_.k, next, 0, kTokens}, q, R);
            fetch(run, {cache_.v, next, 0, kTokens}, q, R);
            Seen own[R];
            int columns = 0;
            for (int i = 0; i < R; ++i) {
                own[i] = seen(run.layer, run.row + (q + i) / run.heads, t);
                columns = larger(columns, own[i].last);
            }
            if (columns == 0) return;
            score<Kind, R>(queries(q).vectors, keys_, dim, columns, scores_);
            weigh_tile<R>(scores_, own, queries(q));
            add_values<Kind, R>(scores_, values_, own, dim, queries(q).sums);
        });
    }

    // The same for one row, which sees ``seen`` of the block. A token's keys of all heads lie together, and so do its
    // values: the heads take turns with a piece of the block after the other.
    void take_pieces(const Run& run, Seen seen, const Tokens& now, const Tokens& next) const {
        const int dim = m_.head_dim, first = seen.first / kPiece * kPiece;
        const auto row_of = [&](int q, int piece) { return Lines{scores_.row(q) + piece, kTokens}; };
        for_pieces(run, {cache_.k, now, first, seen.last}, {cache_.v, now, first, kPiece}, [&](const Part& part) {
            if (part.queries == 1) {
                const Lines to = row_of(part.query, part.first);
                return score_alone<Kind>(queries(part.query).vectors.at, part.from, part.at, part.count, dim, to.at);
            }
            take_keys<Kind>(part.from, part.at, part.count, dim, keys_);
            row_groups<kDown>(part.queries, [&](int i, auto size) {
                const int q = part.query + i;
                score<Kind, decltype(size)::value>(queries(q).vectors, keys_, dim, part.count, row_of(q, part.first));
            });
        });
        row_groups<kDown>(run.heads, [&](int q, auto size) {
            const SeenAlike<decltype(size)::value> own(seen);
            weigh_tile<decltype(size)::value>(scores_.from(q), own.at, queries(q));
        });
        for_pieces(run, {cache_.v, now, first, seen.last}, {cache_.k, next, 0, kPiece}, [&](const Part& part) {
            const Seen here = seen.within(part.first, part.count);
            const Lines weights = row_of(part.query, part.first / Units<Kind>::kNumbers);
            if (part.queries == 1) {
                float* const sums = queries(part.query).sums.at;
                return add_values_alone<Kind>(weights.at, part.from, part.at, part.count, here, dim, sums);
            }
            take_values<Kind>(part.from, part.at, part.count, dim, values_);
            row_groups<kDown>(part.queries, [&](int i, auto size) {
                const SeenAlike<decltype(size)::value> own(here);
                const Lines sums = queries(part.query + i).sums;
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
    void for_pieces(const Run& run, const Piece& all, const Piece& after, const Use& use) const {
        for (int first = all.first; first < all.count; first += kPiece) {
            const int count = smaller(all.tokens.count - first, kPiece);
            const bool last = first + kPiece >= all.count;
            const Piece next = last ? after : Piece{all.cache, all.tokens, first + kPiece, kPiece};
            for (int q = 0; q < run.heads;) {
                const int head = run.head + q, some = smaller(group_ - head % group_, run.heads - q);
                fetch(run, next, q, some);
                use({cached(all.cache, run.at, head / group_), all.tokens.at + first, first, count, q, some});
                q += some;
            }
        }
    }

    // Asks memory for a piece that a run will read, while ``count`` of its queries from ``q`` on are computed: for as
    // large a share of it, in the order in which it lies there. Always inline: GCC drops calls of what only prefetches.
    GPTKERN_HD void fetch(const Run& run, const Piece& piece, int q, int count) const {
        constexpr int kLine = 64 / sizeof(Storage);
        const int first = run.head / group_, heads = (run.head + run.heads - 1) / group_ + 1 - first;
        const int end = piece.first + piece.count * (q + count) / run.queries();
        for (int t = piece.first + piece.count * q / run.queries(); t < end && t < piece.tokens.count; ++t) {
            const Storage* const at = cached(piece.cache, run.at, first) + piece.tokens.at[t];
            for (int i = 0; i < heads * m_.head_dim; i += kLine) {
                _mm_prefetch(reinterpret_cast<const char*>(at + i), _MM_HINT_T0);
            }
        }
    }

    // The weights of R queries, in place of their scores.
    template <int R>
    void weigh_tile(const Lines& scores, const Seen* seen, const Queries& to) const {
        float top[kLanes], less[kLanes];
        const Vec before = load(to.tops);
        store(top, before);
        for (int r = 0; r < R; ++r) {
            if (m_.attention_softcap > 0.0f) cap(scores.row(r), seen[r].last);
            top[r] = top_score(scores.row(r), seen[r], top[r]);
        }
        store(less, exponential(sub(before, load(top))));
        for (int r = 0; r < R; ++r) {
            float *const total = to.totals.row(r), *const sums = to.sums.row(r);
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

    // The weighted means of a run.
    void finish(const Run& run) const {
        const int dim = m_.head_dim;
        for_queries(run, [&](int q, int row, int head) {
            const Queries own = queries(q);
            float* const attended = p_.row(Buffer::kAttended, row) + head * dim;
            const Vec inverse = all(1.0f / sum(load(own.totals.at)));
            for (int i = 0; i < dim; i += kLanes) {
                store_some(attended + i, dim - i, mul(load(own.sums.at + i), inverse));
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
        for (int i = 0, place = first % cache_.page_size; i < found.count; ++i) {
            found.at[i] = *page * cache_.page_stride + place * cache_.slot_stride;
            if (++place < cache_.page_size) continue;
            place = 0;
            ++page;
        }
        return found;
    }

    Storage* cached(void* cache, int layer, int kv_head) const {
        return static_cast<Storage*>(cache) + layer * cache_.layer_stride + kv_head * m_.head_dim;
    }
};

}  // namespace GPTKERN_ISA
}  // namespace gptkern
