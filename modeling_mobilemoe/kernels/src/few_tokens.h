// Few tokens: memory is the limit. A unit is some outputs of an expert, a contiguous piece of its weights, which all
// of its tokens take at once.
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

  // Units of the second one: some columns of every chosen expert, and then the sums of every token, which are handed
  // to finish(t, first output, values, count).
  int64_t num_out() const { return ceil_div(problem.down.num_columns(), columns_per_unit()); }

  template <typename Finish>
  void multiply_out(int64_t unit, const Finish& finish) const {
    const int64_t dim = problem.args.dim, top_k = problem.args.top_k;
    const int64_t first = unit * columns_per_unit();
    const int64_t last = smaller(first + columns_per_unit(), problem.down.num_columns());
    for (int64_t i = 0; i < router.num_used(); ++i) multiply_columns(router.used[i], first, last);
    for (int64_t t = 0; t < num_tokens; ++t) {
      for (int64_t column = first; column < last; ++column) {
        alignas(64) float sum[kGroup] = {};
        for (int64_t pair = t * top_k; pair < (t + 1) * top_k; ++pair) {
          isa().add(sum, out + pair * dim + column * kGroup, router.weight[pair], kGroup);
        }
        finish(t, column * kGroup, sum, kGroup);
      }
    }
  }

 private:
  // A few for each thread, because a unit reads as many pieces as there are experts.
  int64_t columns_per_unit() const { return ceil_div(problem.down.num_columns(), 4 * problem.num_threads); }
  void multiply_columns(int64_t expert, int64_t first, int64_t last) const;
};

}  // namespace mobilemoe
