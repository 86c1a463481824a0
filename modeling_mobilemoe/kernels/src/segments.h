// Attention over a layer's cache, in pieces: rows of some tokens over one segment of keys, and their merge.
#pragma once

#include <atomic>
#include <cmath>
#include <cstring>
#include <new>

#include "cache.h"
#include "isa.h"
#include "mobilemoe.h"
#include "workspace.h"

namespace mobilemoe {

constexpr int64_t kQueriesPerUnit = 32;
constexpr int64_t kSegmentBlocks = 4, kSegment = kSegmentBlocks * kKeys;

int check_attention(const mobilemoe_attention_args& args, int64_t num_threads);

struct Attention {
  const mobilemoe_attention_args& args;
  int64_t num_threads;
  Cache cache;
  int64_t dim, heads_per_key, num_segments, max_rows, worker_bytes, partial_bytes;
  char* workers;  // one Worker each
  // Of few tokens: one Rows for every head of keys and segment, how many segments of a head are still to do, and the
  // head whose queries a worker has.
  char* partials;
  std::atomic<int64_t>* missing;
  int64_t* loaded;

  // Rows of some tokens and all query heads of one head of keys.
  struct Rows {
    float* sums;         // [rows, head_dim]
    AttentionRow* rows;  // [rows]

    Rows(Layout& layout, int64_t num_rows, int64_t dim)
        : sums(layout.take<float>(num_rows * dim)), rows(layout.take<AttentionRow>(num_rows)) {}
  };

  struct Worker {
    float *keys, *values;  // of a block, unpacked
    int8_t* integers;      // [rows, head_dim]: the queries in INT8
    Rows part, whole;

    Worker(Layout& layout, int64_t num_rows, int64_t dim)
        : keys(layout.take<float>(kKeys * dim)),
          values(layout.take<float>(kKeys * dim)),
          integers(layout.take<int8_t>(num_rows * dim)),
          part(layout, num_rows, dim),
          whole(layout, num_rows, dim) {}
  };

  Attention(Layout& layout, const mobilemoe_attention_args& a, int64_t threads)
      : args(a),
        num_threads(threads),
        cache{a.cache},
        dim(a.cache.head_dim),
        heads_per_key(a.num_heads / a.cache.num_kv_heads),
        num_segments(ceil_div(a.start + a.num_tokens, kSegment)),
        max_rows(heads_per_key * smaller(a.num_tokens, kQueriesPerUnit)) {
    Layout worker, partial;
    Worker(worker, max_rows, dim);
    Rows(partial, max_rows, dim);
    worker_bytes = worker.size();
    partial_bytes = partial.size();
    workers = layout.take<char>(worker_bytes * threads);
    partials = layout.take<char>(is_few() ? partial_bytes * num_segments * a.cache.num_kv_heads : 0);
    missing = layout.take<std::atomic<int64_t>>(a.cache.num_kv_heads);
    loaded = layout.take<int64_t>(threads);
  }

  bool is_few() const { return args.num_tokens <= kDraftTokens; }

  Worker worker(int64_t index) const {
    Layout layout(workers + index * worker_bytes);
    return Worker(layout, max_rows, dim);
  }

  Rows partial(int64_t kv_head, int64_t segment) const {
    Layout layout(partials + (kv_head * num_segments + segment) * partial_bytes);
    return Rows(layout, max_rows, dim);
  }

  // Where the query of a row is, and its output.
  int64_t place(int64_t kv_head, int64_t first, int64_t row) const {
    return ((first + row / heads_per_key) * args.num_heads + kv_head * heads_per_key + row % heads_per_key) * dim;
  }

  // The first row of tokens from `first` on that sees this position, and those after it.
  int64_t first_row(int64_t first, int64_t position) const {
    const int64_t token = position - args.start - first;
    return token > 0 ? token * heads_per_key : 0;
  }

  static void reset(const Rows& of, int64_t begin, int64_t end, int64_t dim) {
    if (begin < end) std::memset(of.sums + begin * dim, 0, (end - begin) * dim * sizeof(float));
    for (int64_t row = begin; row < end; ++row) {
      AttentionRow& to = of.rows[row];
      to.sums = of.sums + row * dim;
      to.largest = -INFINITY;
      to.total = 0.0f;
    }
  }

  // The query of a row is at query(row).
  template <typename Query>
  void load_queries(const Rows& of, const Worker& worker, int64_t num_rows, const Query& query) const {
    for (int64_t row = 0; row < num_rows; ++row) {
      AttentionRow& to = of.rows[row];
      to.query = query(row);
      if (cache.args.type != MOBILEMOE_INT8) continue;
      int8_t* integers = worker.integers + row * dim;
      to.step = isa().quantize_head(to.query, dim, integers);
      to.integers = integers;
      to.sum = 0;
      for (int64_t d = 0; d < dim; ++d) to.sum += integers[d];
    }
  }

  // Rows of tokens [first, last) over one segment, to `of`, whose queries are there.
  void attend(const Rows& of, const Worker& worker, int64_t kv_head, int64_t first, int64_t last,
              int64_t segment) const {
    const int64_t num_rows = (last - first) * heads_per_key, end = args.start + last;
    const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
    reset(of, first_row(first, segment * kSegment), num_rows, dim);
    for (int64_t key = segment * kSegment; key < smaller((segment + 1) * kSegment, end); key += kKeys) {
      const int64_t begin = first_row(first, key);
      for (int64_t row = begin; row < num_rows; ++row) {
        const int64_t seen = args.start + first + row / heads_per_key + 1 - key;
        of.rows[row].num_keys = static_cast<int>(smaller(seen, kKeys));
      }
      const CachedBlock block = cache.read(kv_head, key / kKeys, worker.keys, worker.values);
      isa().attend(of.rows + begin, static_cast<int>(num_rows - begin), block, dim, scale);
    }
  }

  void merge(const Rows& part, const Rows& whole, int64_t first, int64_t last, int64_t segment) const {
    for (int64_t row = first_row(first, segment * kSegment); row < (last - first) * heads_per_key; ++row) {
      isa().merge_row(part.rows[row], whole.rows + row, dim);
    }
  }

  void write(const Rows& whole, int64_t kv_head, int64_t first, int64_t last) const {
    for (int64_t row = 0; row < (last - first) * heads_per_key; ++row) {
      float* out = args.out + place(kv_head, first, row);
      for (int64_t d = 0; d < dim; ++d) out[d] = whole.sums[row * dim + d] / whole.rows[row].total;
    }
  }

  // Few tokens: opens the phase whose units are attend_few().
  int64_t open_few() const {
    const int64_t num_heads = cache.args.num_kv_heads;
    for (int64_t head = 0; head < num_heads; ++head) new (missing + head) std::atomic<int64_t>(num_segments);
    for (int64_t index = 0; index < num_threads; ++index) loaded[index] = -1;
    return num_heads * num_segments;
  }

  // One head of keys over one segment. `queries(kv_head)` prepares a head's queries, and gives that of a row. Whoever
  // does the last segment of a head merges all of them.
  template <typename Queries>
  void attend_few(int64_t kv_head, int64_t segment, int64_t index, const Queries& queries) const {
    const int64_t num_rows = args.num_tokens * heads_per_key;
    const Worker own = worker(index);
    if (loaded[index] != kv_head) load_queries(own.whole, own, num_rows, queries(kv_head));
    loaded[index] = kv_head;
    const Rows part = partial(kv_head, segment);
    for (int64_t row = 0; row < num_rows; ++row) part.rows[row] = own.whole.rows[row];
    attend(part, own, kv_head, 0, args.num_tokens, segment);
    if (missing[kv_head].fetch_sub(1) == 1) finish(kv_head, own.whole);
  }

  void finish(int64_t kv_head, const Rows& whole) const {
    reset(whole, 0, args.num_tokens * heads_per_key, dim);
    for (int64_t segment = 0; segment < num_segments; ++segment) {
      merge(partial(kv_head, segment), whole, 0, args.num_tokens, segment);
    }
    write(whole, kv_head, 0, args.num_tokens);
  }
};

}  // namespace mobilemoe
