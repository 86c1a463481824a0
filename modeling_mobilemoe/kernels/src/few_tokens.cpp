#include "few_tokens.h"

namespace mobilemoe {

int64_t FewTokens::num_in() const { return router.num_used() * problem.args.expert_dim / kGroup; }

void FewTokens::multiply_in(int64_t unit, const float* x) const {
  const int64_t num_columns = problem.args.expert_dim / kGroup, width = problem.args.expert_dim;
  const int64_t expert = router.used[unit / num_columns], column = unit % num_columns;
  router.for_pairs(expert, isa().expert_tokens, [&](const int64_t* pairs, int count) {
    const float* rows[kTileTokens];
    alignas(64) float swiglu[kTileTokens * kGroup];
    for (int i = 0; i < count; ++i) rows[i] = x + pairs[i] / problem.args.top_k * problem.args.dim;
    problem.multiply_gate_up(expert, column, rows, count, swiglu);
    for (int i = 0; i < count; ++i) {
      std::memcpy(mid + pairs[i] * width + column * kGroup, swiglu + i * kGroup, kGroup * sizeof(float));
    }
  });
}

void FewTokens::multiply_out(int64_t unit) const {
  const int64_t expert = router.used[unit / units_per_expert()];
  const int64_t first = unit % units_per_expert() * columns_per_unit();
  const int64_t last = smaller(first + columns_per_unit(), problem.down.num_columns());
  router.for_pairs(expert, isa().expert_tokens, [&](const int64_t* pairs, int count) {
    const float* rows[kTileTokens];
    alignas(64) float values[kTileTokens * kGroup];
    for (int i = 0; i < count; ++i) rows[i] = mid + pairs[i] * problem.args.expert_dim;
    for (int64_t column = first; column < last; ++column) {
      problem.down.multiply(expert, column, rows, count, values);
      for (int i = 0; i < count; ++i) {
        float* target = out + pairs[i] * problem.args.dim + column * kGroup;
        std::memcpy(target, values + i * kGroup, kGroup * sizeof(float));
      }
    }
  });
}

namespace {

struct FewTokensOfOperator : FewTokens {
  using FewTokens::FewTokens;

  void run() const {
    const float* x = inputs();
    auto scored = score(x);
    auto chosen = choose();
    const Phase gated([&] { return num_in(); }, [&](int64_t unit, int64_t) { multiply_in(unit, x); });
    const Phase multiplied([&] { return num_out(); }, [&](int64_t unit, int64_t) { multiply_out(unit); });
    run_phases(problem.num_threads, scored, chosen, gated, multiplied);
    sum([&](int64_t t, int64_t column, const float* values, int64_t count) { write(t, column, values, count); });
  }
};

}  // namespace

int run_few_tokens(const Problem& problem, int64_t first, int64_t count) {
  return run_pass<FewTokensOfOperator>(problem, first, count);
}

}  // namespace mobilemoe
