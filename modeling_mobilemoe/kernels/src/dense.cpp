// What a layer has beside its routed experts: the shared expert, the inputs of its attention, norms; and the
// embedding.
#include <initializer_list>

#include "errors.h"
#include "linear.h"
#include "threads.h"

namespace mobilemoe {
namespace {

struct Mlp {
  const mobilemoe_mlp_args& args;
  int64_t num_threads;
  int64_t first, hidden;
  Tokens tokens, hidden_tokens;
  float* mid;        // [T, hidden]
  float* converted;  // [threads, D]

  Mlp(Layout& layout, const mobilemoe_mlp_args& a, int64_t threads, int64_t at, int64_t count)
      : args(a),
        num_threads(threads),
        first(at),
        hidden(a.gate.out_features),
        tokens(layout, count, a.dim),
        hidden_tokens(layout, count, hidden),
        mid(layout.take<float>(count * hidden)),
        converted(layout.take<float>(threads * a.dim)) {}

  void run() const {
    const Rows rows = {args.x, args.dtype, args.dim};
    const Product gate(tokens, args.gate), up(tokens, args.up), down(hidden_tokens, args.down);
    Phase quantized([this] { return tokens.num_units(); },
                    [&](int64_t unit, int64_t worker) {
                      tokens.quantize(unit,
                                      [&](int64_t t) { return rows.in(first + t, converted + worker * args.dim); });
                    });
    Phase gated([&] { return gate.num_units(); },
                [&](int64_t unit, int64_t) {
                  gate.run(unit, [&](int64_t t, int64_t row, const float* values, int64_t count) {
                    std::memcpy(mid + t * hidden + row, values, count * sizeof(float));
                  });
                  up.run(unit, [&](int64_t t, int64_t row, const float* values, int64_t count) {
                    isa().silu_multiply(mid + t * hidden + row, values, count);
                  });
                });
    Phase requantized(
        [this] { return hidden_tokens.num_units(); },
        [&](int64_t unit, int64_t) { hidden_tokens.quantize(unit, [&](int64_t t) { return mid + t * hidden; }); });
    Phase multiplied([&] { return down.num_units(); },
                     [&](int64_t unit, int64_t) {
                       down.run(unit, [&](int64_t t, int64_t row, const float* values, int64_t n) {
                         write_rows(args.out, args.dtype, args.dim, first + t, row, values, n);
                       });
                     });
    run_phases(num_threads, quantized, gated, requantized, multiplied);
  }
};

struct AttentionInputs {
  const mobilemoe_attention_inputs_args& args;
  int64_t num_threads;
  int64_t first;
  Tokens tokens;
  float* converted;  // [threads, the widest of x, queries and keys]

  AttentionInputs(Layout& layout, const mobilemoe_attention_inputs_args& a, int64_t threads, int64_t at, int64_t count)
      : args(a),
        num_threads(threads),
        first(at),
        tokens(layout, count, a.dim),
        converted(layout.take<float>(threads * widest())) {}

  int64_t widest() const {
    int64_t width = args.dim;
    for (const mobilemoe_matrix* matrix : {&args.query, &args.key}) {
      if (matrix->out_features > width) width = matrix->out_features;
    }
    return width;
  }

  // Queries or keys of one token, rounded to their type after each of the two steps as PyTorch does.
  void rotate(const mobilemoe_matrix& matrix, void* out, int64_t t, float* scratch) const {
    const int64_t width = matrix.out_features, angles = t * args.head_dim / 2;
    const bool round = args.dtype != MOBILEMOE_FP32;
    float* states = round ? scratch : static_cast<float*>(out) + t * width;
    if (round) isa().from_bf16(static_cast<const uint16_t*>(out) + t * width, width, states);
    isa().rotate_and_normalize(states, args.cos + angles, args.sin + angles, width / args.head_dim, args.head_dim,
                               args.eps, round);
    if (round) isa().to_bf16(states, width, static_cast<uint16_t*>(out) + t * width);
  }

  void run() const {
    const Rows rows = {args.x, args.dtype, args.dim};
    const auto scratch = [this](int64_t worker) { return converted + worker * widest(); };
    const mobilemoe_matrix matrices[] = {args.query, args.key, args.value};
    void* const outs[] = {args.query_out, args.key_out, args.value_out};
    const Product products[] = {{tokens, matrices[0]}, {tokens, matrices[1]}, {tokens, matrices[2]}};
    Phase quantized([this] { return tokens.num_units(); },
                    [&](int64_t unit, int64_t worker) {
                      tokens.quantize(unit, [&](int64_t t) { return rows.in(first + t, scratch(worker)); });
                    });
    Phase multiplied([&] { return products[0].num_units() + products[1].num_units() + products[2].num_units(); },
                     [&](int64_t unit, int64_t) {
                       int i = 0;
                       for (; unit >= products[i].num_units(); ++i) unit -= products[i].num_units();
                       products[i].run(unit, [&](int64_t t, int64_t row, const float* values, int64_t n) {
                         write_rows(outs[i], args.dtype, matrices[i].out_features, first + t, row, values, n);
                       });
                     });
    Phase rotated([this] { return tokens.num_units(); },
                  [&](int64_t unit, int64_t worker) {
                    const int64_t begin = unit * tokens.per_unit();
                    for (int64_t t = begin; t < smaller(begin + tokens.per_unit(), tokens.count); ++t) {
                      for (int i = 0; i < 2; ++i) rotate(matrices[i], outs[i], first + t, scratch(worker));
                    }
                  });
    run_phases(num_threads, quantized, multiplied, rotated);
  }
};

int check(const mobilemoe_mlp_args* args, int64_t num_threads) {
  if (args == nullptr) return fail("args is null");
  const auto& a = *args;
  if (const int status = check_dense("dim", a.num_tokens, a.dim, a.dtype, num_threads)) return status;
  if (const int status = check_dense("the hidden width", a.num_tokens, a.gate.out_features, a.dtype, num_threads)) {
    return status;
  }
  if (const int status = check_matrix("gate", a.gate)) return status;
  if (const int status = check_matrix("up", a.up)) return status;
  if (const int status = check_matrix("down", a.down)) return status;
  if (a.up.out_features != a.gate.out_features || a.down.out_features != a.dim) {
    return fail("gate, up and down have %lld, %lld and %lld outputs, dim=%lld", (long long)a.gate.out_features,
                (long long)a.up.out_features, (long long)a.down.out_features, (long long)a.dim);
  }
  if (a.num_tokens > 0 && (a.x == nullptr || a.out == nullptr)) return fail("x or out is null");
  return MOBILEMOE_OK;
}

int check(const mobilemoe_attention_inputs_args* args, int64_t num_threads) {
  if (args == nullptr) return fail("args is null");
  const auto& a = *args;
  if (const int status = check_dense("dim", a.num_tokens, a.dim, a.dtype, num_threads)) return status;
  if (const int status = check_matrix("query", a.query)) return status;
  if (const int status = check_matrix("key", a.key)) return status;
  if (const int status = check_matrix("value", a.value)) return status;
  if (a.head_dim < 2 || a.head_dim % 2 != 0) return fail("head_dim=%lld is not even", (long long)a.head_dim);
  for (const mobilemoe_matrix* matrix : {&a.query, &a.key}) {
    if (matrix->out_features % a.head_dim != 0) {
      return fail("%lld features do not divide into heads of %lld", (long long)matrix->out_features,
                  (long long)a.head_dim);
    }
  }
  if (a.num_tokens > 0 && (a.x == nullptr || a.cos == nullptr || a.sin == nullptr || a.query_out == nullptr ||
                           a.key_out == nullptr || a.value_out == nullptr)) {
    return fail("x, cos, sin or an output is null");
  }
  return MOBILEMOE_OK;
}

// Runs work(t) for every token; few of them are done before a thread would have started.
template <typename Work>
void for_tokens(int64_t num_tokens, int64_t num_threads, const Work& work) {
  constexpr int64_t kTokens = 16;
  if (num_tokens < kTokens) {
    for (int64_t t = 0; t < num_tokens; ++t) work(t);
    return;
  }
  Phase phase([=] { return ceil_div(num_tokens, kTokens); },
              [=](int64_t unit, int64_t) {
                for (int64_t t = unit * kTokens; t < smaller((unit + 1) * kTokens, num_tokens); ++t) work(t);
              });
  run_phases(num_threads, phase);
}

}  // namespace
}  // namespace mobilemoe

int mobilemoe_mlp(const mobilemoe_mlp_args* args, int64_t num_threads) {
  using namespace mobilemoe;
  if (const int status = check(args, num_threads)) return status;
  return run_passes<Mlp>(*args, num_threads);
}

int mobilemoe_attention_inputs(const mobilemoe_attention_inputs_args* args, int64_t num_threads) {
  using namespace mobilemoe;
  if (const int status = check(args, num_threads)) return status;
  return run_passes<AttentionInputs>(*args, num_threads);
}

int mobilemoe_rms_norm(const float* x, const float* weight, int64_t num_tokens, int64_t dim, float eps, float* out,
                       int64_t num_threads) {
  using namespace mobilemoe;
  if (const int status = check_dense("dim", num_tokens, dim, MOBILEMOE_FP32, num_threads)) return status;
  if (num_tokens > 0 && (x == nullptr || weight == nullptr || out == nullptr)) return fail("x, weight or out is null");
  for_tokens(num_tokens, num_threads,
             [=](int64_t t) { isa().rms_norm(x + t * dim, weight, dim, eps, out + t * dim); });
  return MOBILEMOE_OK;
}

int mobilemoe_embedding(const int64_t* tokens, const mobilemoe_matrix* table, int64_t num_tokens, int64_t dim,
                        float* out, int64_t num_threads) {
  using namespace mobilemoe;
  if (const int status = check_dense("dim", num_tokens, dim, MOBILEMOE_FP32, num_threads)) return status;
  if (table == nullptr) return fail("the table is null");
  if (const int status = check_matrix("the table", *table)) return status;
  if (num_tokens > 0 && (tokens == nullptr || out == nullptr)) return fail("tokens or out is null");
  for (int64_t t = 0; t < num_tokens; ++t) {
    if (tokens[t] < 0 || tokens[t] >= table->out_features) {
      return fail("tokens[%lld]=%lld is not one of %lld", (long long)t, (long long)tokens[t],
                  (long long)table->out_features);
    }
  }
  for_tokens(num_tokens, num_threads, [=](int64_t t) {
    const uint8_t* tiles = table->tiles + tokens[t] / kGroup * dim * kInputBytes;
    isa().expand_row(tiles, static_cast<int>(tokens[t] % kGroup), dim / kGroup, out + t * dim);
  });
  return MOBILEMOE_OK;
}
