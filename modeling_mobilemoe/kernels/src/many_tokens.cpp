// Many tokens: arithmetic is the limit. A unit is an expert, some of its tokens, and some of its outputs, whose
// weights stay in cache while the tokens pass over them.
#include "experts.h"

namespace mobilemoe {
namespace {

// Tokens of one expert in a unit: enough to pay for reading its weights, few enough that one popular expert is shared
// out.
constexpr int64_t kUnitTokens = 96;

struct ManyTokens : Pass {
  int64_t* unit_start;  // [E + 1]: token ranges of expert e are unit_start[e] .. unit_start[e + 1] - 1
  float* mid;           // [P, F], by pair
  float* out;           // [P, D], by pair

  ManyTokens(Layout& layout, const Problem& of, int64_t at, int64_t count)
      : Pass(layout, of, at, count),
        unit_start(layout.take<int64_t>(of.args.num_experts + 1)),
        mid(layout.take<float>(num_pairs() * of.args.expert_dim)),
        out(layout.take<float>(num_pairs() * of.args.dim)) {}

  int64_t num_pairs() const { return num_tokens * problem.args.top_k; }

  void choose_units() const {
    router.finish();
    unit_start[0] = 0;
    for (int64_t e = 0; e < problem.args.num_experts; ++e) {
      unit_start[e + 1] = unit_start[e] + ceil_div(router.start[e + 1] - router.start[e], kUnitTokens);
    }
  }

  // Units of `num_columns` columns of every expert. multiply(expert, column, rows, count, values) has the inputs
  // x(pair) in `rows`; its results go to to(pair, column).
  template <typename Input, typename Multiply, typename Output>
  auto phase(int64_t num_columns, const Input& x, const Multiply& multiply, const Output& to) const {
    return Phase([this, num_columns] { return unit_start[problem.args.num_experts] * num_columns; },
                 [=](int64_t unit, int64_t) {
                   const int64_t range = unit / num_columns, column = unit % num_columns;
                   int64_t expert = 0;
                   while (unit_start[expert + 1] <= range) ++expert;
                   const int64_t count = router.start[expert + 1] - router.start[expert];
                   const int64_t num_ranges = unit_start[expert + 1] - unit_start[expert];
                   const int64_t i = range - unit_start[expert];
                   router.for_pairs(expert, i * count / num_ranges, (i + 1) * count / num_ranges, isa().expert_tokens,
                                    [&](const int64_t* pairs, int num_tokens) {
                                      const float* rows[kTileTokens];
                                      alignas(64) float values[kTileTokens * kGroup];
                                      for (int t = 0; t < num_tokens; ++t) rows[t] = x(pairs[t]);
                                      multiply(expert, column, rows, num_tokens, values);
                                      for (int t = 0; t < num_tokens; ++t) {
                                        std::memcpy(to(pairs[t], column), values + t * kGroup, kGroup * sizeof(float));
                                      }
                                    });
                 });
  }

  void run() const {
    const int64_t dim = problem.args.dim, width = problem.args.expert_dim, top_k = problem.args.top_k;
    const float* x = inputs();
    auto scored = score(x);
    Phase chosen([] { return int64_t{1}; }, [this](int64_t, int64_t) { choose_units(); });
    const auto gated = phase(
        width / kGroup, [=](int64_t pair) { return x + pair / top_k * dim; },
        [this](int64_t expert, int64_t column, const float* const* rows, int count, float* values) {
          problem.multiply_gate_up(expert, column, rows, count, values);
        },
        [=](int64_t pair, int64_t column) { return mid + pair * width + column * kGroup; });
    const auto multiplied = phase(
        dim / kGroup, [=](int64_t pair) { return mid + pair * width; },
        [this](int64_t expert, int64_t column, const float* const* rows, int count, float* values) {
          problem.down.multiply(expert, column, rows, count, values);
        },
        [=](int64_t pair, int64_t column) { return out + pair * dim + column * kGroup; });
    constexpr int64_t kTokens = 16;
    const Phase added([this] { return ceil_div(num_tokens, kTokens); },
                      [&](int64_t unit, int64_t) {
                        for (int64_t t = unit * kTokens; t < smaller((unit + 1) * kTokens, num_tokens); ++t) {
                          for (int64_t column = 0; column < dim; column += kGroup) {
                            alignas(64) float sum[kGroup] = {};
                            for (int64_t pair = t * top_k; pair < (t + 1) * top_k; ++pair) {
                              isa().add(sum, out + pair * dim + column, router.weight[pair], kGroup);
                            }
                            write(t, column, sum, kGroup);
                          }
                        }
                      });
    run_phases(problem.num_threads, scored, chosen, gated, multiplied, added);
  }
};

}  // namespace

int run_many_tokens(const Problem& problem, int64_t first, int64_t count) {
  return run_pass<ManyTokens>(problem, first, count);
}

}  // namespace mobilemoe
