// Few tokens: memory is the limit. A unit is some outputs of an expert, a contiguous piece of its weights, which all
// of its tokens take at once. Units of an expert follow each other, so that a thread reads on from one to the next.
#pragma once

#include "experts.h"

namespace mobilemoe {

struct FewTokens : Pass {
  float* mid;  // [P, F]
  float* out;  // [P, D]

  FewTokens(Layout& layout, const Problem& of, int64_t at, int64_t count)
      : Pass(layout, of, at, count),
        mid(layout.take<float>(num_pairs() * of.args.expert_dim)),
        out(layout.take<float>(num_pairs() * of.args.dim)) {}

  int64_t num_pairs() const { return num_tokens * problem.args.top_k; }

  // Units of the first matrix, of inputs x [T, D], when the router has finished.
  int64_t num_in() const;
  void multiply_in(int64_t unit, const float* x) const;

  // Units of the second one, and then the sums of every token, handed to finish(t, first output, values, count).
  int64_t num_out() const { return router.num_used() * units_per_expert(); }
  void multiply_out(int64_t unit) const;

  template <typename Finish>
  void sum(const Finish& finish) const {
    const int64_t dim = problem.args.dim, top_k = problem.args.top_k;
    for (int64_t t = 0; t < num_tokens; ++t) {
      for (int64_t column = 0; column < dim; column += kGroup) {
        alignas(64) float values[kGroup] = {};
        for (int64_t pair = t * top_k; pair < (t + 1) * top_k; ++pair) {
          isa().add(values, out + pair * dim + column, router.weight[pair], kGroup);
        }
        finish(t, column, values, kGroup);
      }
    }
  }

 private:
  int64_t columns_per_unit() const { return ceil_div(kUnitBytes, problem.down.inputs * kInputBytes); }
  int64_t units_per_expert() const { return ceil_div(problem.down.num_columns(), columns_per_unit()); }
};

}  // namespace mobilemoe
