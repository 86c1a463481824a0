// The experts' weights, and what both ways through the operator share.
#pragma once

#include <cstdint>

#include "errors.h"
#include "isa.h"
#include "mobilemoe.h"
#include "routing.h"
#include "threads.h"
#include "workspace.h"

namespace mobilemoe {

// INT4 matrices [E, rows, columns] with their scales.
struct Experts {
  const uint8_t* qweight;
  const uint16_t* scale;
  int64_t rows, columns;

  int64_t num_groups() const { return columns / kGroup; }
  int64_t num_blocks() const { return ceil_div(rows, kBlock); }

  // The strip that begins at a group, from some row on.
  Strip strip(int64_t expert, int64_t row, int64_t group) const {
    const int64_t left = num_groups() - group;
    return {qweight + ((expert * rows + row) * columns / 2 + group * kGroup / 2), columns / 2,
            left <= 0 ? 0 : static_cast<int>(smaller(left, kStripGroups))};
  }

  ChunkScales scales(int64_t expert, int64_t row, const Strip& low, int64_t low_group, const Strip& high,
                     int64_t high_group) const {
    const uint16_t* first = scale + (expert * rows + row) * num_groups();
    return {first + low_group, first + high_group, low.num_groups, high.num_groups, num_groups()};
  }
};

inline int rows_in_block(int64_t rows, int64_t block) {
  return static_cast<int>(smaller(rows - block * kBlock, kBlock));
}

struct Problem {
  const mobilemoe_moe_ffn_args& args;
  int64_t num_threads;
  Experts gate_up, down;

  Problem(const mobilemoe_moe_ffn_args& a, int64_t threads)
      : args(a),
        num_threads(threads),
        gate_up{a.gate_up_qweight, a.gate_up_scale, a.dim, 2 * a.expert_dim},
        down{a.down_qweight, a.down_scale, a.expert_dim, a.dim} {}
};

// Memory of one pass over up to kPassTokens tokens.
struct Pass {
  const Problem& problem;
  int64_t first, num_tokens;  // of the whole input
  Router router;
  float* converted;  // [T, D] when x is not FP32

  Pass(Layout& layout, const Problem& of, int64_t at, int64_t count)
      : problem(of),
        first(at),
        num_tokens(count),
        router(layout, of.args, at, count, of.num_threads),
        converted(layout.take<float>(of.args.dtype == MOBILEMOE_FP32 ? 0 : count * of.args.dim)) {}

  // x of this pass in FP32.
  const float* inputs() const {
    const int64_t offset = first * problem.args.dim;
    if (problem.args.dtype == MOBILEMOE_FP32) return static_cast<const float*>(problem.args.x) + offset;
    isa().from_bf16(static_cast<const uint16_t*>(problem.args.x) + offset, num_tokens * problem.args.dim, converted);
    return converted;
  }

  // The first two phases: scores, then the choice and the sort.
  auto score(const float* x) const {
    return Phase([this] { return router.num_units(); },
                 [this, x](int64_t unit, int64_t, int64_t) { router.run(unit, x); });
  }
  auto choose() const {
    return Phase([] { return int64_t{1}; }, [this](int64_t, int64_t, int64_t) { router.finish(); });
  }

  // Token t of the output from its sum, which is in accumulator order. `ordered` [D] is scratch memory.
  void write(int64_t t, const float* sum, float* ordered) const {
    const int64_t dim = problem.args.dim, offset = (first + t) * dim;
    if (problem.args.dtype == MOBILEMOE_FP32) {
      isa().in_order(sum, dim, static_cast<float*>(problem.args.out) + offset);
    } else {
      isa().in_order(sum, dim, ordered);
      isa().to_bf16(ordered, dim, static_cast<uint16_t*>(problem.args.out) + offset);
    }
  }
};

// A status with a sentence, as errors.h.
int check_moe_ffn(const mobilemoe_moe_ffn_args& args);

// Runs a pass of either kind in the caller's workspace.
template <typename Kind>
int run_pass(const Problem& problem, int64_t first, int64_t count) {
  Layout measured;
  Kind(measured, problem, first, count);
  char* memory = workspace().reserve(measured.size());
  if (memory == nullptr) return out_of_memory(measured.size());
  Layout placed(memory);
  Kind(placed, problem, first, count).run();
  return MOBILEMOE_OK;
}

// The two kinds, of tokens [first, first + count).
int run_few_tokens(const Problem& problem, int64_t first, int64_t count);
int run_many_tokens(const Problem& problem, int64_t first, int64_t count);

}  // namespace mobilemoe
