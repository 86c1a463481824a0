// A whole decoder layer. Few tokens are one region: what small work the next phase needs is done by the thread that
// opens it, and the shared expert shares phases with the routed ones. Many tokens are the operators one by one. Both
// are the same arithmetic, with the same bits out.
#include <cstring>
#include <initializer_list>

#include "errors.h"
#include "few_tokens.h"
#include "linear.h"
#include "segments.h"
#include "threads.h"

namespace mobilemoe {
namespace {

mobilemoe_moe_ffn_args experts_of(const mobilemoe_layer_args& args, int64_t num_tokens, const float* x, float* out) {
  mobilemoe_moe_ffn_args experts = args.experts;
  experts.num_tokens = num_tokens;
  experts.dim = args.dim;
  experts.dtype = experts.weights_dtype = MOBILEMOE_FP32;
  experts.x = x;
  experts.out = out;
  return experts;
}

int64_t query_width(const mobilemoe_layer_args& args) { return args.query.out_features; }
int64_t key_width(const mobilemoe_layer_args& args) { return args.key.out_features; }
int64_t hidden_width(const mobilemoe_layer_args& args) { return args.gate.out_features; }
bool has_experts(const mobilemoe_layer_args& args) { return args.experts.num_experts > 0; }

mobilemoe_attention_args attention_of(const mobilemoe_layer_args& args, float* out) {
  return {args.num_tokens, args.start, query_width(args) / args.cache.head_dim, nullptr, args.cache, out};
}

struct FewTokensLayer {
  const mobilemoe_layer_args& args;
  int64_t num_threads, num_tokens, dim, head_dim;
  // Inputs of the linears: of query, key and value and then of gate and up; of the output projection; of down.
  Tokens normed_tokens, attended_tokens, mid_tokens;
  float *normed, *query, *key, *value, *attended, *hidden, *mid, *shared;
  float* heads;   // [threads, rows, head_dim]: rotated queries of one head of keys
  char* scratch;  // [threads, 6 * head_dim]: a rotated key, and what its cache needs to write it
  mobilemoe_attention_args attention_args;
  Attention attention;
  mobilemoe_moe_ffn_args expert_args;
  Problem problem;
  FewTokens experts;

  FewTokensLayer(Layout& layout, const mobilemoe_layer_args& a, int64_t threads)
      : args(a),
        num_threads(threads),
        num_tokens(a.num_tokens),
        dim(a.dim),
        head_dim(a.cache.head_dim),
        normed_tokens(layout, num_tokens, dim),
        attended_tokens(layout, num_tokens, query_width(a)),
        mid_tokens(layout, num_tokens, hidden_width(a)),
        normed(layout.take<float>(num_tokens * dim)),
        query(layout.take<float>(num_tokens * query_width(a))),
        key(layout.take<float>(num_tokens * key_width(a))),
        value(layout.take<float>(num_tokens * key_width(a))),
        attended(layout.take<float>(num_tokens * query_width(a))),
        hidden(layout.take<float>(num_tokens * dim)),
        mid(layout.take<float>(num_tokens * hidden_width(a))),
        shared(layout.take<float>(num_tokens * dim)),
        heads(layout.take<float>(threads * num_tokens * query_width(a))),
        scratch(layout.take<char>(threads * 6 * head_dim)),
        attention_args(attention_of(a, attended)),
        attention(layout, attention_args, threads),
        expert_args(experts_of(a, num_tokens, normed, nullptr)),
        problem(expert_args, threads),
        experts(layout, problem, 0, num_tokens) {}

  void normalize(const float* x, const float* weight) const {
    for (int64_t t = 0; t < num_tokens; ++t) isa().rms_norm(x + t * dim, weight, dim, args.eps, normed + t * dim);
    quantize(normed_tokens, normed, dim);
  }

  static void quantize(const Tokens& tokens, const float* x, int64_t width) {
    for (int64_t unit = 0; unit < tokens.num_units(); ++unit) {
      tokens.quantize(unit, [&](int64_t t) { return x + t * width; });
    }
  }

  // Heads of token t, from `from` to `to`.
  void rotate(const float* from, int64_t num_heads, int64_t t, float* to) const {
    const int64_t angles = t * head_dim / 2;
    std::memcpy(to, from, num_heads * head_dim * sizeof(float));
    isa().rotate_and_normalize(to, args.cos + angles, args.sin + angles, num_heads, head_dim, args.eps, false);
  }

  // One head of keys over one segment, after writing the new keys and values that lie in it.
  void attend(int64_t kv_head, int64_t segment, int64_t worker) const {
    char* own = scratch + worker * 6 * head_dim;
    auto* rotated = reinterpret_cast<float*>(own);
    for (int64_t t = 0; t < num_tokens; ++t) {
      if ((args.start + t) / kSegment != segment) continue;
      const int64_t at = t * key_width(args) + kv_head * head_dim;
      rotate(key + at, 1, t, rotated);
      attention.cache.write(kv_head, args.start + t, rotated, value + at, own + 4 * head_dim);
    }
    attention.attend_few(kv_head, segment, worker, [&](int64_t head) {
      const int64_t width = attention.heads_per_key * head_dim;
      float* states = heads + worker * num_tokens * query_width(args);
      for (int64_t t = 0; t < num_tokens; ++t) {
        rotate(query + t * query_width(args) + head * width, attention.heads_per_key, t, states + t * width);
      }
      return [this, states](int64_t row) { return states + row * head_dim; };
    });
  }

  void run() const {
    const int64_t num_segments = attention.num_segments;
    const bool is_sparse = has_experts(args);
    const Product inputs[] = {{normed_tokens, args.query}, {normed_tokens, args.key}, {normed_tokens, args.value}};
    float* const outs[] = {query, key, value};
    const Phase projected(
        [&] {
          normalize(args.x, args.attention_norm);
          return inputs[0].num_units() + inputs[1].num_units() + inputs[2].num_units();
        },
        [&](int64_t unit, int64_t) {
          int i = 0;
          for (; unit >= inputs[i].num_units(); ++i) unit -= inputs[i].num_units();
          inputs[i].run(unit, [&](int64_t t, int64_t row, const float* values, int64_t count) {
            std::memcpy(outs[i] + t * inputs[i].num_rows + row, values, count * sizeof(float));
          });
        });
    const Phase attending(
        [&] { return attention.open_few(); },
        [&](int64_t unit, int64_t worker) { attend(unit / num_segments, unit % num_segments, worker); });
    const Product output(attended_tokens, args.output);
    const Phase added(
        [&] {
          quantize(attended_tokens, attended, query_width(args));
          return output.num_units();
        },
        [&](int64_t unit, int64_t) {
          output.run(unit, [&](int64_t t, int64_t row, const float* values, int64_t count) {
            const int64_t at = t * dim + row;
            for (int64_t i = 0; i < count; ++i) hidden[at + i] = args.x[at + i] + values[i];
          });
        });
    const Product gate(normed_tokens, args.gate), up(normed_tokens, args.up), down(mid_tokens, args.down);
    const int64_t num_scores = is_sparse ? experts.router.num_units() : 0;
    const Phase gated(
        [&] {
          normalize(hidden, args.feed_forward_norm);
          return num_scores + gate.num_units();
        },
        [&](int64_t unit, int64_t) {
          if (unit < num_scores) return experts.router.run(unit, normed);
          gate.run(unit - num_scores, [&](int64_t t, int64_t row, const float* values, int64_t count) {
            std::memcpy(mid + t * hidden_width(args) + row, values, count * sizeof(float));
          });
          up.run(unit - num_scores, [&](int64_t t, int64_t row, const float* values, int64_t count) {
            isa().silu_multiply(mid + t * hidden_width(args) + row, values, count);
          });
        });
    // From here on, what has no routed experts has less to do.
    const auto num_in = [&] { return is_sparse ? experts.num_in() : 0; };
    const Phase multiplied(
        [&] {
          if (is_sparse) experts.router.finish();
          quantize(mid_tokens, mid, hidden_width(args));
          return num_in() + down.num_units();
        },
        [&](int64_t unit, int64_t) {
          if (unit < num_in()) return experts.multiply_in(unit, normed);
          down.run(unit - num_in(), [&](int64_t t, int64_t row, const float* values, int64_t count) {
            float* target = (is_sparse ? shared : args.out) + t * dim + row;
            for (int64_t i = 0; i < count; ++i)
              target[i] = is_sparse ? values[i] : hidden[t * dim + row + i] + values[i];
          });
        });
    const Phase returned([&] { return is_sparse ? experts.num_out() : 0; },
                         [&](int64_t unit, int64_t) { experts.multiply_out(unit); });
    run_phases(num_threads, projected, attending, added, gated, multiplied, returned);
    if (!is_sparse) return;
    experts.sum([&](int64_t t, int64_t row, const float* routed, int64_t count) {
      const int64_t at = t * dim + row;
      for (int64_t i = 0; i < count; ++i) args.out[at + i] = hidden[at + i] + (routed[i] + shared[at + i]);
    });
  }
};

int run_few(const mobilemoe_layer_args& args, int64_t num_threads) {
  Layout measured;
  FewTokensLayer(measured, args, num_threads);
  char* memory = workspace().reserve(measured.size());
  if (memory == nullptr) return out_of_memory(measured.size());
  Layout placed(memory);
  FewTokensLayer(placed, args, num_threads).run();
  return MOBILEMOE_OK;
}

// What the operators hand to each other.
struct ManyTokensLayer {
  float *normed, *query, *key, *value, *attended, *hidden, *routed;

  ManyTokensLayer(Layout& layout, const mobilemoe_layer_args& args)
      : normed(layout.take<float>(args.num_tokens * args.dim)),
        query(layout.take<float>(args.num_tokens * query_width(args))),
        key(layout.take<float>(args.num_tokens * key_width(args))),
        value(layout.take<float>(args.num_tokens * key_width(args))),
        attended(layout.take<float>(args.num_tokens * query_width(args))),
        hidden(layout.take<float>(args.num_tokens * args.dim)),
        routed(layout.take<float>(args.num_tokens * args.dim)) {}

  int run(const mobilemoe_layer_args& args, int64_t num_threads) const {
    const int64_t num_tokens = args.num_tokens, dim = args.dim, size = num_tokens * dim;
    const auto norm = [&](const float* x, const float* weight) {
      return mobilemoe_rms_norm(x, weight, num_tokens, dim, args.eps, normed, num_threads);
    };
    const mobilemoe_attention_inputs_args inputs = {
        num_tokens, dim,      args.cache.head_dim, args.eps, MOBILEMOE_FP32, normed,
        args.query, args.key, args.value,          args.cos, args.sin,       query,
        key,        value};
    mobilemoe_attention_args attention = attention_of(args, attended);
    attention.query = query;
    const mobilemoe_linear_args output = {num_tokens, query_width(args), dim,   MOBILEMOE_FP32,
                                          attended,   args.output.tiles, hidden};
    const mobilemoe_mlp_args shared = {num_tokens, dim,     MOBILEMOE_FP32, normed,
                                       args.gate,  args.up, args.down,      args.out};
    if (const int status = norm(args.x, args.attention_norm)) return status;
    if (const int status = mobilemoe_attention_inputs(&inputs, num_threads)) return status;
    if (const int status = mobilemoe_update_cache(&args.cache, args.start, num_tokens, key, value, num_threads)) {
      return status;
    }
    if (const int status = mobilemoe_attention(&attention, num_threads)) return status;
    if (const int status = mobilemoe_linear(&output, num_threads)) return status;
    for (int64_t i = 0; i < size; ++i) hidden[i] = args.x[i] + hidden[i];
    if (const int status = norm(hidden, args.feed_forward_norm)) return status;
    if (has_experts(args)) {
      const mobilemoe_moe_ffn_args experts = experts_of(args, num_tokens, normed, routed);
      if (const int status = mobilemoe_moe_ffn(&experts, num_threads)) return status;
    }
    if (const int status = mobilemoe_mlp(&shared, num_threads)) return status;
    // In the order of the model: the feed-forward block adds up its experts, then comes the residual.
    if (has_experts(args)) {
      for (int64_t i = 0; i < size; ++i) args.out[i] = routed[i] + args.out[i];
    }
    for (int64_t i = 0; i < size; ++i) args.out[i] = hidden[i] + args.out[i];
    return MOBILEMOE_OK;
  }
};

int run_many(const mobilemoe_layer_args& args, int64_t num_threads) {
  thread_local Workspace outer;  // the operators have the other one
  Layout measured;
  ManyTokensLayer(measured, args);
  char* memory = outer.reserve(measured.size());
  if (memory == nullptr) return out_of_memory(measured.size());
  Layout placed(memory);
  return ManyTokensLayer(placed, args).run(args, num_threads);
}

int check(const mobilemoe_layer_args* args, int64_t num_threads) {
  if (args == nullptr) return fail("args is null");
  const auto& a = *args;
  if (const int status = check_dense("dim", a.num_tokens, a.dim, MOBILEMOE_FP32, num_threads)) return status;
  if (const int status = check_cache(a.cache, a.start, a.num_tokens)) return status;
  const auto check_named = [](const char* name, const mobilemoe_matrix& matrix, int64_t out_features) {
    if (const int status = check_matrix(name, matrix)) return status;
    if (matrix.out_features == out_features) return static_cast<int>(MOBILEMOE_OK);
    return fail("%s has %lld outputs in place of %lld", name, (long long)matrix.out_features, (long long)out_features);
  };
  const int64_t keys = a.cache.num_kv_heads * a.cache.head_dim;
  if (const int status = check_matrix("query", a.query)) return status;
  if (a.query.out_features % keys != 0) {
    return fail("query has %lld outputs, no multiple of %lld", (long long)a.query.out_features, (long long)keys);
  }
  if (const int status = check_dense("the query's width", a.num_tokens, a.query.out_features, 0, num_threads)) {
    return status;
  }
  if (const int status = check_named("key", a.key, keys)) return status;
  if (const int status = check_named("value", a.value, keys)) return status;
  if (const int status = check_named("output", a.output, a.dim)) return status;
  if (const int status = check_matrix("gate", a.gate)) return status;
  if (const int status = check_dense("the hidden width", a.num_tokens, a.gate.out_features, 0, num_threads)) {
    return status;
  }
  if (const int status = check_named("up", a.up, a.gate.out_features)) return status;
  if (const int status = check_named("down", a.down, a.dim)) return status;
  if (a.num_tokens > 0) {
    for (const void* pointer : {static_cast<const void*>(a.x), static_cast<const void*>(a.cos),
                                static_cast<const void*>(a.sin), static_cast<const void*>(a.attention_norm),
                                static_cast<const void*>(a.feed_forward_norm), static_cast<const void*>(a.out)}) {
      if (pointer == nullptr) return fail("x, cos, sin, a norm or out is null");
    }
  }
  if (!has_experts(a)) return MOBILEMOE_OK;
  if (a.experts.router == nullptr || a.experts.gate_up == nullptr || a.experts.down == nullptr) {
    return fail("the router or an expert weight is null");
  }
  return check_moe_ffn(experts_of(a, a.num_tokens, a.x, a.out));
}

}  // namespace
}  // namespace mobilemoe

int mobilemoe_decoder_layer(const mobilemoe_layer_args* args, int64_t num_threads) {
  using namespace mobilemoe;
  if (const int status = check(args, num_threads)) return status;
  if (args->num_tokens <= kDraftTokens) return args->num_tokens > 0 ? run_few(*args, num_threads) : MOBILEMOE_OK;
  // Some tokens at a time, which bounds what the operators hand to each other; later ones see earlier ones in the
  // cache.
  const int64_t num_passes = ceil_div(args->num_tokens, kPassTokens);
  for (int64_t pass = 0; pass < num_passes; ++pass) {
    const int64_t first = pass * args->num_tokens / num_passes, last = (pass + 1) * args->num_tokens / num_passes;
    mobilemoe_layer_args part = *args;
    part.num_tokens = last - first;
    part.start += first;
    part.x += first * args->dim;
    part.out += first * args->dim;
    part.cos += first * args->cache.head_dim / 2;
    part.sin += first * args->cache.head_dim / 2;
    if (const int status = run_many(part, num_threads)) return status;
  }
  return MOBILEMOE_OK;
}
