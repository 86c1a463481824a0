// Causal attention of new tokens over a cache that already holds them.
//
// Keys are taken in segments of 256, each with a softmax of its own over blocks of 64, and the segments are merged in
// order: a row's result does not depend on what it is computed with. Few tokens share out the segments among the
// threads; many share out themselves.
#include "errors.h"
#include "segments.h"
#include "threads.h"

namespace mobilemoe {
namespace {

constexpr int64_t kMaxHeads = 1 << 16;

void run_few(const Attention& attention) {
  const mobilemoe_attention_args& args = attention.args;
  const Phase attended([&] { return attention.open_few(); },
                       [&](int64_t unit, int64_t index) {
                         const auto queries = [&](int64_t kv_head) {
                           return [&args, &attention, kv_head](int64_t row) {
                             return args.query + attention.place(kv_head, 0, row);
                           };
                         };
                         attention.attend_few(unit / attention.num_segments, unit % attention.num_segments, index,
                                              queries);
                       });
  run_phases(attention.num_threads, attended);
}

void run_many(const Attention& attention) {
  const mobilemoe_attention_args& args = attention.args;
  const int64_t num_heads = args.cache.num_kv_heads, num_chunks = ceil_div(args.num_tokens, kQueriesPerUnit);
  const Phase attended([&] { return num_chunks * num_heads; },
                       [&](int64_t unit, int64_t index) {
                         // Later tokens see more, so they come first.
                         const int64_t kv_head = unit % num_heads,
                                       first = (num_chunks - 1 - unit / num_heads) * kQueriesPerUnit;
                         const int64_t last = smaller(first + kQueriesPerUnit, args.num_tokens);
                         const int64_t num_rows = (last - first) * attention.heads_per_key;
                         const Attention::Worker own = attention.worker(index);
                         attention.load_queries(own.part, own, num_rows, [&](int64_t row) {
                           return args.query + attention.place(kv_head, first, row);
                         });
                         Attention::reset(own.whole, 0, num_rows, attention.dim);
                         for (int64_t segment = 0; segment * kSegment < args.start + last; ++segment) {
                           attention.attend(own.part, own, kv_head, first, last, segment);
                           attention.merge(own.part, own.whole, first, last, segment);
                         }
                         attention.write(own.whole, kv_head, first, last);
                       });
  run_phases(attention.num_threads, attended);
}

}  // namespace

int check_attention(const mobilemoe_attention_args& a, int64_t num_threads) {
  if (const int status = check_cache(a.cache, a.start, a.num_tokens)) return status;
  if (a.num_heads < 1 || a.num_heads > kMaxHeads || a.num_heads % a.cache.num_kv_heads != 0) {
    return fail("num_heads=%lld is no multiple of num_kv_heads=%lld", (long long)a.num_heads,
                (long long)a.cache.num_kv_heads);
  }
  if (a.num_tokens > 0 && (a.query == nullptr || a.out == nullptr)) return fail("query or out is null");
  return check_threads(num_threads);
}

}  // namespace mobilemoe

int mobilemoe_attention(const mobilemoe_attention_args* args, int64_t num_threads) {
  using namespace mobilemoe;
  if (args == nullptr) return fail("args is null");
  if (const int status = check_attention(*args, num_threads)) return status;
  if (args->num_tokens == 0) return MOBILEMOE_OK;
  Layout measured;
  Attention(measured, *args, num_threads);
  char* memory = workspace().reserve(measured.size());
  if (memory == nullptr) return out_of_memory(measured.size());
  Layout placed(memory);
  const Attention attention(placed, *args, num_threads);
  attention.is_few() ? run_few(attention) : run_many(attention);
  return MOBILEMOE_OK;
}
