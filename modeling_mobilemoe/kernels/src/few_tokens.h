// Few tokens: memory is the limit. A unit is a block of rows of one pair's expert, a contiguous piece of the weights
// that is read once, while the next one is fetched.
#pragma once

#include "experts.h"

namespace mobilemoe {

struct FewTokens : Pass {
  float* gate_up;  // [P, blocks of D, 2F]
  float* down;     // [P, blocks of F, D]
  float* sums;     // [threads, 3, D]

  FewTokens(Layout& layout, const Problem& of, int64_t at, int64_t count)
      : Pass(layout, of, at, count),
        gate_up(layout.take<float>(num_pairs() * of.gate_up.num_blocks() * of.gate_up.columns)),
        down(layout.take<float>(num_pairs() * of.down.num_blocks() * of.down.columns)),
        sums(layout.take<float>(of.num_threads * 3 * of.args.dim)) {}

  int64_t num_pairs() const { return num_tokens * problem.args.top_k; }
  int64_t num_in() const { return num_pairs() * problem.gate_up.num_blocks(); }
  int64_t num_out() const { return num_pairs() * problem.down.num_blocks(); }

  // Units of the first matrix, [0, num_in()), of inputs x [T, D]; and then of the second, [0, num_out()). `next` is
  // the unit to fetch, or past the end.
  void multiply_in(int64_t unit, int64_t next, int64_t worker, const float* x) const;
  void multiply_out(int64_t unit, int64_t next) const;
  // A token's weighted sum [D], in accumulator order. `scratch` is as large.
  void add_up(int64_t token, float* total, float* scratch) const;
};

}  // namespace mobilemoe
