// Causal attention of new tokens over a cache that already holds them. Units are a key-value head and some tokens with
// all queries of that head, so that keys are transposed once for all of these.
#include <cmath>
#include <cstring>

#include "errors.h"
#include "isa.h"
#include "mobilemoe.h"
#include "threads.h"
#include "workspace.h"

namespace mobilemoe {
namespace {

constexpr int64_t kUnitTokens = 32;

struct Attention {
  const mobilemoe_attention_args& args;
  int64_t num_threads;
  int64_t heads_per_key, num_chunks, worker_bytes;
  char* workers;

  struct Worker {
    float* keys;         // [head_dim, kKeys]
    float* sums;         // [rows, head_dim]
    AttentionRow* rows;  // [rows]

    Worker(Layout& layout, int64_t head_dim, int64_t num_rows)
        : keys(layout.take<float>(head_dim * kKeys)),
          sums(layout.take<float>(num_rows * head_dim)),
          rows(layout.take<AttentionRow>(num_rows)) {}
  };

  Attention(Layout& layout, const mobilemoe_attention_args& a, int64_t threads)
      : args(a),
        num_threads(threads),
        heads_per_key(a.num_heads / a.num_kv_heads),
        num_chunks(ceil_div(a.num_tokens, kUnitTokens)) {
    Layout one;
    Worker(one, a.head_dim, heads_per_key * kUnitTokens);
    worker_bytes = one.size();
    workers = layout.take<char>(worker_bytes * threads);
  }

  void attend(int64_t kv_head, int64_t first, int64_t last, const Worker& worker) const {
    const int64_t dim = args.head_dim, stride = args.num_kv_heads * dim, num_rows = (last - first) * heads_per_key;
    const auto place = [&](int64_t row) {
      return ((first + row / heads_per_key) * args.num_heads + kv_head * heads_per_key + row % heads_per_key) * dim;
    };
    std::memset(worker.sums, 0, num_rows * dim * sizeof(float));
    for (int64_t row = 0; row < num_rows; ++row) {
      worker.rows[row] = {args.query + place(row), worker.sums + row * dim, -INFINITY, 0.0f, 0};
    }
    const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
    const int64_t end = args.start + last;
    // A head's keys lie a row of all heads apart, further than the machine looks ahead by itself.
    const auto fetch = [&](const float* states, int64_t key) {
      for (int64_t row = key; row < smaller(key + kKeys, end); ++row) {
        for (int64_t d = 0; d < dim; d += 16) __builtin_prefetch(states + row * stride + kv_head * dim + d, 0, 2);
      }
    };
    fetch(args.keys, 0);
    for (int64_t key = 0; key < end; key += kKeys) {
      fetch(args.values, key);
      fetch(args.keys, key + kKeys);
      const float *keys = args.keys + key * stride + kv_head * dim, *values = args.values + key * stride + kv_head * dim;
      isa().transpose_keys(keys, stride, static_cast<int>(smaller(end - key, kKeys)), dim, worker.keys);
      // Rows of the first tokens may be past their last key.
      int64_t begin = key - args.start - first;
      begin = begin > 0 ? begin * heads_per_key : 0;
      for (int64_t row = begin; row < num_rows; ++row) {
        const int64_t seen = args.start + first + row / heads_per_key + 1 - key;
        worker.rows[row].num_keys = static_cast<int>(smaller(seen, kKeys));
      }
      isa().attend(worker.rows + begin, static_cast<int>(num_rows - begin), worker.keys, values, stride, dim, scale);
    }
    for (int64_t row = 0; row < num_rows; ++row) {
      float* out = args.out + place(row);
      for (int64_t d = 0; d < dim; ++d) out[d] = worker.sums[row * dim + d] / worker.rows[row].total;
    }
  }

  void run() const {
    Phase phase([this] { return num_chunks * args.num_kv_heads; },
                [this](int64_t unit, int64_t, int64_t index) {
                  Layout layout(workers + index * worker_bytes);
                  const Worker worker(layout, args.head_dim, heads_per_key * kUnitTokens);
                  // Later tokens see more, so they come first.
                  const int64_t chunk = num_chunks - 1 - unit / args.num_kv_heads;
                  const int64_t first = chunk * kUnitTokens;
                  attend(unit % args.num_kv_heads, first, smaller(first + kUnitTokens, args.num_tokens), worker);
                });
    run_phases(num_threads, phase);
  }
};

constexpr int64_t kMaxHeadDim = 4096, kMaxHeads = 1 << 16, kMaxLength = int64_t{1} << 36;

int check(const mobilemoe_attention_args* args, int64_t num_threads) {
  if (args == nullptr) return fail("args is null");
  const auto& a = *args;
  if (a.head_dim < 16 || a.head_dim > kMaxHeadDim || a.head_dim % 16 != 0) {
    return fail("head_dim=%lld is not a multiple of 16 up to %lld", (long long)a.head_dim, (long long)kMaxHeadDim);
  }
  if (a.num_kv_heads < 1 || a.num_heads < 1 || a.num_heads > kMaxHeads || a.num_heads % a.num_kv_heads != 0) {
    return fail("num_heads=%lld is no multiple of num_kv_heads=%lld", (long long)a.num_heads,
                (long long)a.num_kv_heads);
  }
  if (a.num_tokens < 0 || a.start < 0 || a.num_tokens > kMaxLength || a.start > kMaxLength ||
      a.start + a.num_tokens > a.max_length) {
    return fail("positions %lld to %lld are not in a cache of %lld", (long long)a.start,
                (long long)(a.start + a.num_tokens - 1), (long long)a.max_length);
  }
  if (a.num_tokens > 0 && (a.query == nullptr || a.keys == nullptr || a.values == nullptr || a.out == nullptr)) {
    return fail("query, keys, values or out is null");
  }
  return check_threads(num_threads);
}

}  // namespace
}  // namespace mobilemoe

int mobilemoe_attention(const mobilemoe_attention_args* args, int64_t num_threads) {
  using namespace mobilemoe;
  if (const int status = check(args, num_threads)) return status;
  if (args->num_tokens == 0) return MOBILEMOE_OK;
  Layout measured;
  Attention(measured, *args, num_threads);
  char* memory = workspace().reserve(measured.size());
  if (memory == nullptr) return out_of_memory(measured.size());
  Layout placed(memory);
  Attention(placed, *args, num_threads).run();
  return MOBILEMOE_OK;
}
